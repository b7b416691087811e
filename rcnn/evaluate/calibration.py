"""Temperature scaling: the one number that best fits a model's probabilities to validation rows.

In: logits and labels of validation rows. Out: T of softmax(logits / T), with the least negative log-likelihood (Guo et al., "On
Calibration of Modern Neural Networks", ICML 2017). Dividing by T changes no answer, only its probability.

The best epoch was chosen by its error on the same validation rows, so they look a little better than new rows do, and T comes
out a little low. The test rows, on which the calibration error is reported before and after, took no part in either.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

LOWEST, HIGHEST = 0.05, 20.0
"""Bounds of T, which a sound model does not come near."""


def fit_temperature(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """The temperature with the least negative log-likelihood.

    It is 1 where there is no such temperature: without rows, with logits that are not finite, and where all answers are right,
    so that a lower temperature always fits better.

    The search is over log T: the likelihood has one maximum in 1 / T, and so in log T.
    """
    logits_NC = logits_NC.astype(np.float64)
    if not len(logits_NC) or not np.isfinite(logits_NC).all() or (logits_NC.argmax(1) == labels_N).all():
        return 1.0
    found = minimize_scalar(
        lambda log_t: negative_log_likelihood(logits_NC / np.exp(log_t), labels_N),
        bounds=(np.log(LOWEST), np.log(HIGHEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def negative_log_likelihood(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """The mean over rows."""
    return float(np.mean(losses_of(logits_NC, labels_N)))


def losses_of(logits_NC: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """The cross-entropy (N) of each row, float64."""
    own_N = np.take_along_axis(logits_NC.astype(np.float64), labels_N[:, None], 1)[:, 0]
    return np.asarray(logsumexp(logits_NC.astype(np.float64), axis=1) - own_N)
