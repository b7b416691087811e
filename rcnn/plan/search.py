"""What a search comes to: the networks that it may draw, and how many epochs it still trains."""

import itertools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rcnn.config import PipelineConfig
from rcnn.plan.progress import num_trials_left
from rcnn.tune.ledger import Record
from rcnn.tune.search import repeats_left
from rcnn.tune.space import Space, num_trials_wanted

MAX_VALUES = 8  # of one setting, so that a wide range does not become thousands of networks
NUM_TIMED = 4  # networks of a search that are timed; the others are interpolated by their multiply-adds


def networks_of(config: PipelineConfig) -> list[dict[str, Any]]:
    """The settings of each network that the search may draw, the cheapest first.

    A range gives a few values, evenly apart. Settings outside `model`, and those of it that any number may be given to, such as
    dropout, cost nothing: the config's own value stands for them.
    """
    domains = {name: domain.values() for name, domain in Space(config).domains.items() if name.startswith("model.")}
    space = {name: _thinned(values) for name, values in domains.items() if values is not None}
    points = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    own = {"model.k": config.model.k, "model.t": config.model.t}
    return sorted(points, key=lambda point: (own | point)["model.k"] ** 2 * ((own | point)["model.t"] + 1))


def _thinned(values: Sequence[Any]) -> Sequence[Any]:
    """The values, or some of many, both ends included."""
    if len(values) <= MAX_VALUES:
        return values
    return [values[round(number * (len(values) - 1) / (MAX_VALUES - 1))] for number in range(MAX_VALUES)]


def timed_of(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those to time: both ends, and some between them."""
    if len(points) <= NUM_TIMED:
        return points
    return [points[round(number * (len(points) - 1) / (NUM_TIMED - 1))] for number in range(NUM_TIMED)]


def expected_epochs(config: PipelineConfig, ended: Mapping[str, Record] = MappingProxyType({})) -> float:
    """Epochs still to train: with ASHA, if the order in which errors come is random; else, if no trial is stopped.

    ASHA promotes a trial that is better than a percentile of the results that came to its rung before. Early on these are
    few, so it promotes more than 1 in `reduction_factor`: the first always, the second in one case of two.

    Args:
        config: the whole config.
        ended: the trials that have ended, by name; their results count at each rung.
    """
    tune = config.tune
    if tune.early_stopping != "asha":
        return most_epochs(config, ended)
    epochs, rung = float(num_repeats_left(config, ended) * tune.epochs), 0
    following, num_trials = tune.grace_epochs, float(num_trials_left(config, ended))
    while rung < tune.epochs and num_trials > 0:
        epochs += num_trials * (min(following, tune.epochs) - rung)
        num_before = sum(len(record.val_errors) >= following for record in ended.values())
        num_trials = _num_promoted(num_trials, tune.reduction_factor, num_before)
        rung, following = following, following * tune.reduction_factor
    return epochs


def most_epochs(config: PipelineConfig, ended: Mapping[str, Record] = MappingProxyType({})) -> int:
    """Epochs still to train if no trial is stopped early."""
    return (num_trials_left(config, ended) + num_repeats_left(config, ended)) * config.tune.epochs


def num_repeats_left(config: PipelineConfig, ended: Mapping[str, Record]) -> int:
    """Trainings of the best configurations with further seeds: which ones are best is known when all trials have ended."""
    tune = config.tune
    if num_trials_left(config, ended):
        return (tune.seeds - 1) * min(tune.num_finalists, num_trials_wanted(config))
    return len(repeats_left(config, ended))


def _num_promoted(num_trials: float, reduction_factor: int, num_before: int) -> float:
    """How many of the trials that come to a rung, after `num_before` others, leave it upwards."""
    whole = math.floor(num_trials)
    chances = [_chance(num_before + number, 1 - 1 / reduction_factor) for number in range(whole + 1)]
    return sum(chances[:whole]) + (num_trials - whole) * chances[whole]


def _chance(num_before: int, percentile: float) -> float:
    """That a result exceeds a percentile of `num_before` others, linearly interpolated as Ray's is."""
    return (num_before - percentile * (num_before - 1)) / (num_before + 1) if num_before else 1.0
