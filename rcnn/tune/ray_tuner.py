"""The tune stage: Ray Tune runs the trials, and stops the worse ones early.

In: a config and a data set. Out: the best point of `tune.space`, and a table of all trials. A trial calls `fit`, without
checkpoints: it is short, so a trial that was interrupted starts over. What has ended is in the ledger (`ledger.py`), and an
interrupted or extended search starts Ray Tune with what is left. Tune's own folder is deleted.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rcnn.ray_session import ensure_ray, require_room  # isort: skip  (sets what Ray reads)

import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule
from ray.tune.search import ConcurrencyLimiter, Searcher

from rcnn.config import PipelineConfig
from rcnn.data.manifest import require_manifest
from rcnn.errors import ConfigError, LeaseLost, RcnnError
from rcnn.progress import say
from rcnn.ray_board import following, new_board
from rcnn.results import Choice, IngestResult, Outcome, TuneResult
from rcnn.storage import StageFolder
from rcnn.text import counted
from rcnn.tracking import Tracker, finish_failed
from rcnn.train.loop import Metrics
from rcnn.tune.budget import Budget
from rcnn.tune.ledger import Record, read_records, write_record, write_table
from rcnn.tune.plots import write_pictures
from rcnn.tune.ray_trial import WORST_ERROR, TrialInputs, run_trial
from rcnn.tune.resources import PROCESS_BYTES, Room, room_for_trials
from rcnn.tune.screen import SearchScreen
from rcnn.tune.search import (
    NUM_STARTUP_TRIALS,
    NewPoints,
    PlannedTrial,
    coverage,
    lost_too_many,
    repeats_left,
    result_of,
    trials_left,
)
from rcnn.tune.space import Domain, Interval, Point, Space, require_searchable, trial_config

METRIC, MODE = "val/error", "min"
MAX_RETRIES = 2  # of a failed trial
MAX_FAULT = 200  # characters of a failed trial's line


def run_tune(config: PipelineConfig, data: IngestResult, target: StageFolder, tracker: Tracker) -> TuneResult:
    """Searches `tune.space` for the point with the lowest validation error.

    Resumes an interrupted search, and extends a finished one: no trial that has ended is trained again.

    Raises:
        ConfigError: the network does not read what is searched, or a point's settings exclude each other.
        TrainingError: more than half of the trials failed, or all diverged.
        ClusterError: Ray or the storage is out of reach, or the cluster is too small for one trial.
        DataError: the data set is not what its manifest says.
    """
    require_searchable(config)
    return _run_attempt(_Search(config, data, target, tracker))


def _run_attempt(search: "_Search") -> TuneResult:
    config, target, tracker = search.config, search.target, search.tracker
    manifest = require_manifest(target.storage, search.data.folder)
    tracker.log_data(manifest.summary(), target.storage.uri(search.data.folder), context="training")
    if line := coverage(config):
        say(f"  {line}")
    try:
        search.close_left_runs()
        search.run_trials(trials_left(config, search.records), _scheduler(config, search.records.values()))
        search.run_trials(repeats_left(config, search.records), FIFOScheduler())
        ended = sorted([*search.records.values(), *search.lost.values()], key=lambda each: (len(each.name), each.name))
        result = result_of(config, target, ended, was_cut=search.was_cut)
        search.close()
    except LeaseLost:
        raise  # the runs of the trials belong to the process that took over
    except BaseException:
        search.fail()
        raise
    write_table(target, ended)
    write_pictures(config, target, ended, tracker)
    tracker.set_tags({"best_trial": result.best_trial, "best_choice": str(result.best)})
    tracker.log_metrics({METRIC: result.val_error})
    return result


class _Search:
    """One attempt at a search: what has ended, in the ledger and here, and the MLflow run of each trial."""

    def __init__(self, config: PipelineConfig, data: IngestResult, target: StageFolder, tracker: Tracker):
        self.config, self.data, self.target, self.tracker = config, data, target, tracker
        in_ledger = read_records(target)
        self.records = {name: each for name, each in in_ledger.items() if each.has_ended(config.tune.trial_minutes)}
        self.num_planned = len(self.records)
        """Trials that have ended, or that this attempt starts."""
        self.lost: dict[str, Record] = {}
        """Trials that failed or were cut off: not in the ledger, so that the next attempt trains them."""
        self.ended_now: set[str] = set()
        self.was_cut = False
        self.budget = Budget(target, max_minutes=config.tune.max_minutes)
        self.board: Any = None
        self.fatal: list[RcnnError] = []
        """Errors that every trial would meet."""
        self.seeds: dict[str, int] = {}
        """Of the trials that this attempt started."""
        self.tracked: dict[str, Tracker] = {}
        self.labelled: set[str] = set()
        """Trials whose MLflow run has ended."""

    def run_trials(self, planned: Sequence[PlannedTrial], scheduler: Any) -> None:
        """Runs trials until they have ended, or the search must."""
        if not planned or self.was_cut:
            return
        if self.budget.is_spent():  # by earlier attempts
            self._cut()
            return
        room = self._prepare()
        self.num_planned = len(self.records) + len(planned)
        if self.records and not self.ended_now:
            say(f"  resuming: {len(self.records)} trials have ended, {len(planned)} are left")
        say(f"  {room.reason}")
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its tracebacks; a failed trial has a line of ours
        self.board = new_board()
        with (
            SearchScreen(self.config, self.records.values(), num_planned=len(planned), num_at_once=room.num_trials,
                         num_rows=self.num_rows) as screen,
            following(
                self.board,
                {
                    "start": self._note_start,
                    "trial": lambda note: self._note_epoch(screen, *note),
                    "end": self._note_end,
                },
            ) as self.fatal,
            self.target.scratch() as folder,
            _credentials_kept_here(),
        ):  # fmt: skip
            if self.target.lease:
                self.target.lease.on_lost = self.fatal.append
            recorder = _Recorder(self, screen)
            inputs = TrialInputs(self.config, self.target.storage.root, self.data.folder, folder, self.board)
            _tuner(inputs, room, planned, scheduler, recorder, self).fit()
            recorder.finish()
        self.budget.note()
        if self.was_cut:
            self._cut()

    def _cut(self) -> None:
        self.was_cut = True
        say(
            f"  the search ends with its best result so far: it has used {self.budget.minutes_used:.1f} min in all, and "
            f"tune.max_minutes is {self.config.tune.max_minutes:g}; with more, the same command resumes it"
        )

    def keep(self, record: Record) -> None:
        """Notes how a trial ended: in the ledger, unless the next attempt should train it again."""
        self.ended_now.add(record.name)
        if record.outcome in ("failed", "cut off"):
            self.lost[record.name] = record
        else:
            write_record(self.target, record)
            self.records[record.name] = record
            self.lost.pop(record.name, None)
        self.board.put.remote("end", record)  # the reader of the board is the one thread that writes to MLflow

    def must_stop(self) -> bool:
        """Whether the time is up, too many trials failed, or one met an error that all would meet."""
        self.was_cut = self.budget.is_spent() or self.was_cut
        num_failed = sum(record.outcome == "failed" for record in self.lost.values())
        return self.was_cut or bool(self.fatal) or lost_too_many(num_failed, self.num_planned)

    def close_left_runs(self) -> None:
        """Ends the MLflow runs that a killed attempt left: as the ledger says, or as failed where the trial had not ended."""
        self.tracker.close_children({name: {"outcome": record.outcome} for name, record in self.records.items()})

    def close(self) -> None:
        """Ends the MLflow runs of the trials whose end is not noted there yet."""
        for record in (*self.records.values(), *self.lost.values()):
            if record.name in self.ended_now - self.labelled:
                self._note_end(record)

    def fail(self) -> None:
        """Ends the MLflow runs of a search that failed: those of trials that have ended as `close` does."""
        with suppress(RcnnError):
            self.close()
        for name, run in self.tracked.items():
            if name not in self.labelled:
                finish_failed(run)

    def _prepare(self) -> Room:
        """Starts Ray, and finds out what there is room for."""
        tune_, manifest = self.config.tune, require_manifest(self.target.storage, self.data.folder)
        self.num_rows = min(tune_.num_rows or self.config.train.num_rows or 10**9, manifest.splits["train"].rows)
        ensure_ray(self.config, self.target.storage)
        require_room(
            self.config,
            num_cpus=tune_.cpus_per_trial * tune_.workers_per_trial,
            num_gpus=tune_.gpus_per_trial * tune_.workers_per_trial,
            settings="tune.cpus_per_trial, tune.gpus_per_trial, tune.workers_per_trial",
        )
        return room_for_trials(self.config, manifest, [node["Resources"] for node in ray.nodes() if node["Alive"]])

    def _note_start(self, note: tuple[str, Choice, int]) -> None:
        self._tracked(*note)

    def _note_epoch(self, screen: SearchScreen, name: str, choice: Choice, metrics: Metrics) -> None:
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        seed = self.seeds.get(name, self.config.seed)  # the note of its start may come after this one
        self._tracked(name, choice, seed).log_metrics(values, step=int(metrics["epoch"]))
        screen.show_epoch(name, choice, metrics)  # last: if the storage cannot be written, this handler is retried

    def _note_end(self, record: Record) -> None:
        """Labels and ends the MLflow run of a trial, also of one that finished no epoch."""
        run = self._tracked(record.name, record.choice, record.seed)
        run.set_tags({"outcome": record.outcome})
        run.describe(_described(record))
        run.finish(failed=record.outcome == "failed")
        self.labelled.add(record.name)

    def _tracked(self, name: str, choice: Choice, seed: int) -> Tracker:
        if name not in self.tracked:
            try:
                config = trial_config(self.config, choice, seed=seed)
            except ConfigError:  # which the trial itself reports
                config = None
            self.tracked[name] = self.tracker.child(name, config)
            self.tracked[name].describe(f"{choice}, seed {seed}")
        return self.tracked[name]


def _described(record: Record) -> str:
    """A trial in a sentence, for its MLflow run."""
    error = f"{100 * record.val_error:.2f} % validation error" if record.is_usable else record.fault or "no error"
    epochs, outcome = counted(record.epochs, "epoch"), record.outcome
    return f"{record.choice}, seed {record.seed}: {error} after {epochs} in {record.seconds:.0f} s ({outcome})"


def _tuner(
    inputs: TrialInputs,
    room: Room,
    planned: Sequence[PlannedTrial],
    scheduler: Any,
    recorder: "_Recorder",
    search: _Search,
) -> tune.Tuner:
    settings, storage = inputs.config.tune, search.target.storage
    resources = {"CPU": settings.cpus_per_trial, "GPU": settings.gpus_per_trial, "memory": room.memory_bytes}
    has_workers = settings.workers_per_trial > 1
    if has_workers:
        # The trial itself only waits, and its workers take the cores: a share of one here would keep the last from starting.
        resources = {"memory": PROCESS_BYTES}
    searcher = _Queue(inputs.config, planned, search.records.values())
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, inputs=inputs), resources),
        tune_config=tune.TuneConfig(
            num_samples=len(planned),
            reuse_actors=not has_workers,  # a new process would import torch again
            search_alg=ConcurrencyLimiter(searcher, max_concurrent=room.num_trials),
            scheduler=scheduler,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=storage.path(inputs.scratch),
            storage_filesystem=None if storage.is_local else storage.filesystem,
            failure_config=tune.FailureConfig(max_failures=MAX_RETRIES),
            callbacks=[recorder],
            stop=_Stopper(search),
            verbose=0,
        ),
    )


@contextmanager
def _credentials_kept_here() -> Iterator[None]:
    """Keeps Ray Tune from handing on the driver's AWS keys: it does so in the trials' command lines, where `ps` shows them.

    Trials on our own Ray have the driver's variables all the same. The nodes of a cluster need credentials of their own anyway,
    since Ray Train hands none on.
    """
    credentials = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE -= credentials
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE |= credentials


def _name_of(trial: Any) -> str:
    return str(trial.config["name"])


class _Unsaved:
    """What Ray Tune writes beside its state, which is never restored."""

    def __reduce__(self) -> tuple:
        return object, ()


class _Stopper(_Unsaved, tune.Stopper):
    """Ends the search at its deadline, or when too many trials failed."""

    def __init__(self, search: _Search):
        self.search = search

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stops a single trial: that is the scheduler's work."""
        return False

    def stop_all(self) -> bool:
        """Asked in each round of Ray Tune's loop."""
        return self.search.must_stop()


class _Recorder(_Unsaved, tune.Callback):
    """Makes a record of each trial as it ends."""

    def __init__(self, search: _Search, screen: SearchScreen):
        self.search, self.screen = search, screen
        self.running: dict[str, Any] = {}
        self.val_errors: dict[str, list[float]] = {}
        self.speeds: dict[str, list[float]] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Remembers it: a retry starts from the first epoch."""
        name, seed = _name_of(trial), trial.config["seed"]
        self.search.seeds[name] = seed
        self.search.board.put.remote("start", (name, Choice(trial.config["choice"]), seed))
        self.running[name], self.val_errors[name], self.speeds[name] = trial, [], []

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Keeps the epoch's error; the report that a trial is out of time or diverged is not an epoch."""
        if "diverged" not in result and "out_of_time" not in result:
            self.val_errors[_name_of(trial)].append(float(result[METRIC]))
            self.speeds[_name_of(trial)].append(float(result["perf/images_per_second"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Writes the record, before anything else is done with the trial."""
        self._end(trial, _outcome(trial.last_result, len(self.val_errors[_name_of(trial)]), self.search.config))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Says why it failed, after its retries."""
        self._end(trial, "failed", _fault_of(trial))

    def finish(self) -> None:
        """Marks the trials that were running when the search ended."""
        for trial in list(self.running.values()):
            self._end(trial, "cut off")

    def _end(self, trial: Any, outcome: Outcome, fault: str = "") -> None:
        name = _name_of(trial)
        errors, speeds = self.val_errors[name], sorted(self.speeds[name])
        self.running.pop(name, None)
        if outcome == "failed":
            fault = fault or "it ended without a report"
        record = Record(
            name=name,
            choice=Choice(trial.config["choice"]),
            seed=trial.config["seed"],
            val_error=errors[-1] if errors and outcome != "diverged" else WORST_ERROR,
            epochs=len(errors),
            outcome=outcome,
            seconds=round(float((trial.last_result or {}).get("time_total_s", 0.0)), 1),
            images_per_second=round(speeds[len(speeds) // 2], 1) if speeds else 0.0,
            val_errors=tuple(errors),
            peak_memory_mb=round(float((trial.last_result or {}).get("peak_memory_mb", 0.0)), 1),
            fault=fault,
            minutes_allowed=self.search.config.tune.trial_minutes,
        )
        self.search.keep(record)
        self.screen.show_end(record)


def _outcome(last: dict[str, Any] | None, num_epochs: int, config: PipelineConfig) -> Outcome:
    last = last or {}
    if last.get("diverged"):
        return "diverged"
    if last.get("out_of_time"):
        return "out of time"
    if not num_epochs:
        return "failed"
    return "finished" if num_epochs >= config.tune.epochs else "stopped early"


def _fault_of(trial: Any) -> str:
    """The last line of the error that ended a trial; Ray's own errors begin with what happened."""
    error = trial.get_pickled_error() if trial.pickled_error_file else None
    lines = [line.strip() for line in str(error or trial.get_error() or "").splitlines() if line.strip()]
    is_own = bool(error) and type(error).__name__.startswith("RayTaskError")
    return (lines[-1 if is_own else 0] if lines else "the trial failed")[:MAX_FAULT].rstrip(".")


class _Queue(Searcher):
    """Hands the planned trials to Ray Tune in their order. Those without a choice get one of Optuna's, from what is known then.

    No configuration is handed out twice.
    """

    def __init__(self, config: PipelineConfig, planned: Sequence[PlannedTrial], records: Iterable[Record]):
        super().__init__(metric=METRIC, mode=MODE)
        known = [record for record in records if record.seed == config.seed]
        self.planned = list(planned)
        self.choices: dict[str, Choice] = {}
        fixed = [trial.choice for trial in planned if trial.choice]
        self.points = NewPoints(config, [*(record.choice for record in known), *fixed])
        self.optuna: Any = _optuna_search(config, len(known)) if len(fixed) < len(planned) else None
        for record in known:
            self._learn(record.choice, record.val_error)

    def suggest(self, trial_id: str) -> Any:
        """The next trial."""
        if not self.planned:
            return Searcher.FINISHED
        trial = self.planned.pop(0)
        self.choices[trial_id] = trial.choice or self.points.take(lambda number: self._ask(f"{trial_id} {number}"))
        return {"name": trial.name, "choice": self.choices[trial_id].root, "seed": trial.seed}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Lets Optuna learn from it."""
        if result and METRIC in result and not error:  # a trial that failed may have no report
            self._learn(self.choices[trial_id], float(result[METRIC]))

    def _ask(self, ask_id: str) -> Point:
        """A point of Optuna's. It forgets having given it, since the point may be known, and learns it with its error."""
        point: Point = self.optuna.suggest(ask_id)
        self.optuna.on_trial_complete(ask_id, error=True)
        return point

    def _learn(self, choice: Choice, val_error: float) -> None:
        if self.optuna:
            self.optuna.add_evaluated_point(choice.root, val_error)

    def save(self, checkpoint_path: str) -> None:
        """Ray Tune wants a file; the ledger holds what the next attempt reads."""
        Path(checkpoint_path).touch()


def _optuna_search(config: PipelineConfig, num_known: int) -> Any:
    """Optuna's search over the space, before it has learned anything."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Another seed for each number of known trials: the same one would suggest what an earlier attempt has tried.
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=NUM_STARTUP_TRIALS, seed=(config.seed * 1_000_003 + num_known) % 2**32
    )
    space = {name: _distribution(domain) for name, domain in Space(config).domains.items()}
    return OptunaSearch(space, metric=METRIC, mode=MODE, sampler=sampler)


def _distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(domain, Interval):
        return CategoricalDistribution(domain.values() or ())
    high: Any = domain.nearest(domain.high)  # Optuna warns of an end that no step reaches
    if domain.is_whole:
        return IntDistribution(int(domain.low), high, log=domain.is_log, step=int(domain.step) or 1)
    return FloatDistribution(domain.low, high, log=domain.is_log, step=domain.step or None)


def _scheduler(config: PipelineConfig, records: Iterable[Record]) -> Any:
    """What stops the worse trials, having seen the epochs of those that have ended."""
    settings = config.tune
    if settings.early_stopping == "none":
        return FIFOScheduler()
    shared = {"time_attr": "epoch", "metric": METRIC, "mode": MODE, "grace_period": settings.grace_epochs}
    if settings.early_stopping == "asha":
        scheduler = ASHAScheduler(**shared, max_t=settings.epochs, reduction_factor=settings.reduction_factor)
    else:
        # The rule would also pause trials to let others catch up, and without a checkpoint a paused trial starts over.
        scheduler = MedianStoppingRule(**shared, min_time_slice=float("inf"))
    for record in records:
        _replay(scheduler, record)
    return scheduler


class _Past:
    """A trial of an earlier attempt, as a scheduler knows it."""

    def __init__(self, name: str):
        self.trial_id = name


def _replay(scheduler: Any, record: Record) -> None:
    past, results = _Past(record.name), []
    scheduler.on_trial_add(None, past)
    for epoch, error in enumerate(record.val_errors, start=1):
        results.append({"epoch": epoch, METRIC: error})
        scheduler.on_trial_result(None, past, results[-1])
    if results:
        scheduler.on_trial_complete(None, past, results[-1])
