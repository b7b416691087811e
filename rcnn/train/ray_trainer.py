"""The train stage: `fit` on Ray Train workers, with checkpoints in the storage.

In: a config and a data set. Out: a finished model folder. A run of the same name resumes from its last checkpoint.
"""

import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcnn.ray_session import ensure_ray, interruptible, require_room  # isort: skip  (sets what Ray reads)

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from rcnn.config import PipelineConfig
from rcnn.data.manifest import require_manifest
from rcnn.errors import RcnnError, TrainingError
from rcnn.model.build import count_parameters
from rcnn.progress import EpochProgress, hand_on, say
from rcnn.ray_board import following, new_board
from rcnn.results import IngestResult, TrainResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import Tracker
from rcnn.train.checkpoint import DESCRIPTION, WEIGHTS, load_model, read_epochs_done
from rcnn.train.execution import choose_device
from rcnn.train.loop import Metrics, fit, training_data
from rcnn.train.pace import Forecast, peak_bytes
from rcnn.train.ray_workers import WorkersTrainer

SECONDS_TO_END = 2.0  # from the last epoch to the result: Ray Train ends, the best model is copied


def run_train(config: PipelineConfig, data: IngestResult, target: StageFolder, tracker: Tracker) -> TrainResult:
    """Trains the model that `config` describes; resumes where an earlier run was stopped.

    Raises:
        TrainingError: the loss is no longer a number, or workers failed more often than `execution.max_failures`.
        ClusterError: Ray or the storage is out of reach, or the cluster is too small.
        DataError: the data set is not what its manifest says.
    """
    prediction = _Prediction(started=time.time())
    manifest = require_manifest(target.storage, data.folder)
    tracker.log_data(manifest.summary(), target.storage.uri(data.folder), context="training")
    ensure_ray(config, target.storage)
    require_room(
        config,
        num_cpus=config.execution.num_workers * config.execution.cpus_per_worker,
        num_gpus=config.execution.num_workers * config.execution.use_gpu,
        settings="execution.num_workers, execution.cpus_per_worker, execution.use_gpu",
    )
    trained = _fit_on_workers(config, data, target, tracker, prediction)
    history: list[Metrics] = trained.return_value["history"]
    checkpoint, best = _best_checkpoint(trained.best_checkpoints, history)
    num_parameters, weights_sha256 = _publish_model(checkpoint, target)
    target.storage.write_json(target.path("history.json"), history)
    tracker.log_params({"num_parameters": num_parameters})
    result = TrainResult(
        folder=target.name,
        weights_sha256=weights_sha256,
        val_error=best["val/error"],
        best_epoch=best["epoch"],
        epochs=history[-1]["epoch"],
        num_parameters=num_parameters,
        images_per_second=sorted(metrics["perf/images_per_second"] for metrics in history)[len(history) // 2],
        seconds=round(time.time() - prediction.started, 1),
        predicted_seconds=round(prediction.seconds, 1),
        peak_bytes=trained.return_value["peak_bytes"],
        predicted_peak_bytes=prediction.peak_bytes,
        limit_minutes=config.train.max_minutes if history[-1]["epoch"] < config.train.epochs else 0,
    )
    _log_bill(result, config.train.epochs, tracker)
    return result


def _best_checkpoint(kept: Sequence[tuple[Any, Metrics]], history: Sequence[Metrics]) -> tuple[Any, Metrics]:
    """The checkpoint with the lowest validation error, and its metrics.

    One from the middle of an epoch, where a time limit ended an earlier attempt, counts only if this attempt ended there:
    the model of a run that was resumed is that of a run without a limit.
    """
    of_run = {metrics["epoch"] for metrics in history}
    in_run = [each for each in kept if each[1]["epoch"] in of_run]
    return min(in_run or kept, key=lambda each: each[1]["val/error"])


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
) -> Any:
    board = new_board()
    storage = target.storage
    trainer = WorkersTrainer(
        _train_on_worker,
        is_own_ray=config.ray.address == "",
        settings={
            "config": config.model_dump(mode="json"),
            "storage": storage.root,
            "data_folder": data.folder,
            "board": board,
            "started": prediction.started,
        },
        scaling_config=ScalingConfig(
            num_workers=config.execution.num_workers,
            use_gpu=config.execution.use_gpu,
            resources_per_worker={"CPU": config.execution.cpus_per_worker}
            | ({"GPU": 1} if config.execution.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=os.path.basename(target.name),
            storage_path=storage.path(os.path.dirname(target.name)),
            storage_filesystem=None if storage.is_local else storage.filesystem,
            failure_config=FailureConfig(max_failures=config.execution.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.execution.keep_checkpoints,
                checkpoint_score_attribute="val/error",
                checkpoint_score_order="min",
            ),
        ),
    )
    with _showing(board, config.train.epochs, tracker, prediction):
        try:
            with interruptible():
                return trainer.fit()
        except TrainingFailedError as error:
            raise _as_training_error(error) from error


@contextmanager
def _showing(board: Any, num_epochs: int, tracker: Tracker, prediction: _Prediction) -> Iterator[None]:
    """Sends the workers' notes to the screen and to the tracker while the body runs."""
    progress = EpochProgress(num_epochs)

    def finish_epoch(metrics: Metrics) -> None:
        # The line last: if MLflow is away, the epoch comes again.
        tracker.log_metrics({k: v for k, v in metrics.items() if k != "epoch"}, step=math.ceil(metrics["epoch"]))
        progress.finish_epoch(metrics)

    def resumed(epochs_done: int) -> None:
        say(f"  resuming after epoch {epochs_done} of {num_epochs}, from the last checkpoint")

    try:
        handlers: dict[str, Callable[[Any], None]] = {
            "progress": progress.advance,
            "epoch": finish_epoch,
            "resumed": resumed,
            "said": say,
            "forecast": prediction.take,
        }
        with following(board, handlers):
            yield
    finally:
        progress.close()


def _as_training_error(error: Exception) -> RcnnError:
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    fault = next(iter(failures.values()), error)
    last_line = str(fault).strip().splitlines()[-1:] or [type(fault).__name__]
    return TrainingError(
        f"the workers failed more often than allowed; the last one with: {last_line[0]}",
        where="execution.max_failures",
        remedy="Run the same command again to resume from the last checkpoint; --debug shows the worker's traceback",
        retryable=True,
    )


def _train_on_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs. Returns the history of all epochs, those before a resumption included, and its peak memory."""
    import torch

    config = PipelineConfig.model_validate(settings["config"])
    torch.set_num_threads(config.execution.cpus_per_worker)
    board = settings["board"]
    is_first = ray.train.get_context().get_world_rank() == 0

    def note(kind: str, value: Any) -> None:
        if is_first:
            board.put.remote(kind, value)

    def report(metrics: Metrics, save: Callable[[Path], None]) -> None:
        note("epoch", metrics)
        if not is_first:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    max_minutes = config.train.max_minutes
    if is_first:
        hand_on(lambda line: note("said", line))
    try:
        data = training_data(config, Storage(settings["storage"]), settings["data_folder"])
        checkpoint = ray.train.get_checkpoint()
        with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
            if folder:
                note("resumed", read_epochs_done(Path(folder)))
            resume_from = Path(folder) if folder else None
            state = fit(
                config,
                data,
                report,
                resume_from=resume_from,
                on_progress=lambda epochs_done: note("progress", epochs_done),
                on_forecast=lambda forecast: note("forecast", forecast),
                max_seconds=max(1.0, 60 * max_minutes - SECONDS_TO_END) if max_minutes else 0.0,
                seconds_spent=time.time() - settings["started"],
            )
    except RcnnError as error:
        # A single worker would fail the same way on a retry: it ends, and the driver raises its error. With several, the
        # others must not wait for it.
        ends_all = config.execution.num_workers == 1 and not error.retryable
        ray.get(board.put.remote("fatal" if ends_all else "fault", error))
        if ends_all:
            return {}
        raise
    return {"history": state.history, "peak_bytes": peak_bytes(choose_device(config.execution.use_gpu))}


def _publish_model(checkpoint: Any, target: StageFolder) -> tuple[int, str]:
    """Copies the best checkpoint's model to its final place; returns its parameters' number and its weights' SHA-256."""
    with checkpoint.as_directory() as source, tempfile.TemporaryDirectory() as draft:
        for file in (WEIGHTS, DESCRIPTION):
            shutil.copyfile(Path(source, file), Path(draft, file))
        target.storage.upload(Path(draft), target.path("model"))
        weights = Path(draft, WEIGHTS).read_bytes()
        return count_parameters(load_model(Path(draft))[0]), hashlib.sha256(weights).hexdigest()
