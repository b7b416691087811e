"""Models as a table: one row for each network and its settings, seeds together, with the Pareto front marked."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rcnn.compare.models import TRAIN, Model
from rcnn.progress import as_duration

SHORT = 12  # characters of a digest


@dataclass(frozen=True)
class Group:
    """Models that differ in their seed alone.

    Attributes:
        models: the newest first.
        best_by: "size" and "time", where no other model on the same test rows has fewer errors and fewer parameters, or fewer
            errors in a shorter training.
    """

    models: tuple[Model, ...]
    best_by: tuple[str, ...] = ()

    @property
    def first(self) -> Model:
        """Any of them speaks for all."""
        return self.models[0]

    @property
    def errors(self) -> list[float]:
        """Test errors of those that were evaluated."""
        return [model.test_error for model in self.models if model.test_error is not None]

    @property
    def error(self) -> float:
        """Mean test error; infinite where there is none, so that it comes last."""
        return statistics.fmean(self.errors) if self.errors else math.inf

    @property
    def num_parameters(self) -> float:
        """Of the network."""
        return float(self.first.trained.get("num_parameters", math.inf))

    @property
    def seconds(self) -> float:
        """Mean time of a training; infinite where it is not known."""
        known = [model.trained["seconds"] for model in self.models if model.trained.get("seconds")]
        return statistics.fmean(known) if known else math.inf


def groups_of(models: Sequence[Model]) -> list[Group]:
    """Models by what they share, best first; those on the same test rows stand together."""
    found: dict[Any, list[Model]] = {}
    for model in models:
        found.setdefault(model.group, []).append(model)
    groups = [Group(tuple(members)) for members in found.values()]
    marked = [Group(group.models, _best_by(group, groups)) for group in groups]
    return sorted(marked, key=_place)


def _place(group: Group) -> tuple[Any, ...]:
    """Data sets apart, and in each the best model first; those that were not evaluated last."""
    digest = group.first.test_digest
    return group.first.data_set, not digest, digest, group.error


def _best_by(group: Group, groups: Sequence[Group]) -> tuple[str, ...]:
    if not group.errors:
        return ()
    rivals = [each for each in groups if each.errors and each.first.test_digest == group.first.test_digest]
    costs: dict[str, Callable[[Group], float]] = {
        "size": lambda each: each.num_parameters,
        "time": lambda each: each.seconds,
    }
    return tuple(name for name, cost in costs.items() if not any(_dominates(each, group, cost) for each in rivals))


def _dominates(rival: Group, group: Group, cost: Callable[[Group], float]) -> bool:
    """Whether the rival is as good in both, and better in one."""
    no_worse = rival.error <= group.error and cost(rival) <= cost(group)
    return no_worse and (rival.error < group.error or cost(rival) < cost(group))


def as_rows(groups: Sequence[Group]) -> list[dict[str, str]]:
    """The table for people."""
    return [
        {
            "model": _name(group),
            "data set": group.first.data_set or group.first.data_digest[:SHORT],
            "network": group.first.title,
            "parameters": _written(group.num_parameters, "{:,.0f}"),
            "test error, %": _written_error(group),
            "val, %": _written_val(group),
            "seeds": str(len({model.settings.get("seed") for model in group.models})),
            "training": "-" if math.isinf(group.seconds) else as_duration(group.seconds),
            "best by": ", ".join(group.best_by),
            "when": _written_time(group.first.changed),
        }
        for group in groups
    ]


def _name(group: Group) -> str:
    """The key of its first model, which `rcnn compare` takes too, and how many others there are."""
    key = group.first.name.removeprefix(TRAIN)
    return key if len(group.models) == 1 else f"{key} +{len(group.models) - 1}"


def _written(value: float, pattern: str) -> str:
    return "-" if math.isinf(value) else pattern.format(value)


def _written_error(group: Group) -> str:
    """Mean and standard deviation over seeds; of one seed its interval."""
    if not group.errors:
        return "-"
    if len(group.errors) > 1:
        return f"{100 * group.error:.2f} ± {100 * statistics.stdev(group.errors):.2f}"
    low, high = next(model for model in group.models if model.test_error is not None).evaluation["error_interval"]
    return f"{100 * group.error:.2f} ({100 * low:.2f}-{100 * high:.2f})"


def _written_val(group: Group) -> str:
    if group.first.settings.get("train.with_validation"):
        return "-"
    return f"{100 * statistics.fmean(model.trained['val_error'] for model in group.models):.2f}"


def _written_time(changed: float) -> str:
    return datetime.fromtimestamp(changed, UTC).astimezone().strftime("%d %b %H:%M") if changed else ""


def records(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A row for each model, seeds apart, with all settings: for CSV and Parquet."""
    names = sorted({name for group in groups for model in group.models for name in model.settings})
    return [
        {
            "model": model.name,
            "data_set": model.data_set,
            "data_digest": model.data_digest,
            "test_digest": model.test_digest or None,
            "network": model.title,
            "num_parameters": model.trained.get("num_parameters"),
            "test_error": model.test_error,
            "val_error": model.trained.get("val_error"),
            "train_seconds": model.trained.get("seconds"),
            "images_per_second": model.trained.get("images_per_second"),
            "weights_sha256": model.weights_sha256,
            "mlflow_run_id": model.trained.get("mlflow_run_id") or None,
            "best_by_size": "size" in group.best_by,
            "best_by_time": "time" in group.best_by,
            **{name: model.settings.get(name) for name in names},
        }
        for group in groups
        for model in group.models
    ]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The records as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    """The records as Parquet; a setting that has values of several types is text."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: _column(values) for name, values in columns.items()}), buffer)
    return buffer.getvalue()


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])
