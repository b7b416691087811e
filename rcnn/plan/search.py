"""What a search comes to: the networks that it may draw, and how many epochs it trains in all."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from rcnn.config import PipelineConfig
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


def expected_epochs(config: PipelineConfig) -> float:
    """Epochs of all trials together: with ASHA, if the order in which their errors come is random; else, if none is stopped.

    ASHA promotes a trial that is better than a percentile of the results that came to its rung before. Early on these are
    few, so it promotes more than 1 in `reduction_factor`: the first always, the second in one case of two.
    """
    tune = config.tune
    if tune.early_stopping != "asha":
        return most_epochs(config)
    epochs, rung, num_trials = float(_epochs_of_finalists(config)), 0, float(num_trials_wanted(config))
    following = tune.grace_epochs
    while rung < tune.epochs and num_trials > 0:
        epochs += num_trials * (min(following, tune.epochs) - rung)
        rung, following = following, following * tune.reduction_factor
        num_trials = _num_promoted(num_trials, tune.reduction_factor)
    return epochs


def most_epochs(config: PipelineConfig) -> int:
    """Epochs of all trials together if none is stopped early."""
    return num_trials_wanted(config) * config.tune.epochs + _epochs_of_finalists(config)


def _epochs_of_finalists(config: PipelineConfig) -> int:
    """Epochs of the best configurations with further seeds."""
    tune = config.tune
    return (tune.seeds - 1) * min(tune.num_finalists, num_trials_wanted(config)) * tune.epochs


def _num_promoted(num_trials: float, reduction_factor: int) -> float:
    """How many of the trials that come to a rung leave it upwards."""
    whole = math.floor(num_trials)
    chances = [_chance(number, 1 - 1 / reduction_factor) for number in range(whole + 1)]
    return sum(chances[:whole]) + (num_trials - whole) * chances[whole]


def _chance(num_before: int, percentile: float) -> float:
    """That a result exceeds a percentile of `num_before` others, linearly interpolated as Ray's is."""
    return (num_before - percentile * (num_before - 1)) / (num_before + 1) if num_before else 1.0
