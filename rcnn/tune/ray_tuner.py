"""The tune stage: Ray Tune draws configurations, and ASHA stops the worse ones early.

In: a config and a data set. Out: the best K, T and learning rate, and a table of all trials. A trial is one process that
calls `fit` itself, without checkpoints: it is short, and an interrupted search repeats only the unfinished ones.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rcnn.ray_session import ensure_ray, require_room  # isort: skip  (sets what Ray reads)

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from rcnn.config import PipelineConfig
from rcnn.errors import RcnnError, TrainingError
from rcnn.progress import say
from rcnn.ray_board import following, new_board
from rcnn.results import Choice, IngestResult, Trial, TuneResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import Tracker, finish_failed
from rcnn.train.loop import Metrics, fit, training_data
from rcnn.tune.space import own_choice, require_searchable, trial_config

WORST_ERROR = 1.0


def run_tune(config: PipelineConfig, data: IngestResult, target: StageFolder, tracker: Tracker) -> TuneResult:
    """Searches for the K, T and learning rate with the lowest validation error.

    Raises:
        ConfigError: the network does not read what is searched.
        TrainingError: every trial failed.
        ClusterError: Ray or the storage is out of reach, or the cluster is too small for one trial.
        DataError: the data set is not what its manifest says.
    """
    require_searchable(config)
    ensure_ray(config, target.storage)
    require_room(
        config,
        num_cpus=config.tune.cpus_per_trial,
        num_gpus=config.tune.gpus_per_trial,
        settings="tune.cpus_per_trial, tune.gpus_per_trial",
    )
    board = new_board()
    runs = _TrialRuns(config, tracker)
    try:
        with following(board, {"trial": runs.show}):
            results = _tuner(config, data, target, board).fit()
        trials = tuple(sorted((_as_trial(result, config) for result in results), key=lambda trial: trial.name))
        runs.label(trials)
    except BaseException:
        for run in runs.open.values():
            finish_failed(run)
        raise
    runs.finish()
    return _best_of(trials, results, tracker)


class _TrialRuns:
    """The lines on the screen and the MLflow runs of the trials, one under the tune run for each."""

    def __init__(self, config: PipelineConfig, tracker: Tracker):
        self.config, self.tracker = config, tracker
        self.open: dict[str, Tracker] = {}
        self.failed: set[str] = set()

    def show(self, note: tuple[str, Choice, Metrics]) -> None:
        """Tells of an epoch of a trial."""
        name, choice, metrics = note
        epoch, val_error = int(metrics["epoch"]), metrics["val/error"]
        self._run(name, choice).log_metrics({k: v for k, v in metrics.items() if k != "epoch"}, step=epoch)
        say(f"  {name}  {choice!s:<22} epoch {epoch}/{self.config.tune.epochs}  val error {100 * val_error:.2f} %")

    def label(self, trials: tuple[Trial, ...]) -> None:
        """Tags each trial's run with how it ended, those that never came to an epoch included."""
        for trial in trials:
            if trial.outcome in ("diverged", "failed") or trial.name in self.open:
                self._run(trial.name, trial.choice).set_tags({"outcome": trial.outcome})
        self.failed = {trial.name for trial in trials if trial.outcome == "failed"}

    def finish(self) -> None:
        """Ends all runs."""
        for name, run in self.open.items():
            run.finish(failed=name in self.failed)

    def _run(self, name: str, choice: Choice) -> Tracker:
        if name not in self.open:
            self.open[name] = self.tracker.child(name)
            self.open[name].log_params(choice.model_dump())
        return self.open[name]


def _best_of(trials: tuple[Trial, ...], results: Any, tracker: Tracker) -> TuneResult:
    usable = [trial for trial in trials if trial.outcome in ("finished", "stopped early")]
    if not usable:
        faults = [str(result.error).strip().splitlines()[-1] for result in results if result.error]
        raise TrainingError(
            f"all {len(trials)} trials failed or diverged" + (f"; the first with: {faults[0]}" if faults else ""),
            where="tune",
            remedy="Lower tune.learning_rate_max, or try `rcnn train` alone with --debug",
        )
    best = min(usable, key=lambda trial: trial.val_error)
    tracker.set_tags({"best_trial": best.name, "best_choice": str(best.choice)})
    tracker.log_metrics({"val/error": best.val_error})
    return TuneResult(best=best.choice, best_trial=best.name, val_error=best.val_error, trials=trials)


def _tuner(config: PipelineConfig, data: IngestResult, target: StageFolder, board: Any) -> tune.Tuner:
    storage, settings = target.storage, config.tune
    trainable = tune.with_resources(
        tune.with_parameters(_run_trial, config=config, storage=storage.root, data_folder=data.folder, board=board),
        {"CPU": settings.cpus_per_trial, "GPU": settings.gpus_per_trial},
    )
    filesystem = None if storage.is_local else storage.filesystem
    path = storage.path(target.name)
    if tune.Tuner.can_restore(path, storage_filesystem=filesystem):
        say("  resuming the interrupted search")
        return tune.Tuner.restore(path, trainable, storage_filesystem=filesystem, restart_errored=True)
    return tune.Tuner(
        trainable,
        param_space={
            "k": tune.choice(list(settings.k)),
            "t": tune.choice(list(settings.t)),
            "learning_rate": tune.loguniform(settings.learning_rate_min, settings.learning_rate_max),
        },
        tune_config=tune.TuneConfig(
            metric="val/error",
            mode="min",
            num_samples=settings.num_trials,
            reuse_actors=True,  # a new process would import torch again
            search_alg=BasicVariantGenerator(
                points_to_evaluate=[own_choice(config).model_dump()],
                random_state=config.seed,
                max_concurrent=settings.max_concurrent_trials,  # Tune ignores its own setting where this class is given
            ),
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=settings.epochs,
                grace_period=settings.grace_epochs,
                reduction_factor=settings.reduction_factor,
            ),
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=os.path.basename(target.name),
            storage_path=storage.path(os.path.dirname(target.name)),
            storage_filesystem=filesystem,
            verbose=0,
        ),
    )


def _trial_name(trial: Any) -> str:
    """trial-00, trial-01, ...: the same on a restored search, unlike Ray's own names."""
    return f"trial-{int(trial.trial_id.rsplit('_', 1)[-1]):02d}"


def _run_trial(drawn: dict[str, Any], *, config: PipelineConfig, storage: str, data_folder: str, board: Any) -> None:
    """What a trial's process runs."""
    import torch

    torch.set_num_threads(config.tune.cpus_per_trial)
    choice = Choice(**drawn)
    config = trial_config(config, choice)
    name = tune.get_context().get_trial_name()

    def report(metrics: Metrics, save: Callable[[Path], None]) -> None:
        board.put.remote("trial", (name, choice, metrics))
        tune.report(metrics)

    try:
        data = training_data(config, Storage(storage), data_folder)
        fit(config, data, report)
    except TrainingError:
        # A rate too high is an answer, not a fault: the worst error there is; the search continues.
        tune.report({"epoch": config.train.epochs, "val/error": WORST_ERROR, "diverged": True})
    except RcnnError as error:
        ray.get(board.put.remote("fatal", error))  # it is about the data, which all trials share
        raise


def _as_trial(result: Any, config: PipelineConfig) -> Trial:
    metrics = result.metrics or {}
    epochs = int(metrics.get("epoch", 0))
    if result.error or not epochs:
        outcome = "failed"
    elif metrics.get("diverged"):
        outcome = "diverged"
    else:
        outcome = "finished" if epochs >= config.tune.epochs else "stopped early"
    return Trial(
        name=os.path.basename(result.path),
        choice=Choice(**result.config),
        val_error=metrics.get("val/error", WORST_ERROR),
        epochs=epochs,
        outcome=outcome,
    )
