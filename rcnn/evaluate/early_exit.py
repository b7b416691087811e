"""Early exit: fewer recurrent steps for images on which the network is sure after a few, all T for the others.

In: a network that answers well after any number of steps (`train.any_t`), and its logits on validation rows. Out: after how
many steps to look, and how sure it must be. Layers depend on the last state of the layer before, so all T steps begin anew: an
image that is not sure costs both passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax
from torch import Tensor

from rcnn.evaluate.unrolled import num_steps_of, shortened
from rcnn.model.classifier import Classifier
from rcnn.text import counted

TOLERANCE = 0.001
"""By how much the error on the validation rows may rise, as a share of them."""


@dataclass(frozen=True)
class Exit:
    """When an answer holds early.

    Attributes:
        num_steps: after how many recurrent steps.
        confidence: least probability of the answer.
    """

    num_steps: int
    confidence: float


class EarlyExit:
    """A model that does all T steps only for those images of which it is not sure after fewer.

    Args:
        model: for uint8 images (N, C, H, W).
        exit: when an answer holds.
    """

    def __init__(self, model: Classifier, exit: Exit):
        self.model, self.exit = model, exit
        self._shorter = shortened(model, exit.num_steps)
        self._passed_on: list[int] = []  # a number for each batch: threads may append to a list

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> logits (N, classes)."""
        logits_NC = self._shorter(images_NCHW)
        is_unsure_N = logits_NC.float().softmax(1).amax(1) < self.exit.confidence
        if num_unsure := int(is_unsure_N.sum()):
            logits_NC = logits_NC.index_put((is_unsure_N,), self.model(images_NCHW[is_unsure_N]))
        self._passed_on.append(num_unsure)
        return logits_NC

    @property
    def num_passed_on(self) -> int:
        """Images, up to now, that took all T steps too."""
        return sum(self._passed_on)


def choose_exit(logits_of: Mapping[int, np.ndarray], labels_N: np.ndarray, costs: Sequence[float]) -> Exit | None:
    """The cheapest exit whose error is at most `TOLERANCE` above that of all T steps; None if no exit is cheaper than they are.

    Args:
        logits_of: logits (N, classes) after t steps, for each t up to T.
        labels_N: the labels.
        costs: of t steps for t < T, as a share of the cost of T.
    """
    *fewer, last = sorted(logits_of)
    wrong_N = logits_of[last].argmax(1) != labels_N
    best, least = None, 1.0
    for num_steps in fewer:
        confidence, share = _least_confidence(logits_of[num_steps], labels_N, wrong_N)
        cost = costs[num_steps] + 1 - share
        if cost < least:
            best, least = Exit(num_steps, confidence), cost
    return best


def _least_confidence(logits_NC: np.ndarray, labels_N: np.ndarray, wrong_N: np.ndarray) -> tuple[float, float]:
    """The lowest bound on the answer's probability that keeps the error, and the share of rows above it."""
    sure_N = softmax(logits_NC.astype(np.float64), axis=1).max(1)
    order_N = np.argsort(-sure_N, kind="stable")
    worse_N = (logits_NC.argmax(1) != labels_N).astype(int) - wrong_N
    num_worse_N = worse_N[order_N].cumsum()  # more errors than with all steps, if the first n rows exit
    fine_N = np.flatnonzero(num_worse_N <= TOLERANCE * len(labels_N))
    if not len(fine_N):
        return 1.0, 0.0
    confidence = float(sure_N[order_N[fine_N[-1]]])
    return confidence, float((sure_N >= confidence).mean())


def with_steps(model: Classifier, num_steps: int | None, confidence: float) -> Classifier | EarlyExit:
    """The model with fewer recurrent steps: for all images, or for those of which it is sure by `confidence`.

    Args:
        model: with T steps.
        num_steps: None: all T.
        confidence: least probability of an answer that holds after `num_steps`; 0: every answer.

    Raises:
        ValueError: the model has fewer steps than that.
    """
    if num_steps is None:
        return model
    most = num_steps_of(model)
    if not 0 <= num_steps <= most:
        raise ValueError(f"is {num_steps}, and the model has {counted(most, 'recurrent step')}")
    if num_steps < most and confidence:
        return EarlyExit(model, Exit(num_steps, confidence))
    return shortened(model, num_steps)
