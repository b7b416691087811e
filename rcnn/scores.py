"""`Scores`: the figures of a model on some rows, the same for validation and for testing.

To add a metric, add one property to `Scores`, decorated with `Share` (0 to 1, shown in per cent) or `Metric` (any other
number). The line and the history of each epoch, MLflow (`val/NAME` and `test/NAME`), the result of `evaluate` and the
report read all of them. A changed metric changes the keys of search and model, whose histories hold it.

Importing this file loads no torch: `results.py`, which is read everywhere, formats metrics by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


SHARES_OF_TEST = ("top_5_error", "calibration_error")
"""Metrics of `evaluate/figures.py`, which need all logits, and are read in per cent."""


class Metric(property):
    """A property of `Scores` that is reported; its name, with spaces for underscores, is what people read."""

    @staticmethod
    def written(value: float) -> str:
        """The value as people read it."""
        return f"{value:.4f}"


class Share(Metric):
    """A metric from 0 to 1, which people read in per cent."""

    @staticmethod
    def written(value: float) -> str:
        """The value as people read it."""
        return f"{100 * value:.2f} %"


@dataclass(frozen=True)
class Scores:
    """Sums over rows, on the device that scored them: those of the workers' shares add up to those of all rows.

    Attributes:
        confusion: (classes, classes) int64; row: the true class, column: the predicted one.
        loss_sum: summed cross-entropy, a float64 scalar.
    """

    confusion: Tensor
    loss_sum: Tensor

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.confusion + other.confusion, self.loss_sum + other.loss_sum)

    @property
    def num_rows(self) -> int:
        """Rows that were counted."""
        return int(self.confusion.sum())

    @Share
    def error(self) -> float:
        """Share of the rows that were classified wrongly."""
        return (self.num_rows - int(self.confusion.diagonal().sum())) / self.num_rows

    @Metric
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(self.loss_sum) / self.num_rows

    def metrics(self) -> dict[str, float]:
        """The value of each metric by its name."""
        return {name: getattr(self, name) for name in _metrics()}


def written_metrics(values: Mapping[str, float], split: str) -> dict[str, str]:
    """Metrics of a split (`val` or `test`) as people read them, by label: `{"test error": "2.40 %"}`."""
    kinds = _metrics() | dict.fromkeys(SHARES_OF_TEST, Share)
    return {
        f"{split} {name.replace('_', ' ')}": kinds.get(name, Metric).written(value) for name, value in values.items()
    }


def _metrics() -> dict[str, type[Metric]]:
    return {name: type(value) for name, value in vars(Scores).items() if isinstance(value, Metric)}
