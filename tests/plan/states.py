"""What killed runs leave, written by hand."""

from dataclasses import asdict

from rcnn.storage import StageFolder
from rcnn.train.checkpoint_store import FOLDER, Record


def write_checkpoint_record(target: StageFolder, *, epoch: int, step: int = 0, seconds: float) -> None:
    """The record of a checkpoint."""
    record = Record(epoch, step, seconds, sha256="0")
    target.storage.write_json(target.path(f"{FOLDER}/{record.name}.json"), asdict(record))
