"""The temperature, against labels that were drawn with a known one, scikit-learn's log loss, and torch."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import log_loss

from rcnn.evaluate.calibration import HIGHEST, fit_temperature, losses_of, negative_log_likelihood


def drawn(temperature: float, num_rows: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits of five classes, and labels that follow the probabilities at a temperature."""
    rng = np.random.default_rng(1)
    logits_NC = rng.normal(0, 3, (num_rows, 5)).astype(np.float32)
    chances_NC = softmax(logits_NC.astype(np.float64) / temperature, axis=1)
    return logits_NC, (rng.random((num_rows, 1)) > chances_NC.cumsum(1)).sum(1).clip(max=4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_of_the_labels_is_found(temperature: float) -> None:
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.03)


def test_no_temperature_near_it_has_a_lower_log_loss() -> None:
    logits_NC, labels_N = drawn(1.7, num_rows=300)
    found = fit_temperature(logits_NC, labels_N)

    def loss(temperature: float) -> float:
        probabilities_NC = softmax(logits_NC.astype(np.float64) / temperature, axis=1)
        return log_loss(labels_N, probabilities_NC, labels=range(5))

    assert negative_log_likelihood(logits_NC / found, labels_N) == pytest.approx(loss(found))
    assert all(loss(found) < loss(found * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2))


def test_losses_are_torchs_cross_entropies() -> None:
    logits_NC, labels_N = drawn(1, num_rows=50)
    truth_N = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits_NC).double(), torch.from_numpy(labels_N), reduction="none"
    )
    np.testing.assert_allclose(losses_of(logits_NC, labels_N), truth_N.numpy(), rtol=1e-12)


def test_perfect_answers_say_nothing_of_the_temperature_and_bad_ones_meet_its_bound() -> None:
    logits_NC = np.eye(3, dtype=np.float32) * 5
    assert fit_temperature(logits_NC, np.arange(3)) == 1
    assert fit_temperature(logits_NC, np.array([1, 2, 0])) == pytest.approx(HIGHEST, rel=1e-3)


def test_a_network_that_diverged_or_saw_no_rows_has_temperature_1() -> None:
    assert fit_temperature(np.full((4, 3), np.nan, np.float32), np.zeros(4, np.int64)) == 1
    assert fit_temperature(np.zeros((0, 3), np.float32), np.zeros(0, np.int64)) == 1
