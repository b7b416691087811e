"""The mean of several models' probabilities, against sums by hand."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rcnn.errors import DataError
from rcnn.evaluate.ensemble import ensemble_of
from rcnn.evaluate.predictions import PREDICTIONS, build_table
from rcnn.storage import StageFolder, Storage

LABELS = np.array([0, 1, 1])


def predictions(folder: Path, name: str, probabilities: list[list[float]], ids: tuple[str, ...]) -> StageFolder:
    """A folder with the predictions of a model."""
    logits_NC = np.log(np.array(probabilities, np.float32))
    table = build_table(ids, LABELS, logits_NC, -logits_NC[np.arange(3), LABELS].astype(np.float64))
    (folder / name).mkdir()
    pq.write_table(table, folder / name / PREDICTIONS)
    return StageFolder(Storage(str(folder)), name)


def test_the_mean_of_the_probabilities_answers(tmp_path: Path) -> None:
    ids = ("a", "b", "c")
    one = predictions(tmp_path, "one", [[0.9, 0.1], [0.6, 0.4], [0.9, 0.1]], ids)  # right, wrong, wrong
    two = predictions(tmp_path, "two", [[0.4, 0.6], [0.1, 0.9], [0.4, 0.6]], ids)  # wrong, right, right
    # Means: 0.65 for class 0 (right), 0.35 (right), 0.65 (wrong).
    found = ensemble_of([one, two])
    assert (found.num_models, found.num_rows) == (2, 3)
    assert found.error == pytest.approx(1 / 3)
    assert found.mean_error == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found.gain == pytest.approx(1 / 6)


def test_predictions_of_other_rows_are_not_mixed(tmp_path: Path) -> None:
    same = [[0.5, 0.5]] * 3
    one = predictions(tmp_path, "one", same, ("a", "b", "c"))
    two = predictions(tmp_path, "two", same, ("a", "b", "d"))
    with pytest.raises(DataError, match=r"two: holds the predictions of other test rows"):
        ensemble_of([one, two])
