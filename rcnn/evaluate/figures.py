"""The figures of an evaluation, all from `predictions.parquet`: errors with intervals, classes, calibration, and telling rows.

One pass over the file, some rows at a time: memory does not grow with the number of rows.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from rcnn.evaluate.calibration import losses_of
from rcnn.evaluate.paired import TWO_SIDED_95
from rcnn.evaluate.predictions import read_predictions
from rcnn.results import ClassFigures
from rcnn.scores import Scores
from rcnn.storage import StageFolder

NUM_BINS = 15
"""Of equal width, as in Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017)."""
NUM_EXAMPLES = 24
CLASSES_FOR_TOP_5 = 100


@dataclass(frozen=True)
class Example:
    """A row to look at: its number among the test rows, its class, the answer, and the probability of the answer."""

    row: int
    label: int
    predicted: int
    probability: float


@dataclass
class Figures:
    """Sums over rows, and the rows to look at.

    Attributes:
        confusion: (classes, classes) int64; row: the true class, column: the predicted one.
        loss_sum: summed cross-entropy.
        brier_sum: summed squared distance between probabilities and the true class.
        num_outside_5: rows whose true class is not among the five most probable.
        bins: (3, NUM_BINS): rows, summed probability and right answers, by the probability of the answer.
        surest_mistakes: the wrong answers with the highest probability, the most probable first.
        least_sure_hits: the right answers with the lowest probability, the least probable first.
    """

    confusion: np.ndarray
    loss_sum: float = 0.0
    brier_sum: float = 0.0
    num_outside_5: int = 0
    bins: np.ndarray = field(default_factory=lambda: np.zeros((3, NUM_BINS)))
    surest_mistakes: list[Example] = field(default_factory=list)
    least_sure_hits: list[Example] = field(default_factory=list)

    @property
    def scores(self) -> Scores:
        """The figures that validation has as well."""
        return Scores(torch.from_numpy(self.confusion), torch.tensor(self.loss_sum, dtype=torch.float64))

    @property
    def num_rows(self) -> int:
        """Rows that were counted."""
        return int(self.confusion.sum())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: the mean distance, over rows, of probability and share of right answers in a bin."""
        num_rows, probability, right = self.bins
        return float(np.abs(probability - right).sum() / num_rows.sum())

    def metrics(self) -> dict[str, float]:
        """All metrics by name: those of `Scores` first."""
        found = self.scores.metrics()
        if len(self.confusion) >= CLASSES_FOR_TOP_5:
            found["top_5_error"] = self.num_outside_5 / self.num_rows
        return found | {"calibration_error": self.calibration_error, "brier_score": self.brier_sum / self.num_rows}

    def of_classes(self) -> list[ClassFigures]:
        """Rows, precision, recall and F1 of each class."""
        right = self.confusion.diagonal().tolist()
        true, predicted = self.confusion.sum(1).tolist(), self.confusion.sum(0).tolist()
        return [
            ClassFigures(
                num_rows=rows,
                precision=hits / answers if answers else None,
                recall=hits / rows if rows else None,
                f1=2 * hits / (rows + answers) if rows + answers else None,
            )
            for hits, rows, answers in zip(right, true, predicted, strict=True)
        ]


def figures_of(target: StageFolder, num_classes: int, *, temperature: float = 1.0) -> Figures:
    """The figures of all rows of `predictions.parquet`; with a temperature, as if it had divided the logits.

    Raises:
        DataError: the file is missing or damaged.
    """
    found, first_row = Figures(np.zeros((num_classes, num_classes), np.int64)), 0
    for rows in read_predictions(target, ("label", "predicted", "loss", "logits")):
        if temperature != 1:
            rows["logits"] = rows["logits"].astype(np.float64) / temperature
            rows["loss"] = losses_of(rows["logits"], rows["label"])
        _add(found, rows, first_row)
        first_row += len(rows["label"])
    return found


def _add(found: Figures, rows: dict[str, np.ndarray], first_row: int) -> None:
    labels_N, predicted_N = rows["label"], rows["predicted"]
    num_classes = len(found.confusion)
    cells = np.bincount(labels_N * num_classes + predicted_N, minlength=num_classes**2)
    found.confusion += cells.reshape(num_classes, num_classes)
    found.loss_sum += float(rows["loss"].sum())
    probabilities_NC = softmax(rows["logits"])
    own_N, best_N = (np.take_along_axis(probabilities_NC, each[:, None], 1)[:, 0] for each in (labels_N, predicted_N))
    found.brier_sum += float((probabilities_NC**2).sum() - 2 * own_N.sum() + len(own_N))
    found.num_outside_5 += int(((probabilities_NC > own_N[:, None]).sum(1) >= 5).sum())
    right_N = labels_N == predicted_N
    bin_N = np.minimum(
        (np.nan_to_num(best_N) * NUM_BINS).astype(np.int64), NUM_BINS - 1
    )  # nan: a network that diverged
    for total, weights in zip(found.bins, (None, best_N, right_N), strict=True):
        total += np.bincount(bin_N, weights, minlength=NUM_BINS)

    def first(order: np.ndarray, which: np.ndarray) -> list[Example]:
        chosen = order[which[order]][:NUM_EXAMPLES].tolist()
        return [Example(first_row + n, int(labels_N[n]), int(predicted_N[n]), float(best_N[n])) for n in chosen]

    rising = np.argsort(best_N, kind="stable")
    falling = np.argsort(-best_N, kind="stable")
    found.surest_mistakes = _merged(found.surest_mistakes + first(falling, ~right_N), sign=-1)
    found.least_sure_hits = _merged(found.least_sure_hits + first(rising, right_N), sign=1)


def _merged(examples: Iterable[Example], *, sign: int) -> list[Example]:
    return sorted(examples, key=lambda example: (sign * example.probability, example.row))[:NUM_EXAMPLES]


def softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Probabilities (N, C) in float64."""
    raised_NC = np.exp(logits_NC.astype(np.float64) - logits_NC.max(1, keepdims=True))
    return np.asarray(raised_NC / raised_NC.sum(1, keepdims=True))


def wilson(num_hits: int, num_rows: int) -> tuple[float, float]:
    """The interval of 95 % for a share (Wilson 1927), which is right for small shares too."""
    share, z_squared = num_hits / num_rows, TWO_SIDED_95**2
    centre = (share + z_squared / (2 * num_rows)) / (1 + z_squared / num_rows)
    spread = share * (1 - share) / num_rows + z_squared / (4 * num_rows**2)
    half = TWO_SIDED_95 * math.sqrt(spread) / (1 + z_squared / num_rows)
    return max(0.0, centre - half), min(1.0, centre + half)
