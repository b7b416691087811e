"""`rcnn plan`: what each stage would do and cost, as rows for a table and as JSON."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rcnn.config import PipelineConfig
from rcnn.plan.calibrate import Calibration, Job, calibrations_of
from rcnn.plan.costs import SECONDS_TO_START_PREFECT, SECONDS_TO_START_RAY, Calibrate, Cost
from rcnn.plan.size import size_of
from rcnn.plan.status import Status, statuses_of
from rcnn.progress import as_duration
from rcnn.results import StageResult
from rcnn.stages import STAGES, Results, effective_config, imported, stage_folder
from rcnn.storage import StageFolder, Storage

BUSY = 0.5  # of the cores: above this load, times are too long


@dataclass(frozen=True)
class Item:
    """A stage of the plan: its status, and what it costs where it is not done."""

    name: str
    status: Status
    cost: Cost


@dataclass(frozen=True)
class Bill:
    """The whole plan.

    Attributes:
        items: the stages, in order.
        notes: what holds for all of them.
    """

    items: tuple[Item, ...]
    notes: tuple[str, ...]

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to run."""
        return all(item.status.state == "done" for item in self.items)

    @property
    def total(self) -> Cost:
        """The sums over the stages that run, as far as they are known, and the largest memory."""
        costs = [item.cost for item in self.items if item.status.state != "done"]
        seconds = _sum(cost.seconds for cost in costs)
        return Cost(
            num_steps=_sum(cost.num_steps for cost in costs),
            multiply_adds=_sum(cost.multiply_adds for cost in costs),
            seconds=None if seconds is None else seconds + SECONDS_TO_START_PREFECT,
            cpu_hours=_sum(cost.cpu_hours for cost in costs),
            gpu_hours=_sum(cost.gpu_hours for cost in costs),
            peak_bytes=max((cost.num_processes * cost.peak_bytes for cost in costs if cost.peak_bytes), default=None),
            disk_bytes=_sum(cost.disk_bytes for cost in costs),
        )

    @property
    def is_complete(self) -> bool:
        """Whether the time of each stage that runs is predicted."""
        return all(item.cost.seconds is not None for item in self.items if item.status.state != "done")

    def table(self) -> list[dict[str, str]]:
        """A row for each stage, and one for the total."""
        rows = [_row(item.name, item.status.state, item.cost) for item in self.items]
        return rows if self.is_done else [*rows, _row("total", "" if self.is_complete else "at least", self.total)]

    def lines(self) -> list[str]:
        """What stands below the table: why each stage runs, and what its figures assume."""
        lines = [f"{item.name}: {text}" for item in self.items for text in (item.status.why, *item.cost.notes) if text]
        return [*lines, *self.notes]

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        stages = [{"stage": item.name} | asdict(item.status) | asdict(item.cost) for item in self.items]
        total = asdict(self.total) | {"is_complete": self.is_complete}
        return {"stages": stages, "total": total, "notes": list(self.notes)}


def bill_of(config: PipelineConfig, *, fresh: bool = False, num_beside: int = 0) -> Bill:
    """The plan of a pipeline with this config; times a few training steps where that was not done before.

    Args:
        config: the whole config.
        fresh: times again what was timed before.
        num_beside: pipelines of this kind that run at the same time, and slow it down.

    Raises:
        ConfigError: the network cannot take the images.
        DataError: a data set is there, and damaged.
    """
    load = os.getloadavg()[0]  # before the timed steps add to it
    statuses, results = statuses_of(config)
    calibrate = Calibrations(Storage(config.storage), fresh=fresh, num_beside=num_beside)
    on_ray = [name for name, status in statuses.items() if STAGES[name].on_ray(config) and status.state != "done"]
    items = []
    for name, status in statuses.items():
        cost = Cost()
        if status.state != "done":
            target = stage_folder(config, name, results) if status.state == "resumes" else None
            cost = cost_of(config, name, results, calibrate, target)
        if name in on_ray[:1] and not config.ray.address:
            cost = after_ray_started(cost)
        items.append(Item(name, status, cost))
    notes = (*_notes_on(config, load), *_notes_on_choices(items)) if calibrate.was_asked else ()
    return Bill(tuple(items), notes)


class Calibrations:
    """Calibrations for the cost functions; train and evaluate ask for the same one.

    Args:
        storage: keeps them.
        fresh: whether to time again what was timed before.
        num_beside: pipelines at the same time.
    """

    def __init__(self, storage: Storage, *, fresh: bool = False, num_beside: int = 0):
        self.storage, self.fresh, self.num_beside = storage, fresh, num_beside
        self._found: dict[str, list[Calibration]] = {}

    @property
    def was_asked(self) -> bool:
        """Whether any figure rests on timed steps."""
        return bool(self._found)

    def __call__(self, jobs: Sequence[Job], num_threads: int, num_copies: int) -> list[Calibration]:
        """See `Calibrate` in `costs.py`."""
        asked = repr((*jobs, num_threads, num_copies))
        if asked not in self._found:
            how = {"num_threads": num_threads, "num_copies": num_copies * (1 + self.num_beside)}
            self._found[asked] = calibrations_of(jobs, self.storage, **how, fresh=self.fresh)
        return self._found[asked]


def cost_of(
    config: PipelineConfig, name: str, results: Results, calibrate: Calibrate, target: StageFolder | None = None
) -> Cost:
    """What a stage costs by its row, without Ray's start; unknown where the row has no function for it.

    Args:
        config: the whole config.
        name: of the stage.
        results: those of earlier stages that are there.
        calibrate: times training steps.
        target: the folder that the stage resumes in; None where it starts.
    """
    if not STAGES[name].cost:
        return Cost()
    config = effective_config(config, name, results)
    cost: Cost = imported(STAGES[name].cost)(config, size_of(config, results), calibrate, target)
    return cost


def after_ray_started(cost: Cost) -> Cost:
    """The cost of the first stage that needs Ray: starting it takes no core that is not there anyway."""
    if cost.seconds is None:
        return cost
    at_most = cost.seconds_at_most
    return replace(
        cost,
        seconds=cost.seconds + SECONDS_TO_START_RAY,
        seconds_at_most=None if at_most is None else at_most + SECONDS_TO_START_RAY,
    )


def _notes_on(config: PipelineConfig, load: float) -> list[str]:
    notes = ["times and memory are predictions from a few training steps, timed on this machine"]
    if config.ray.address:
        notes[0] += f", and not on the cluster at {config.ray.address}"
    num_cores = os.cpu_count() or 1
    if load > BUSY * num_cores:
        notes.append(f"this machine is busy (load {load:.1f} on {num_cores} cores): times measured now are too long")
    return notes


def _notes_on_choices(items: Sequence[Item]) -> Iterator[str]:
    """Which stages may run with other settings than those that were billed, because a stage before them chooses some."""
    for number, item in enumerate(items):
        chooses = imported(STAGES[item.name].result).applied_to is not StageResult.applied_to
        later = [each.name for each in items[number + 1 :] if each.cost.multiply_adds is not None]
        if chooses and later and item.status.state != "done":
            several = " and ".join(filter(None, [", ".join(later[:-1]), later[-1]]))
            yield f"{several} are predicted for the network of the config; {item.name} may choose another one"


def _sum(values: Any) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _row(name: str, state: str, cost: Cost) -> dict[str, str]:
    at_most = f" (at most {as_duration(cost.seconds_at_most)})" if cost.seconds_at_most else ""
    several = f"{cost.num_processes} x " if cost.num_processes > 1 and cost.peak_bytes else ""
    hours = [f"{cost.cpu_hours:.2g} CPU"] if cost.cpu_hours is not None else []
    hours += [f"{cost.gpu_hours:.2g} GPU"] if cost.gpu_hours is not None else []
    return {
        "stage": name,
        "state": state,
        "rows": "" if cost.num_rows is None else f"{cost.num_rows:,}",
        "steps": "" if cost.num_steps is None else f"{cost.num_steps:,}",
        "multiply-adds": as_quantity(cost.multiply_adds),
        "time": "" if cost.seconds is None else as_duration(cost.seconds) + at_most,
        "hours": ", ".join(hours),
        "memory": f"{several}{as_quantity(cost.peak_bytes, 'B')}",
        "disk": as_quantity(cost.disk_bytes, "B"),
    }


def as_quantity(value: float | None, unit: str = "") -> str:
    """`12.3 T`, `456 MB`; empty for None."""
    if value is None:
        return ""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:  # 999,600 is 1 M, not 1e+03 k
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()
