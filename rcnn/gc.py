"""`rcnn gc`: finds what no result and no running work refers to, and deletes it if asked to.

In: a config, which names the storage and MLflow. Out: leftovers, each with its size, age and reason. Folders with a
live lease, and recently changed ones, are never listed.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from rcnn.config import PipelineConfig
from rcnn.data.ingest import DRAFT_PREFIX
from rcnn.lease import held, is_held
from rcnn.registry.mlflow_store import delete_run, runs_of
from rcnn.stages import STAGES
from rcnn.storage import OLD_RESULT, RESULT, SCRATCH, StageFolder, Storage
from rcnn.tracking import has_store

DAYS = 7.0
DAYS_OF_A_JOB = 1 / 24  # a flow that follows a job renews its mark, and a job that waits for room has one
JOBS = "runs/jobs"


@dataclass(frozen=True)
class Leftover:
    """Something to delete.

    Attributes:
        what: why it is of no use.
        place: a folder in the storage, or an MLflow run.
        num_bytes: its size; of a run in MLflow, 0.
        days: since its last change.
        delete: deletes it. A run in MLflow can be restored with its own tools.
    """

    what: str
    place: str
    num_bytes: int
    days: float
    delete: Callable[[], None]


def find_leftovers(config: PipelineConfig, *, days: float = DAYS) -> Iterator[Leftover]:
    """Everything in the storage and in MLflow that can go.

    Args:
        config: names the storage and MLflow.
        days: how long it must not have changed.

    Raises:
        ClusterError: the storage or MLflow cannot be read.
    """
    storage = Storage(config.storage)
    for what, folder, work in _candidates(storage):
        num_bytes, changed = storage.usage(folder)
        age = (time.time() - changed) / 86400
        if age >= max(days, DAYS_OF_A_JOB if work == folder and folder.startswith(JOBS) else 0):
            yield Leftover(what, folder, num_bytes, age, partial(_delete, storage, folder, work))
    if has_store(config):
        for run in runs_of(config, storage):
            age = (time.time() - run.ended) / 86400
            if age >= days and not storage.exists(run.key):
                what = "MLflow run whose files are gone, and which has no registered model"
                yield Leftover(what, f"{run.name} ({run.run_id[:8]})", 0, age, partial(delete_run, config, run.run_id))


def _delete(storage: Storage, folder: str, work: str) -> None:
    """Deletes a folder, unless a process has resumed the work since it was listed.

    Raises:
        ClusterError: a process holds the lease.
    """
    with held(StageFolder(storage, work), waits=False):
        storage.delete(folder)


def _candidates(storage: Storage) -> Iterator[tuple[str, str, str]]:
    """Reasons, folders, and the work that they belong to, whatever their age."""
    for name in storage.list_folders("datasets"):
        data_set = f"datasets/{name.removeprefix(DRAFT_PREFIX)}"
        if name.startswith(DRAFT_PREFIX) and not is_held(storage, data_set):
            yield "data set that was never finished", f"datasets/{name}", data_set
    for parent in sorted({stage.folder for stage in STAGES.values()} - {"datasets"}):
        for name in storage.list_folders(parent):
            folder = f"{parent}/{name}"
            if folder != JOBS and not is_held(storage, folder):
                yield from ((what, place, folder) for what, place in _within(storage, folder))
    for name in storage.list_folders(JOBS):
        yield "note of a Ray job", f"{JOBS}/{name}", f"{JOBS}/{name}"


def _within(storage: Storage, folder: str) -> Iterator[tuple[str, str]]:
    """What can go of a stage's folder: all, if the stage never finished, or what only unfinished work needs."""
    try:
        result = storage.read_json(f"{folder}/{RESULT}")
    except ValueError:
        result = None
    if storage.exists(f"{folder}/{OLD_RESULT}"):
        return
    if not isinstance(result, dict):
        yield "work that was never finished", folder
        return
    for name in storage.list_folders(folder):
        if name == "checkpoints" and not result.get("limit_minutes"):
            yield "checkpoints of a finished training", f"{folder}/{name}"
        elif name == "_parts":
            yield "parts of finished predictions", f"{folder}/{name}"
        elif name.startswith(SCRATCH):
            yield "what Ray left of a killed attempt", f"{folder}/{name}"
