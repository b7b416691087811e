"""Which trials are still to be run, and which one is the best of those that have ended.

In: a config and the records of the ledger. Out: trials to start; the stage's result. Nothing here needs Ray.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rcnn.config import PipelineConfig
from rcnn.errors import TrainingError
from rcnn.results import MAX_LISTED, Choice, TuneResult
from rcnn.storage import StageFolder
from rcnn.text import counted
from rcnn.tune.ledger import Record
from rcnn.tune.space import Point, Space, key_of_point, num_trials_wanted

NUM_STARTUP_TRIALS = 5
"""Random points before Optuna's estimator decides. Its own default, 10, is more than most searches here have trials."""
MAX_REPEATS = 20
"""Known points that Optuna may suggest in a row: it has no memory of them, and repeats the best ones of a small space."""


@dataclass(frozen=True)
class PlannedTrial:
    """A trial to start. Without a choice, the searcher makes one."""

    name: str
    choice: Choice | None
    seed: int


def trial_name(number: int) -> str:
    """trial-00, trial-01, ..."""
    return f"trial-{number:02d}"


def trials_left(config: PipelineConfig, records: Mapping[str, Record]) -> list[PlannedTrial]:
    """The trials of the search that have not ended yet; with `tpe`, those after the first have no choice yet."""
    tune = config.tune
    wanted = num_trials_wanted(config)
    num_fixed = min(wanted, NUM_STARTUP_TRIALS) if tune.search == "tpe" else wanted
    points = Space(config).first_points(num_fixed, search=tune.search)
    choices = [Choice(point) for point in points] + [None] * (wanted - num_fixed)
    planned = [PlannedTrial(trial_name(number), choice, config.seed) for number, choice in enumerate(choices)]
    return [trial for trial in planned if trial.name not in records]


class NewPoints:
    """Points that have no trial yet.

    Args:
        config: has the space.
        known: the points that have one.
    """

    def __init__(self, config: PipelineConfig, known: Iterable[Choice]):
        self.space, self.taken = Space(config), {key_of_point(choice.root) for choice in known}

    def take(self, suggest: Callable[[int], Point]) -> Choice:
        """The first new point that is suggested or, after `MAX_REPEATS` known ones, the first of a random search.

        Args:
            suggest: called with 0, 1, ...; its points may miss those of the space by a rounding.
        """
        for number in range(MAX_REPEATS):
            point = self.space.nearest(suggest(number))
            if self._is_new(point):
                break
        else:
            points = self.space.first_points(len(self.taken) + 1, search="random")
            point = next(point for point in points if self._is_new(point))
        self.taken.add(key_of_point(point))
        return Choice(point)

    def _is_new(self, point: Point) -> bool:
        return key_of_point(point) not in self.taken


def coverage(config: PipelineConfig) -> str:
    """How much of a space that has an end the search tries, where that is not what its settings lead to expect."""
    size, num_trials = Space(config).size, config.tune.num_trials
    if size is None or size == num_trials:
        return ""
    if size < num_trials:
        return f"tune.space has {counted(size, 'point')}, fewer than tune.num_trials = {num_trials}: each is tried once"
    if config.tune.search == "grid":
        return f"tune.num_trials = {num_trials} ends the grid after {num_trials} of its {size:,} points"
    return ""


def rungs_of(config: PipelineConfig) -> list[int]:
    """The epochs after which ASHA compares trials and stops the worse ones; none with another rule."""
    tune, rungs = config.tune, []
    epoch = tune.grace_epochs if tune.early_stopping == "asha" else tune.epochs + 1
    while epoch <= tune.epochs:
        rungs.append(epoch)
        epoch *= tune.reduction_factor
    return rungs


def searched(config: PipelineConfig, records: Mapping[str, Record]) -> list[Record]:
    """The records of the search itself: one for each configuration, in order."""
    return [record for record in records.values() if not _is_repeat(record, config)]


def _is_repeat(record: Record, config: PipelineConfig) -> bool:
    return record.seed != config.seed


def finalists(config: PipelineConfig, records: Mapping[str, Record]) -> list[Record]:
    """The best configurations, to be trained with several seeds; of those that ran to the end, where there are any."""
    usable = [record for record in searched(config, records) if record.is_usable]
    complete = [record for record in usable if record.outcome == "finished"] or usable
    return sorted(complete, key=lambda record: record.val_error)[: config.tune.num_finalists]


def repeats_left(config: PipelineConfig, records: Mapping[str, Record]) -> list[PlannedTrial]:
    """The finalists' trainings with further seeds that have not ended yet."""
    planned = [
        PlannedTrial(_repeat_name(record, config.seed + extra), record.choice, config.seed + extra)
        for record in finalists(config, records)
        for extra in range(1, config.tune.seeds)
    ]
    return [trial for trial in planned if trial.name not in records]


def result_of(config: PipelineConfig, target: StageFolder, records: Sequence[Record], *, was_cut: bool) -> TuneResult:
    """The stage's result: the trial with the lowest error or, with several seeds, the lowest mean.

    Args:
        config: the whole config.
        target: the folder of the search.
        records: all trials, failed ones and those that were cut off included.
        was_cut: whether `tune.max_minutes` ended the search.

    Raises:
        TrainingError: more than half of the trials failed, or none has a usable error.
    """
    by_name = {record.name: record for record in records}
    trials = searched(config, by_name)
    _require_enough(trials)
    _require_enough([*trials, *(repeat for record in trials for repeat in _repeats_of(record, by_name, config))])
    groups = {
        record.name: [record.val_error, *_errors_of(_repeats_of(record, by_name, config))]
        for record in (finalists(config, by_name) if config.tune.seeds > 1 else usable_of(trials))
    }
    best_name = min(groups, key=lambda name: statistics.mean(groups[name]))
    best = groups[best_name]
    return TuneResult(
        folder=target.name,
        best=by_name[best_name].choice,
        best_trial=best_name,
        val_error=statistics.mean(best),
        spread=statistics.stdev(best) if len(best) > 1 else None,
        trials=tuple(record.trial for record in [*trials, *(r for r in records if _is_repeat(r, config))])[:MAX_LISTED],
        outcomes=dict(Counter(record.outcome for record in trials)),
        seeds=min(map(len, groups.values())) if config.tune.seeds > 1 else 1,
        trial_minutes=config.tune.trial_minutes,
        num_grid_points=Space(config).size or 0 if config.tune.search == "grid" else 0,
        num_finalists=config.tune.num_finalists if config.tune.seeds > 1 else 0,
        minutes_allowed=config.tune.max_minutes if was_cut else 0.0,
    )


def usable_of(trials: Iterable[Record]) -> list[Record]:
    """The trials whose error says something about their settings."""
    return [record for record in trials if record.is_usable]


def _repeats_of(record: Record, by_name: Mapping[str, Record], config: PipelineConfig) -> list[Record]:
    """A finalist's trainings with the further seeds that this config asks for: an earlier search may have had more."""
    names = [_repeat_name(record, config.seed + extra) for extra in range(1, config.tune.seeds)]
    return [by_name[name] for name in names if name in by_name]


def _repeat_name(record: Record, seed: int) -> str:
    return f"{record.name}-seed-{seed}"


def _errors_of(repeats: Iterable[Record]) -> list[float]:
    """Their errors: the worst there is where one diverged, none where one was lost and is to be repeated."""
    return [record.val_error for record in repeats if record.outcome not in ("failed", "cut off")]


def lost_too_many(num_failed: int, num_trials: int) -> bool:
    """Whether too many trials failed for a result of the rest."""
    return num_failed > num_trials / 2


def _require_enough(trials: Sequence[Record]) -> None:
    failed = [record for record in trials if record.outcome == "failed"]
    if lost_too_many(len(failed), len(trials)):
        raise TrainingError(
            f"{len(failed)} of {len(trials)} trials failed; the first with: {failed[0].fault}",
            where="tune",
            remedy="Fix the cause and run the same command again: trials that ended well are kept",
            retryable=False,
        )
    if not usable_of(trials):
        counts = ", ".join(f"{num} {outcome}" for outcome, num in Counter(each.outcome for each in trials).items())
        raise TrainingError(
            f"no trial has a usable error ({counts or 'none was started'})",
            where="tune",
            remedy="Lower train.learning_rate in tune.space, allow more minutes, or try `rcnn train` with --debug",
        )


def covers(config: PipelineConfig, result: TuneResult, target: StageFolder) -> bool:
    """Whether a finished search is as long as this config asks for: raising `tune.num_trials` or `tune.seeds` extends it.

    A search that its time limit ended stands as long as the limit is not raised; the same goes for a trial's limit.
    """
    tune = config.tune
    has_same_limit = tune.trial_minutes == result.trial_minutes
    if result.outcomes.get("out of time") and not (has_same_limit or 0 < tune.trial_minutes <= result.trial_minutes):
        return False
    if result.minutes_allowed and 0 < tune.max_minutes <= result.minutes_allowed:
        return True
    num_ended = result.num_trials - result.outcomes.get("cut off", 0)
    has_seeds = tune.seeds <= result.seeds and (tune.seeds == 1 or tune.num_finalists <= result.num_finalists)
    return not result.minutes_allowed and num_ended >= num_trials_wanted(config) and has_seeds
