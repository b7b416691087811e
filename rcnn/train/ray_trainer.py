"""The train stage: `fit` on Ray Train workers, in attempts that go on from the newest checkpoint.

In: a config and a data set. Out: a finished model folder.
"""

import hashlib
import math
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcnn.ray_session import ensure_ray, require_room  # isort: skip  (sets what Ray reads)

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import TrainingFailedError

from rcnn.config import ExecutionConfig, PipelineConfig
from rcnn.data.manifest import require_manifest
from rcnn.errors import RcnnError, TrainingError
from rcnn.lease import Lease
from rcnn.model.build import count_parameters
from rcnn.progress import EpochProgress, hand_on, say
from rcnn.ray_board import Listener, following, new_board
from rcnn.results import IngestResult, TrainResult
from rcnn.signals import stopping
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import Tracker
from rcnn.train.checkpoint import WEIGHTS, TrainState
from rcnn.train.checkpoint_store import CheckpointStore, Record, read_records
from rcnn.train.elastic import Waiting, watching_nodes, workers_to_start
from rcnn.train.execution import choose_device
from rcnn.train.loop import Metrics, Stopped, fit, training_data
from rcnn.train.pace import Forecast, peak_bytes
from rcnn.train.ray_workers import WorkersTrainer
from rcnn.train.shared_rows import shared_on_node

SECONDS_TO_END = 2.0  # from the last epoch to the result: the best model is written, Ray Train ends


def run_train(config: PipelineConfig, data: IngestResult, target: StageFolder, tracker: Tracker) -> TrainResult:
    """Trains the model that `config` describes; resumes where an earlier run was stopped.

    Raises:
        TrainingError: the loss is no longer a number, or workers failed too often; see `_Failures`.
        ClusterError: Ray or the storage is out of reach, or the cluster is too small.
        DataError: the data set is not what its manifest says.
    """
    prediction = _Prediction(started=time.time())
    manifest = require_manifest(target.storage, data.folder)
    tracker.log_data(manifest.summary(), target.storage.uri(data.folder), context="training")
    ensure_ray(config, target.storage)
    fewest = config.execution.min_workers or config.execution.num_workers
    require_room(
        config,
        num_cpus=fewest * config.execution.cpus_per_worker,
        num_gpus=fewest * config.execution.use_gpu,
        settings="execution.num_workers, execution.cpus_per_worker, execution.use_gpu",
    )
    trained = _fit_on_workers(config, data, target, tracker, prediction)
    history: list[Metrics] = trained["history"]
    target.storage.write_json(target.path("history.json"), history)
    tracker.log_history(history)
    tracker.log_params({"num_parameters": trained["num_parameters"]})
    # MLflow's table of runs shows the last point of each curve, which is the last epoch's, not the best one's.
    tracker.log_metrics({"best/val/error": trained["val_error"], "best/epoch": trained["best_epoch"]})
    result = TrainResult(
        folder=target.name,
        weights_sha256=trained["weights_sha256"],
        val_error=trained["val_error"],
        with_validation=config.train.with_validation,
        best_epoch=trained["best_epoch"],
        epochs=history[-1]["epoch"],
        num_parameters=trained["num_parameters"],
        images_per_second=statistics.median_high(_speeds(history)),
        seconds=round(time.time() - prediction.started, 1),
        predicted_seconds=round(prediction.seconds, 1),
        peak_bytes=trained["peak_bytes"],
        predicted_peak_bytes=prediction.peak_bytes,
        limit_minutes=config.train.max_minutes if history[-1]["epoch"] < config.train.epochs else 0,
    )
    _log_bill(result, config.train.epochs, tracker)
    return result


def _speeds(history: Sequence[Metrics]) -> list[float]:
    """Images per second of each epoch; of one that was resumed after its last step, there is none."""
    return [speed for metrics in history if (speed := metrics["perf/images_per_second"])] or [0.0]


def _log_bill(result: TrainResult, num_epochs: int, tracker: Tracker) -> None:
    """Sends what the training cost, and what was predicted, to the tracker."""
    figures = {
        "perf/seconds": result.seconds,
        "perf/predicted_seconds": result.predicted_seconds,
        "perf/peak_megabytes": result.peak_bytes / 1e6,
        "perf/predicted_peak_megabytes": result.predicted_peak_bytes / 1e6,
    }
    tracker.log_metrics({name: value for name, value in figures.items() if value}, step=math.ceil(result.epochs))
    if result.unfinished:
        say(f"  {result.unfinished} of {num_epochs}; with a higher limit, the same command resumes")


@dataclass
class _Prediction:
    """What the first steps of a run promise for the whole stage.

    Attributes:
        started: when the stage did, as `time.time()`: the workers count from there too, in processes of their own.
        seconds, peak_bytes: of the stage and of a worker; 0 until the first steps are done.
    """

    started: float
    seconds: float = 0.0
    peak_bytes: int = 0

    def take(self, forecast: Forecast) -> None:
        """Takes a worker's forecast of what is left, and shows what the whole comes to."""
        self.seconds = time.time() - self.started + forecast.seconds_left + SECONDS_TO_END
        self.peak_bytes = forecast.peak_bytes
        say(f"  predicted: {self.seconds:.0f} s in all, {self.peak_bytes / 1e6:,.0f} MB a worker")


def _fit_on_workers(
    config: PipelineConfig, data: IngestResult, target: StageFolder, tracker: Tracker, prediction: _Prediction
) -> dict[str, Any]:
    """What the first worker returns, in as many attempts as it takes; each goes on from the newest checkpoint."""
    board = new_board()
    settings = {
        "config": config.model_dump(mode="json"),
        "storage": target.storage.root,
        "folder": target.name,
        "data_folder": data.folder,
        "token": target.lease.token if target.lease else "",
        "board": board,
        "started": prediction.started,
    }
    how, failures = config.execution, _Failures(config.execution, target)

    def ask(request: str) -> None:
        ray.get(board.ask.remote(request))

    if target.lease:
        target.lease.on_lost = lambda error: ask("stop")
    nodes: set[str] = set()
    with _showing(board, config.train.epochs, tracker, prediction, nodes):
        while True:
            target.require_held()
            num_workers = workers_to_start(how)
            if how.min_workers:
                say(f"  workers: {num_workers} of at most {how.num_workers}")
            nodes.clear()
            watch = watching_nodes(how, num_workers, nodes, lambda: ask("restart"))
            with stopping(lambda: ask("stop")):
                try:
                    with watch, target.scratch() as scratch:
                        return dict(_trainer(config, num_workers, settings, target, scratch).fit().return_value)
                except (
                    TrainingFailedError,
                    ray.exceptions.RayActorError,
                ) as error:  # the latter: of Ray Train's controller
                    failures.take(error)
            ask("")


def _trainer(
    config: PipelineConfig, num_workers: int, settings: dict[str, Any], target: StageFolder, scratch: str
) -> WorkersTrainer:
    """A trainer for one attempt. Ray keeps no checkpoint, so what it writes is of no use to another attempt."""
    how, storage = config.execution, target.storage
    return WorkersTrainer(
        _train_on_worker,
        is_own_ray=config.ray.address == "",
        settings=settings,
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=how.use_gpu,
            resources_per_worker={"CPU": how.cpus_per_worker} | ({"GPU": 1} if how.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=storage.path(scratch),
            storage_filesystem=None if storage.is_local else storage.filesystem,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )


class _Failures:
    """Decides whether a failed attempt is followed by another one.

    An error that would come again ends the training: one of this project's that is not `retryable`, or the same error of a
    worker twice without a new checkpoint between. Workers may die `execution.max_failures` times without a new checkpoint,
    which starts the count again. Workers that were asked to stop, or that found no room, do not count.
    """

    def __init__(self, how: ExecutionConfig, target: StageFolder):
        self._how, self._most, self._target = how, how.max_failures, target
        self._count, self._last, self._at = 0, "", self._newest()
        self._waiting: Waiting | None = None

    def take(self, error: Exception) -> None:
        """Says what failed, and returns if there is to be another attempt.

        Raises:
            RcnnError: there is not.
        """
        if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
            self._waiting = self._waiting or Waiting(self._how)
            self._waiting.say_and_check(self._how.min_workers or self._how.num_workers)
            return
        self._waiting = None
        faults = _faults_of(error)
        if any(isinstance(fault, Stopped) for fault in faults):
            return
        fault = _decisive(faults)
        if isinstance(fault, RcnnError) and not fault.retryable:
            raise fault from error
        text, newest = _last_line(fault), self._newest()
        if newest != self._at:
            self._count, self._last = 0, ""
        self._count += 1
        comes_again = text == self._last and not _has_died(fault)
        if comes_again and isinstance(fault, RcnnError):
            raise fault from error
        if self._count > self._most or comes_again:
            raise self._as_error(text, comes_again=comes_again) from error
        self._last, self._at = text, newest
        say(f"  the training failed ({text}) and resumes from the last checkpoint")

    def _as_error(self, text: str, *, comes_again: bool) -> TrainingError:
        if comes_again:
            what, remedy = f"failed twice at the same place with: {text}", "--debug shows the worker's traceback"
            if "memory" in text.lower():
                remedy = "Lower train.batch_size, or set execution.recompute to true"
            return TrainingError(what, where="the training", remedy=remedy)
        return TrainingError(
            f"workers failed more often than allowed without a new checkpoint; the last one with: {text}",
            where=f"execution.max_failures = {self._most}",
            remedy="Run the same command again to resume from the last checkpoint; --debug shows the worker's traceback",
            retryable=True,
        )

    def _newest(self) -> Record | None:
        return next(reversed(read_records(self._target)), None)


def _faults_of(error: Exception) -> list[Exception]:
    """What went wrong in each worker; Ray Train wraps the death of one in an error of its own."""
    faults = [*getattr(error, "worker_failures", {}).values()] or [error]
    return [getattr(fault, "health_check_failure", None) or fault for fault in faults]


def _decisive(faults: Sequence[Exception]) -> Exception:
    """Our own error, or else the death of a worker: what the others say then is that they lost it."""
    own = [fault for fault in faults if isinstance(fault, RcnnError)]
    if own:
        return min(own, key=lambda fault: fault.retryable)
    return next(filter(_has_died, faults), faults[0])


def _has_died(fault: Exception) -> bool:
    """Whether a worker's process or node is gone, rather than its code at fault."""
    return isinstance(fault, ray.exceptions.RayActorError | ray.exceptions.NodeDiedError) and not isinstance(
        fault, ray.exceptions.OutOfMemoryError
    )


def _last_line(fault: Exception) -> str:
    """The line of an error that says what it is."""
    lines = [line.strip() for line in str(fault).strip().splitlines() if line.strip()]
    return lines[-1] if lines and not _has_died(fault) else next(iter(lines), type(fault).__name__)


@contextmanager
def _showing(board: Any, num_epochs: int, tracker: Tracker, prediction: _Prediction, nodes: set[str]) -> Iterator[None]:
    """Sends the workers' notes to the screen and to the tracker while the body runs; `nodes` gets the ids of theirs."""
    progress = EpochProgress(num_epochs)

    def finish_epoch(metrics: Metrics) -> None:
        # The line last: if the storage cannot be written, the epoch comes again.
        tracker.log_metrics({k: v for k, v in metrics.items() if k != "epoch"}, step=math.ceil(metrics["epoch"]))
        progress.finish_epoch(metrics)

    try:
        handlers: dict[str, Callable[[Any], None]] = {
            "progress": progress.advance,
            "epoch": finish_epoch,
            "node": nodes.add,
            "said": say,
            "forecast": prediction.take,
        }
        with following(board, handlers):
            yield
    finally:
        progress.close()


def _train_on_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs. Returns the history of all epochs, those before a resumption included, and what was published."""
    import torch

    config = PipelineConfig.model_validate(settings["config"])
    torch.set_num_threads(config.execution.cpus_per_worker)
    board, storage, token = settings["board"], Storage(settings["storage"]), settings["token"]
    lease = Lease(storage, settings["folder"], token) if token else None
    target = StageFolder(storage, settings["folder"], lease=lease)
    is_first = ray.train.get_context().get_world_rank() == 0
    board.put.remote("node", ray.get_runtime_context().get_node_id())

    def note(kind: str, value: Any) -> None:
        if is_first:
            board.put.remote(kind, value)

    max_minutes = config.train.max_minutes
    if is_first:
        hand_on(lambda line: note("said", line))
    listener = Listener(board) if is_first else None
    state = fit(
        config,
        shared_on_node(lambda: training_data(config, storage, settings["data_folder"])),
        lambda metrics: note("epoch", metrics),
        checkpoints=CheckpointStore(target, keep=config.execution.keep_checkpoints),
        on_progress=lambda epochs_done: note("progress", epochs_done),
        on_forecast=lambda forecast: note("forecast", forecast),
        max_seconds=max(1.0, 60 * max_minutes - SECONDS_TO_END) if max_minutes else 0.0,
        seconds_spent=time.time() - settings["started"],
        is_stopping=lambda: bool(listener and listener.request),
    )
    if not is_first:
        return {}
    return {
        "history": state.history,
        "val_error": state.best["val_error"],
        "best_epoch": state.best["epoch"],
        "num_parameters": count_parameters(state.model),
        "weights_sha256": _publish_model(state, target),
        "peak_bytes": peak_bytes(choose_device(config.execution.use_gpu)),
    }


def _publish_model(state: TrainState, target: StageFolder) -> str:
    """Writes the best epoch's model to its final place; returns the SHA-256 of its weights."""
    with tempfile.TemporaryDirectory() as draft:
        state.save_best(Path(draft))
        target.require_held()
        target.storage.upload(Path(draft), target.path("model"))
        return hashlib.sha256(Path(draft, WEIGHTS).read_bytes()).hexdigest()
