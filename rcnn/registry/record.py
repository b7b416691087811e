"""Our own record, `registered.json`: the versions in our own store, as MLflow's client listed them, and the state of the
database file at that time. It is void as soon as that state differs.
"""

from collections.abc import Mapping
from typing import Any

from rcnn.config import PipelineConfig
from rcnn.storage import Storage
from rcnn.tracking import STORE

RECORD = "registered.json"


def store_state(config: PipelineConfig) -> dict[str, int]:
    """What changes when another file is put in the place of our own store, or anything is written to it."""
    found = Storage(config.storage).local_path(STORE).stat()
    return {"inode": found.st_ino, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def write_record(config: PipelineConfig, state: Mapping[str, int], versions: Mapping[str, list[int]]) -> None:
    """Records the versions of each model; `state` is the store's from before they were read."""
    Storage(config.storage).write_json(RECORD, {"store": dict(state), "versions": dict(versions)})


def read_record(config: PipelineConfig) -> dict[str, list[int]] | None:
    """The recorded versions of each model, or None where the store has changed since."""
    try:
        record: Any = Storage(config.storage).read_json(RECORD) or {}
    except ValueError:
        return None
    return record["versions"] if record.get("store") == store_state(config) else None
