"""What a search comes to: the networks that it may draw, and how many epochs it trains in all."""

import itertools
import math
from typing import Any

from rcnn.config import PipelineConfig

NUM_TIMED = 4  # networks of a search that are timed; the others are interpolated by their multiply-adds


def networks_of(config: PipelineConfig) -> list[dict[str, Any]]:
    """The settings of each network that the search may draw, the cheapest first.

    The one place here that knows how `tune` describes its space.
    """
    space = {"model.k": config.tune.k, "model.t": config.tune.t}
    points = [dict(zip(space, values, strict=True)) for values in itertools.product(*map(sorted, space.values()))]
    return sorted(points, key=lambda point: point["model.k"] ** 2 * (point["model.t"] + 1))


def timed_of(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those to time: both ends, and some between them."""
    if len(points) <= NUM_TIMED:
        return points
    return [points[round(number * (len(points) - 1) / (NUM_TIMED - 1))] for number in range(NUM_TIMED)]


def expected_epochs(config: PipelineConfig) -> float:
    """Epochs of all trials together, if the order in which their errors come is random.

    ASHA promotes a trial that is better than a percentile of the results that came to its rung before. Early on these are
    few, so it promotes more than 1 in `reduction_factor`: the first always, the second in one case of two.
    """
    tune = config.tune
    epochs, rung, num_trials = 0.0, 0, float(tune.num_trials)
    following = tune.grace_epochs
    while rung < tune.epochs and num_trials > 0:
        epochs += num_trials * (min(following, tune.epochs) - rung)
        rung, following = following, following * tune.reduction_factor
        num_trials = _num_promoted(num_trials, tune.reduction_factor)
    return epochs


def most_epochs(config: PipelineConfig) -> int:
    """Epochs of all trials together if none is stopped early."""
    return config.tune.num_trials * config.tune.epochs


def _num_promoted(num_trials: float, reduction_factor: int) -> float:
    """How many of the trials that come to a rung leave it upwards."""
    whole = math.floor(num_trials)
    chances = [_chance(number, 1 - 1 / reduction_factor) for number in range(whole + 1)]
    return sum(chances[:whole]) + (num_trials - whole) * chances[whole]


def _chance(num_before: int, percentile: float) -> float:
    """That a result exceeds a percentile of `num_before` others, linearly interpolated as Ray's is."""
    return (num_before - percentile * (num_before - 1)) / (num_before + 1) if num_before else 1.0
