"""The points of the search space, in an order that depends only on the settings and the seed.

In: a config. Out: its n-th point, for `random` and `grid`; the config of a trial. An interrupted or extended search finds
the points that it has not tried by their numbers.
"""

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

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

    def values(self) -> Sequence[Scalar] | None:
        """All of them, in order; None where there is one between any two."""

    def nearest(self, value: Any) -> Scalar:
        """The one that a value, computed in another way, stands for: 0.3 for 0.1 + 2 * 0.1."""

    def __contains__(self, value: object) -> bool: ...


@dataclass(frozen=True)
class Choices:
    """A list of values, each as likely as the next."""

    choices: tuple[Scalar, ...]

    def draw(self, rng: random.Random) -> Scalar:
        """A random one."""
        return rng.choice(self.choices)

    def values(self) -> Sequence[Scalar]:
        """All of them."""
        return self.choices

    def nearest(self, value: Any) -> Scalar:
        """Itself."""
        return self.choices[self.choices.index(value)]

    def __contains__(self, value: object) -> bool:
        return value in self.choices


@dataclass(frozen=True)
class Steps(Sequence[Scalar]):
    """Evenly spaced values, each computed when it is asked for: a fine step makes millions."""

    low: float
    step: float
    num_values: int
    is_whole: bool

    @classmethod
    def between(cls, low: float, high: float, step: float, *, is_whole: bool) -> "Steps":
        """From low to high, or to the last one below it."""
        num_steps = (high - low) / step
        return cls(
            low, step, math.floor(num_steps + max(1e-9, 1e-12 * num_steps)) + 1, is_whole
        )  # 0.3 / 0.1 is below 3

    def __len__(self) -> int:
        return self.num_values

    @overload
    def __getitem__(self, index: int) -> Scalar: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Scalar]: ...
    def __getitem__(self, index: int | slice) -> Scalar | Sequence[Scalar]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self.num_values))]
        value = float(f"{self.low + range(self.num_values)[index] * self.step:.12g}")  # 0.3, not 0.1 + 2 * 0.1
        return int(value) if self.is_whole else value

    def nearest(self, value: float) -> Scalar:
        """The one that is closest to a value."""
        return self[min(max(round((value - self.low) / self.step), 0), self.num_values - 1)]

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.nearest(value) == value


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

    def values(self) -> Steps | None:
        """All of them; None where there is no step and the values are not whole numbers."""
        step = self.step or (1 if self.is_whole else 0)
        return Steps.between(self.low, self.high, step, is_whole=self.is_whole) if step else None

    def nearest(self, value: Any) -> Scalar:
        """The closest step; the value itself where there are none."""
        values = self.values()
        return float(value) if values is None else values.nearest(value)

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

    def nearest(self, point: Point) -> Point:
        """The point of the space that another library's arithmetic means."""
        return {name: domain.nearest(point[name]) for name, domain in self.domains.items()}

    def _grid(self) -> Iterator[Point]:
        """Every combination, the last setting's value changing fastest. `itertools.product` would list all values first."""
        values = {name: domain.values() or [] for name, domain in self.domains.items()}
        for number in range(self.size or 0):
            point, rest = {}, number
            for name in reversed(values):
                rest, index = divmod(rest, len(values[name]))
                point[name] = values[name][index]
            yield {name: point[name] for name in values}

    def _draws(self) -> Iterator[Point]:
        """Endless. Each value has a generator of its own, so a setting that joins the space leaves the others' draws."""
        for number in itertools.count():
            yield {
                name: domain.draw(random.Random(f"{self.seed} {number} {name}"))  # noqa: S311  (not for secrets)
                for name, domain in self.domains.items()
            }


def _without_repeats(points: Iterable[Point]) -> Iterator[Point]:
    seen = set()
    for point in points:
        if key_of_point(point) not in seen:
            seen.add(key_of_point(point))
            yield point


def key_of_point(point: Mapping[str, Scalar]) -> tuple[tuple[str, Scalar], ...]:
    """What two equal points share."""
    return tuple(sorted(point.items()))


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
        "train.with_validation": False,  # a search chooses by these rows
        "model.members": 1,
        "model.combine": "probabilities",
        "execution.num_workers": tune.workers_per_trial,
        "execution.min_workers": 0,
        "execution.cpus_per_worker": tune.cpus_per_trial,
        "execution.use_gpu": tune.gpus_per_trial > 0,
    }
    return config.with_settings(settings)
