"""Figures of a model on rows, as sums that add up: the shares of any number of workers give the whole."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Scores:
    """Sums over rows.

    Attributes:
        confusion: (classes, classes) int64; row: the true class, column: the predicted one.
        loss_sum: summed cross-entropy.
    """

    confusion: Tensor
    loss_sum: float

    def __add__(self, other: "Scores") -> "Scores":
        return Scores(self.confusion + other.confusion, self.loss_sum + other.loss_sum)

    @property
    def num_rows(self) -> int:
        """Rows that were counted."""
        return int(self.confusion.sum())

    @property
    def error(self) -> float:
        """Share of the rows that were classified wrongly, 0 to 1."""
        return (self.num_rows - int(self.confusion.diagonal().sum())) / self.num_rows

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.loss_sum / self.num_rows

    @property
    def accuracy_per_class(self) -> list[float | None]:
        """Share of each class's rows that were recognised; None for a class without rows."""
        of_class, right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        return [hits / rows if rows else None for hits, rows in zip(right, of_class, strict=True)]


def score_logits(logits_NC: Tensor, labels_N: Tensor) -> Scores:
    """Scores of logits (N, classes) against labels (N)."""
    num_classes = logits_NC.shape[1]
    cells_N = labels_N * num_classes + logits_NC.argmax(1)
    confusion = torch.bincount(cells_N, minlength=num_classes**2).reshape(num_classes, num_classes)
    return Scores(confusion.cpu(), float(functional.cross_entropy(logits_NC.double(), labels_N, reduction="sum")))
