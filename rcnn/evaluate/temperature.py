"""A model's temperature, in its description: what divides its logits for calibrated probabilities (see `calibration.py`).

It is an option, not the default: probabilities are then those of the report, of the served model and of exports.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcnn.text import parse_json
from rcnn.train.checkpoint import DESCRIPTION

TEMPERATURE = "temperature"
"""The key in the description."""


def add_temperature(folder: Path, temperature: float) -> None:
    """Notes a temperature in the description of a model that is about to be registered. The training's own folder, which is
    named by its content, has none, and neither have models that were registered before there was one."""
    file = folder / DESCRIPTION
    description = parse_json(file.read_text(encoding="utf-8")) | {TEMPERATURE: temperature}
    file.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def temperature_of(description: Mapping[str, Any]) -> float:
    """What divides a model's logits for calibrated probabilities; 1 where none was fitted."""
    return float(description.get(TEMPERATURE, 1.0))
