"""The figures of an evaluation against scikit-learn, scipy and hand sums."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import (
    brier_score_loss,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from rcnn.evaluate import predictions
from rcnn.evaluate.figures import NUM_EXAMPLES, Figures, figures_of, softmax, wilson
from rcnn.evaluate.predictions import Part, build_table, merge_parts, write_part
from rcnn.storage import StageFolder, Storage


def written(folder: Path, labels_N: np.ndarray, logits_NC: np.ndarray) -> StageFolder:
    """A stage's folder with predictions."""
    target = StageFolder(Storage(str(folder)), "reports/x")
    losses_N = -np.log(softmax(logits_NC)[np.arange(len(labels_N)), labels_N])
    part = Part(0, 0, len(labels_N))
    write_part(target, part, build_table([str(n) for n in range(len(labels_N))], labels_N, logits_NC, losses_N))
    merge_parts(target, [part])
    return target


def some_rows(num_rows: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and logits that are right in about every second row; the last class never occurs."""
    random = np.random.default_rng(0)
    labels_N = random.integers(0, num_classes - 1, num_rows)
    logits_NC = random.normal(size=(num_rows, num_classes)).astype(np.float32)
    logits_NC[np.arange(num_rows), labels_N] += 2
    return labels_N, logits_NC


@pytest.fixture
def read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums must not depend on how many rows are in memory at a time."""
    monkeypatch.setattr(predictions, "ROWS_PER_READ", 7)


@pytest.mark.usefixtures("read_in_pieces")
@pytest.mark.parametrize("num_classes", [10, 100])
def test_figures_are_those_of_scikit_learn(tmp_path: Path, num_classes: int) -> None:
    labels_N, logits_NC = some_rows(500, num_classes)
    found = figures_of(written(tmp_path, labels_N, logits_NC), num_classes)
    probabilities_NC, predicted_N, names = softmax(logits_NC), logits_NC.argmax(1), range(num_classes)
    metrics = found.metrics()
    assert (found.confusion == confusion_matrix(labels_N, predicted_N, labels=names)).all()
    assert metrics["loss"] == pytest.approx(log_loss(labels_N, probabilities_NC, labels=names))
    assert metrics["brier_score"] == pytest.approx(
        brier_score_loss(labels_N, probabilities_NC, labels=names, scale_by_half=False)
    )
    assert ("top_5_error" in metrics) == (num_classes == 100)
    if num_classes == 100:
        assert metrics["top_5_error"] == pytest.approx(
            1 - top_k_accuracy_score(labels_N, probabilities_NC, k=5, labels=names)
        )
    expected = precision_recall_fscore_support(labels_N, predicted_N, labels=names, zero_division=0)
    ours = [(each.precision or 0, each.recall or 0, each.f1 or 0, each.num_rows) for each in found.of_classes()]
    assert pytest.approx(np.array(expected)) == np.array(ours).T
    assert found.of_classes()[-1].recall is None


def test_calibration_error_by_hand() -> None:
    found = Figures(np.array([[3, 1], [0, 0]]))
    found.bins[:, 14] = (3, 2.9, 3)  # 0.1 too modest
    found.bins[:, 9] = (1, 0.6, 0)  # 0.6 too sure
    assert found.calibration_error == pytest.approx((0.1 + 0.6) / 4)


def test_bins_hold_each_row_once_and_a_certain_answer_is_in_the_last(tmp_path: Path) -> None:
    logits_NC = np.array([[100, 0], [0.1, 0], [0, 100]], np.float32)
    found = figures_of(written(tmp_path, np.array([0, 0, 0]), logits_NC), 2)
    assert found.bins[0].sum() == 3
    assert found.bins[:, 14].tolist() == [2, 2, 1]


@pytest.mark.usefixtures("read_in_pieces")
def test_examples_are_the_surest_mistakes_and_the_least_sure_hits_of_all_rows(tmp_path: Path) -> None:
    labels_N, logits_NC = some_rows(500, 10)
    found = figures_of(written(tmp_path, labels_N, logits_NC), 10)
    best_N, right_N = softmax(logits_NC).max(1), logits_NC.argmax(1) == labels_N
    for examples, which, sign in ((found.surest_mistakes, ~right_N, -1), (found.least_sure_hits, right_N, 1)):
        expected = sorted(np.flatnonzero(which), key=lambda n: sign * best_N[n])[:NUM_EXAMPLES]
        assert [example.row for example in examples] == expected
        assert all(example.label == labels_N[example.row] for example in examples)
        assert all(example.probability == pytest.approx(best_N[example.row]) for example in examples)


@given(st.integers(1, 100_000), st.floats(0, 1))
def test_the_interval_is_that_of_scipy(num_rows: int, share: float) -> None:
    hits = round(share * num_rows)
    expected = binomtest(hits, num_rows).proportion_ci(0.95, method="wilson")
    assert wilson(hits, num_rows) == pytest.approx((expected.low, expected.high), abs=1e-12)
