"""McNemar's test against hand sums and scipy's, and the counts behind it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rcnn.errors import DataError
from rcnn.evaluate.paired import Paired
from rcnn.evaluate.predictions import compare


def test_five_rows_to_none_are_five_heads_in_a_row() -> None:
    assert Paired(100, 5, 0).p_value == pytest.approx(1 / 32)
    assert Paired(100, 0, 5).p_value == 1
    assert Paired(100, 0, 0).p_value == 1
    assert Paired(100, 5, 2).gain == 0.03


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_the_p_value_is_that_of_scipy(ours: int, theirs: int) -> None:
    if ours + theirs:
        expected = binomtest(ours, ours + theirs, alternative="greater").pvalue
        assert Paired(10_000, ours, theirs).p_value == pytest.approx(expected, rel=1e-6)


def write(file: Path, ids: list[str], correct: list[bool]) -> Path:
    pq.write_table(pa.table({"row_id": ids, "correct": correct, "loss": np.zeros(len(ids))}), file)
    return file


def test_rows_are_matched_by_id_and_not_by_place(tmp_path: Path) -> None:
    first = write(tmp_path / "a", ["1", "2", "3", "4"], [True, True, False, True])
    second = write(tmp_path / "b", ["4", "3", "2", "1"], [False, True, False, True])
    assert compare(first, second) == Paired(4, only_first=2, only_second=1)
    assert compare(second, first) == Paired(4, only_first=1, only_second=2)


def test_models_of_other_rows_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a", ["1", "2"], [True, True])
    for ids in (["1", "3"], ["1"], ["1", "2", "2"]):
        with pytest.raises(DataError, match="Evaluate both models on the same data set"):
            compare(first, write(tmp_path / "b", ids, [True] * len(ids)))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    first = write(tmp_path / "a", ["1"], [True])
    (tmp_path / "b").write_bytes(first.read_bytes()[:-9])
    with pytest.raises(DataError, match=str(tmp_path / "b")):
        compare(first, tmp_path / "b")


def test_the_interval_of_the_gain_is_agrestis_and_mins() -> None:
    # By hand: 30.5 and 20.5 of 202 rows; variance (51 - 10^2 / 202) / 202^2.
    low, high = Paired(200, 30, 20).gain_interval
    half = 1.959964 * (51 - 100 / 202) ** 0.5 / 202
    assert (low, high) == pytest.approx((10 / 202 - half, 10 / 202 + half), rel=1e-6)


def test_the_interval_holds_the_true_gain_in_95_of_100_samples() -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(1000, [0.03, 0.01, 0.96], size=4000)
    bounds = [Paired(1000, int(first), int(second)).gain_interval for first, second, _ in counts]
    assert 0.94 < np.mean([low < 0.02 < high for low, high in bounds]) < 0.96
