"""Several models as one: the mean of their probabilities on each test row, from predictions that are stored already."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from rcnn.errors import DataError
from rcnn.evaluate.predictions import read_predictions
from rcnn.storage import StageFolder


@dataclass(frozen=True)
class Ensemble:
    """What the mean of the probabilities gives.

    Attributes:
        num_models: how many were averaged.
        num_rows: test rows.
        error: share of the rows that it answers wrongly.
        mean_error: mean of the models' own errors.
    """

    num_models: int
    num_rows: int
    error: float
    mean_error: float

    @property
    def gain(self) -> float:
        """How much lower its error is than the models' mean, for as many forward passes as there are models."""
        return self.mean_error - self.error


def ensemble_of(evaluations: Sequence[StageFolder]) -> Ensemble:
    """The ensemble of the models whose predictions on one set of test rows are in some folders.

    Raises:
        DataError: predictions are missing, damaged, or of other rows.
    """
    members = [_probabilities(target) for target in evaluations]
    (ids_N, labels_N, _), *others = members
    for target, (other_N, _, _) in zip(evaluations[1:], others, strict=True):
        if not np.array_equal(ids_N, other_N):
            raise DataError(
                "holds the predictions of other test rows than the first model's",
                where=target.storage.uri(target.name),
                remedy="Evaluate all models on one data set",
            )
    answers = [each.argmax(1) for *_, each in members]
    mean_NC = np.mean([each for *_, each in members], axis=0)
    return Ensemble(
        num_models=len(members),
        num_rows=len(labels_N),
        error=float((mean_NC.argmax(1) != labels_N).mean()),
        mean_error=float(np.mean([(answer_N != labels_N).mean() for answer_N in answers])),
    )


def _probabilities(target: StageFolder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row ids (N), labels (N) and probabilities (N, classes) of a model."""
    parts = list(read_predictions(target, ("row_id", "label", "logits")))
    ids_N, labels_N, logits_NC = (
        np.concatenate([part[name] for part in parts]) for name in ("row_id", "label", "logits")
    )
    return ids_N, labels_N, softmax(logits_NC.astype(np.float64), axis=1)
