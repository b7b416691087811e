"""One trial, as its process runs it: `fit` with the settings of its point.

In: a point of the search space. Out: a report to Ray Tune after each epoch, and a note on the driver's board.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rcnn import ray_session  # noqa: F401  (sets what Ray reads when it is imported)  # isort: skip

import ray
import ray.train
from ray import tune

from rcnn.config import PipelineConfig
from rcnn.errors import RcnnError, TrainingError
from rcnn.results import Choice
from rcnn.storage import Storage
from rcnn.train.loop import Metrics, fit, training_data
from rcnn.train.pace import Forecast, peak_bytes
from rcnn.tune.space import trial_config

WORST_ERROR = 1.0
SLACK, SECONDS_OF_GRACE = 20, 3600.0
"""Of a trial's time limit where `tune.trial_minutes` is 0. The first steps can be faster than later ones, which wait for rows
from the network or share the machine with more trials, and reports of short epochs take longer than the epochs."""
Report = Callable[[Metrics], None]


@dataclass(frozen=True)
class TrialInputs:
    """What all trials of a search share."""

    config: PipelineConfig
    storage: str
    data_folder: str
    scratch: str
    """A folder in the storage for what Ray writes."""
    board: Any


def run_trial(run: dict[str, Any], *, inputs: TrialInputs) -> None:
    """Trains with the settings of one point; `run` has its name, choice and seed.

    How it ended is in its last report: a rate too high is an answer, not a fault, and gets the worst error there is.
    """
    try:
        config = trial_config(inputs.config, Choice(run["choice"]), seed=run["seed"])
        if config.execution.num_workers > 1:
            _fit_on_workers(config, run, inputs)
        else:
            _fit_here(config, run, inputs, tune.report)
    except RcnnError as error:
        # What cannot pass is about the data or the settings: the trial ends without a report, and is not retried.
        ray.get(inputs.board.put.remote("fault" if error.retryable else "fatal", error))
        if error.retryable:
            raise


def _fit_here(config: PipelineConfig, run: dict[str, Any], inputs: TrialInputs, send: Report) -> None:
    """Trains in this process, as one worker or as one of several."""
    import torch

    torch.set_num_threads(config.execution.cpus_per_worker)
    started = time.monotonic()
    last: Metrics = {"epoch": 0, "val/error": WORST_ERROR}

    def report(metrics: Metrics) -> None:
        nonlocal last
        if metrics["epoch"] % 1:
            return  # the limit ended it in the middle of an epoch, and the others have no such error to compare
        last = metrics | {"peak_memory_mb": peak_bytes(torch.device("cpu")) / 1e6}
        inputs.board.put.remote("trial", (run["name"], Choice(run["choice"]), metrics))
        send(last)

    try:
        data = training_data(config, Storage(inputs.storage), inputs.data_folder)
        # All workers of a trial share the limit of `fit`: each by its own clock, one would leave the others waiting.
        fit(
            config,
            data,
            report,
            max_seconds=inputs.config.tune.trial_minutes * 60,
            limit_of=generous_limit,
            seconds_spent=time.monotonic() - started,
        )
        if last["epoch"] < config.train.epochs:
            send(last | {"out_of_time": True})
    except TrainingError:
        send(last | {"val/error": WORST_ERROR, "epoch": config.train.epochs, "diverged": True})


def generous_limit(forecast: Forecast) -> float:
    """Seconds after which a trial ends that has no limit of its own: far more than its own first steps promise."""
    return SECONDS_OF_GRACE + SLACK * forecast.seconds_left


def _fit_on_workers(config: PipelineConfig, run: dict[str, Any], inputs: TrialInputs) -> None:
    """Trains on several workers: a trainer inside the trial, which is how Ray's documentation combines Train and Tune.

    Raises:
        RcnnError: the error of a worker that has one; Ray's own would be retried, whatever caused it.
    """
    from ray.train.v2.api.exceptions import TrainingFailedError

    try:
        _trainer(config, run, inputs).fit()
    except TrainingFailedError as error:
        faults = [fault for fault in getattr(error, "worker_failures", {}).values() if isinstance(fault, RcnnError)]
        raise min(faults, key=lambda fault: fault.retryable, default=error) from error


def _trainer(config: PipelineConfig, run: dict[str, Any], inputs: TrialInputs) -> Any:
    from ray.train import RunConfig, ScalingConfig
    from ray.tune.integration.ray_train import TuneReportCallback

    from rcnn.train.ray_workers import WorkersTrainer

    storage, gpus = Storage(inputs.storage), inputs.config.tune.gpus_per_trial
    return WorkersTrainer(
        _run_worker,
        is_own_ray=config.ray.address == "",
        settings={"config": config, "run": run, "inputs": inputs},
        scaling_config=ScalingConfig(
            num_workers=config.execution.num_workers,
            use_gpu=config.execution.use_gpu,
            resources_per_worker={"CPU": config.execution.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            name=f"workers-of-{run['name']}",
            storage_path=storage.path(inputs.scratch),
            storage_filesystem=None if storage.is_local else storage.filesystem,
            callbacks=[TuneReportCallback()],
        ),
    )


def _run_worker(settings: dict[str, Any]) -> None:
    """One worker of a trial with several. Ray Train wants a report of each of them; the first one's goes to Tune."""
    is_first = ray.train.get_context().get_world_rank() == 0
    inputs: TrialInputs = settings["inputs"]
    if not is_first:
        inputs = TrialInputs(inputs.config, inputs.storage, inputs.data_folder, inputs.scratch, _NoBoard())
    _fit_here(settings["config"], settings["run"], inputs, ray.train.report)


class _NoBoard:
    """Drops the notes of all workers but the first: each would arrive once per worker."""

    class put:
        """Drops it."""

        @staticmethod
        def remote(kind: str, value: Any) -> None:
            """Drops it."""
