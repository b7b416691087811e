"""The points of the search space, in an order that depends on the settings and the seed alone.

In: a config. Out: its n-th point, for `random` and `grid`; the config of a trial. An interrupted or extended search finds
the points that it has not tried by their numbers.
"""

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any, Protocol

from rcnn.config import SEARCHABLE, PipelineConfig
from rcnn.errors import ConfigError
from rcnn.ranges import Range, Scalar, Values
from rcnn.results import Choice

Point = dict[str, Scalar]
"""Values by dotted setting name."""


class Domain(Protocol):
    """The values that one setting may take."""

    def draw(self, rng: random.Random) -> Scalar:
        """A random one."""

    def values(self) -> list[Scalar] | None:
        """All of them, in order; None where there is one between any two."""

    def __contains__(self, value: object) -> bool: ...


@dataclass(frozen=True)
class Choices:
    """A list of values, each as likely as the next."""

    choices: tuple[Scalar, ...]

    def draw(self, rng: random.Random) -> Scalar:
        """A random one."""
        return rng.choice(self.choices)

    def values(self) -> list[Scalar]:
        """All of them."""
        return list(self.choices)

    def __contains__(self, value: object) -> bool:
        return value in self.choices


@dataclass(frozen=True)
class Interval:
    """The values from low to high, both included; `step` apart unless it is 0."""

    low: float
    high: float
    is_log: bool
    step: float
    is_whole: bool

    def draw(self, rng: random.Random) -> Scalar:
        """A random one, uniform or uniform in its logarithm."""
        if self.is_log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
            value = min(max(value, self.low), self.high)  # exp(log(x)) may miss x by a bit
            return round(value) if self.is_whole else value
        values = self.values()
        return rng.uniform(self.low, self.high) if values is None else rng.choice(values)

    def values(self) -> list[Scalar] | None:
        """All of them; None where there is no step and the values are not whole numbers."""
        step = self.step or (1 if self.is_whole else 0)
        if not step:
            return None
        num_steps = math.floor((self.high - self.low) / step + 1e-9)
        stepped = [float(f"{self.low + i * step:.12g}") for i in range(num_steps + 1)]  # 0.3, not 0.1 + 2 * 0.1
        return [int(value) for value in stepped] if self.is_whole else list(stepped)

    def __contains__(self, value: object) -> bool:
        values = self.values()
        return value in values if values is not None else self.low <= value <= self.high  # type: ignore[operator]


class Space:
    """All points of a search, by the names of settings in alphabetical order: no result may depend on a table's order."""

    def __init__(self, config: PipelineConfig):
        self.domains = {name: _domain(name, config.tune.space[name]) for name in sorted(config.tune.space)}
        self.seed = config.seed
        self.own = own_point(config)

    @property
    def size(self) -> int | None:
        """The number of points; None where it has no end."""
        values = [domain.values() for domain in self.domains.values()]
        return None if None in values else math.prod(len(each) for each in values if each is not None)

    def __contains__(self, point: Point) -> bool:
        return all(point[name] in domain for name, domain in self.domains.items())

    def first_points(self, count: int, *, search: str) -> list[Point]:
        """The first points, all different: the config's own one where it is inside, then by `search`.

        Fewer than `count` where the space has no more.
        """
        count = count if self.size is None else min(count, self.size)
        first = [self.own] if self.own in self else []
        rest = self._grid() if search == "grid" else self._draws()
        return list(itertools.islice(_without_repeats(itertools.chain(first, rest)), count))

    def _grid(self) -> Any:
        values = [domain.values() or [] for domain in self.domains.values()]
        return (dict(zip(self.domains, combination, strict=True)) for combination in itertools.product(*values))

    def _draws(self) -> Any:
        """Endless. Each value has a generator of its own, so a setting that joins the space leaves the others' draws."""
        for number in itertools.count():
            yield {
                name: domain.draw(random.Random(f"{self.seed} {number} {name}"))  # noqa: S311  (not for secrets)
                for name, domain in self.domains.items()
            }


def _without_repeats(points: Any) -> Any:
    seen = set()
    for point in points:
        key = tuple(point.values())
        if key not in seen:
            seen.add(key)
            yield point


def _domain(name: str, values: Values) -> Domain:
    if not isinstance(values, Range):
        return Choices(values)
    return Interval(values.min, values.max, values.log, values.step, is_whole=SEARCHABLE[name].annotation is int)


def own_point(config: PipelineConfig) -> Point:
    """The point that the config itself names: it is the first trial, so that a search is compared with no search."""
    return {name: config.values_of(name)[name] for name in sorted(config.tune.space)}


def num_trials_wanted(config: PipelineConfig) -> int:
    """`tune.num_trials`, or the size of the space where that is smaller."""
    size = Space(config).size
    return config.tune.num_trials if size is None else min(config.tune.num_trials, size)


def require_searchable(config: PipelineConfig) -> None:
    """Checks that the network reads what is searched; the config checks it only where the search is on.

    Raises:
        ConfigError: it does not.
    """
    if fault := config.fault_of_space():
        raise ConfigError(fault, where="rcnn tune", remedy="`rcnn config --explain` lists each setting with its bounds")


def trial_config(config: PipelineConfig, choice: Choice, *, seed: int) -> PipelineConfig:
    """The config of a trial: the choice's settings, and the search's shorter training.

    Raises:
        ConfigError: the settings of the choice exclude each other.
    """
    tune = config.tune
    settings: dict[str, Any] = {
        **choice.root,
        "seed": seed,
        "train.epochs": tune.epochs,
        "train.num_rows": tune.num_rows or config.train.num_rows,
        "execution.num_workers": tune.workers_per_trial,
        "execution.cpus_per_worker": tune.cpus_per_trial,
        "execution.use_gpu": tune.gpus_per_trial > 0,
    }
    return config.with_settings(settings)
