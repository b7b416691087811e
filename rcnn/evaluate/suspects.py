"""Which labels look wrong, from the probabilities that a model gives them: confident learning.

In: labels and logits of rows that the model has not learned from. Out: for each row the most probable other class, by how much
the model prefers it, and whether the row is suspect. The method is that of Northcutt, Jiang and Chuang, "Confident Learning:
Estimating Uncertainty in Dataset Labels" (JAIR 70, 2021): a row counts for a class if its probability of that class is at least
the mean of the rows with that label, so that a model which is unsure of a class does not make all of its rows suspect. Rows are
ranked by the normalised margin: the probability of the label, minus that of the most probable other class.

Rows that the model has learned from are ranked by their loss instead: a network fits wrong labels as well, but late and less.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from rcnn.evaluate.figures import softmax

Rows = dict[str, np.ndarray]
"""Some rows: `label` (N), `loss` (N), `logits` (N, C), as `read_predictions` gives them."""


@dataclass(frozen=True)
class Suspicion:
    """What the model says of the labels of N rows.

    Attributes:
        label: as given (N).
        suggested: the most probable other class (N).
        label_probability, suggested_probability: of both (N).
        loss: cross-entropy of the label (N).
        is_suspect: whether the model is confident that the row belongs to another class (N).
    """

    label: np.ndarray
    suggested: np.ndarray
    label_probability: np.ndarray
    suggested_probability: np.ndarray
    loss: np.ndarray
    is_suspect: np.ndarray

    def order(self, *, is_seen: bool) -> np.ndarray:
        """The rows, the most suspect first: by margin, or by loss where the model has learned from them (`is_seen`)."""
        margin = self.label_probability - self.suggested_probability
        return np.lexsort((margin, -self.loss)) if is_seen else np.lexsort((-self.loss, margin))


def find_suspects(read: Callable[[], Iterable[Rows]], num_classes: int) -> Suspicion:
    """Judges the labels of all rows.

    Args:
        read: yields all rows, some at a time; called twice.
        num_classes: C.
    """
    thresholds_C = _thresholds(read(), num_classes)
    parts = [_judge(rows, thresholds_C) for rows in read()]
    names = Suspicion.__dataclass_fields__
    return Suspicion(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _thresholds(parts: Iterable[Rows], num_classes: int) -> np.ndarray:
    """For each class, the mean probability of the rows with that label (C); infinite for a class without rows."""
    sums, counts = np.zeros(num_classes), np.zeros(num_classes)
    for rows in parts:
        own_N = _of(softmax(rows["logits"]), rows["label"])
        sums += np.bincount(rows["label"], own_N, minlength=num_classes)
        counts += np.bincount(rows["label"], minlength=num_classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)


def _judge(rows: Rows, thresholds_C: np.ndarray) -> Suspicion:
    probabilities_NC, labels_N = softmax(rows["logits"]), rows["label"]
    confident_NC = np.where(probabilities_NC >= thresholds_C, probabilities_NC, -1.0)
    believed_N = confident_NC.argmax(1)
    others_NC = probabilities_NC.copy()
    np.put_along_axis(others_NC, labels_N[:, None], -1.0, 1)
    suggested_N = others_NC.argmax(1)
    return Suspicion(
        label=labels_N,
        suggested=suggested_N,
        label_probability=_of(probabilities_NC, labels_N),
        suggested_probability=_of(probabilities_NC, suggested_N),
        loss=rows["loss"],
        is_suspect=(confident_NC.max(1) >= 0) & (believed_N != labels_N),
    )


def _of(values_NC: np.ndarray, classes_N: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values_NC, classes_N[:, None], 1)[:, 0]
