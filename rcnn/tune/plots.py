"""Pictures of a search: how the error fell, which settings matter, and which values go with a low error."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rcnn.config import PipelineConfig
from rcnn.storage import StageFolder
from rcnn.tracking import Tracker
from rcnn.tune.ledger import Record


def write_pictures(config: PipelineConfig, target: StageFolder, records: Sequence[Record], tracker: Tracker) -> None:
    """Draws what can be drawn."""
