"""Batch prediction on Ray Data: maps the parts of an input over a pool of actors, on all nodes, each with a model of its own.

What goes through Ray are parts and records, some hundred bytes each. An actor reads, decodes, predicts and writes its rows
itself, a batch at a time: `ray.data.read_parquet` would hold whole row groups (it ignores the batch size), and send the pixels
of every row through the object store.
"""

import logging
import pickle
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from rcnn.ray_session import ensure_ray, require_room  # isort: skip  (sets what Ray reads)

import ray
import ray.data
import torch
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.util.annotations import RayDeprecationWarning

from rcnn.config import ExecutionConfig, PipelineConfig
from rcnn.data.sources.origin import without_pattern
from rcnn.errors import ClusterError, RcnnError
from rcnn.evaluate.batch_inputs import BatchPart
from rcnn.evaluate.batch_parts import predict_part
from rcnn.evaluate.batch_records import PartRecord
from rcnn.evaluate.predict import Predictor
from rcnn.progress import say
from rcnn.ray_nodes import require_seen
from rcnn.storage import Storage
from rcnn.text import counted


def predict_on_workers(
    config: PipelineConfig,
    source: str,
    target: Storage,
    model_files: Mapping[str, bytes],
    parts: Sequence[BatchPart],
) -> Generator[PartRecord, None, None]:
    """Yields the record of each part when its predictions are written, in any order.

    Args:
        config: `ray` says where, `execution.use_gpu` whether each worker has a GPU besides its core.
        source: the input, which all nodes must see.
        target: where predictions are written, which all nodes must see too.
        model_files: the content of the model's folder by file name; nodes need not see that folder.
        parts: in any number.

    Raises:
        ClusterError: Ray cannot be reached, has no room, or workers die too often; or a node does not see the files.
        RcnnError: the error of a worker.
    """
    ensure_ray(config, target)
    if "://" not in source:
        require_seen(without_pattern(source), setting="INPUT")
    how = config.execution
    require_room(config, num_cpus=1, num_gpus=float(how.use_gpu), settings="ray.num_cpus, execution.use_gpu")
    model = ray.put(dict(model_files))
    todo, num_deaths = {part.number: part for part in parts}, 0
    while todo:
        try:
            for record in _records(how, target, model, list(todo.values())):
                del todo[record.number]
                num_deaths = 0
                yield record
        except (RayActorError, OutOfMemoryError) as death:
            num_deaths += 1
            reason = _reason(death)
            if num_deaths > how.max_failures:
                raise ClusterError(
                    f"workers died more often than allowed without finishing a part; the last one with: {reason}",
                    where=f"execution.max_failures = {how.max_failures}",
                    remedy="Run the same command again: predicted parts are kept",
                    retryable=True,
                ) from death
            say(f"  a worker died ({reason}); new ones are started")


def _records(how: ExecutionConfig, target: Storage, model: Any, parts: Sequence[BatchPart]) -> Iterator[PartRecord]:
    """Maps the parts over as many workers as there is room for; the first death of a worker ends it.

    Ray Data itself would restart workers without end, also where a part is too large for the memory.

    Raises:
        RayActorError, OutOfMemoryError: a worker died.
        RcnnError: the error of a worker.
    """
    num_workers = min(_room(how), len(parts))
    say(f"  predicting {counted(len(parts), 'part')} on {counted(num_workers, 'worker')}")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # `say` reports the progress, and the death of a worker
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.from_items([{"part": pickle.dumps(part)} for part in parts], override_num_blocks=len(parts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # 2.60 has no other parameter for max_restarts
        outcomes = data.map(
            PartPredictor,
            fn_constructor_args=(model, target.root),
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            num_cpus=1,  # while one worker reads and writes, the models of the others compute
            num_gpus=int(how.use_gpu),
            max_restarts=0,
        )
    for row in outcomes.iter_rows():
        outcome = pickle.loads(row["outcome"])  # noqa: S301  (pickled by our own worker)
        if isinstance(outcome, RcnnError):
            raise outcome
        yield outcome


def _reason(death: Exception) -> str:
    """Why a worker died, in a line; if it could not start, the last line of Ray's text names the error."""
    lines = [line.strip() for line in str(death).splitlines() if line.strip()] or [type(death).__name__]
    return lines[-1] if "creation task" in lines[0] else lines[0]


def _room(how: ExecutionConfig) -> int:
    """Workers for which the cluster has cores and GPUs now."""
    there = ray.cluster_resources()
    rooms = [int(there.get("CPU", 0))]
    rooms += [int(there.get("GPU", 0))] if how.use_gpu else []
    return max(1, min(rooms))


class PartPredictor:
    """The actor. It returns this project's errors, since Ray would wrap a raised one in an exception of its own."""

    def __init__(self, model_files: Any, root: str):
        torch.set_num_threads(1)
        self._target = Storage(root)
        self._predictor = Predictor.of_files(ray.get(model_files))

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        """Predicts a pickled part; returns its pickled record, or the error."""
        part = pickle.loads(row["part"])  # noqa: S301  (pickled by our own driver)
        try:
            outcome: PartRecord | RcnnError = predict_part(self._predictor, part, self._target)
        except RcnnError as error:
            outcome = error
        return {"outcome": pickle.dumps(outcome)}
