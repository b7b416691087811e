"""Scoring predicts its end: rows of known speed, and a clock that they advance."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rcnn.evaluate.timed_rows import NUM_TIMED_BATCHES, TimedRows


class SlowRows:
    """Rows whose first batch takes 5 s, and the others 1 s each."""

    def __init__(self, num_rows: int):
        self.num_rows, self.now = num_rows, 100.0

    def __len__(self) -> int:
        return self.num_rows

    def batches(self, batch_size: int, device: Any) -> Iterator[Any]:
        for start in range(0, self.num_rows, batch_size):
            self.now += 1 if start else 5
            yield torch.zeros(min(batch_size, self.num_rows - start))


@pytest.mark.parametrize(
    ("num_rows", "predicted", "seconds"),
    [
        (100, 5 + 9, 5 + 9),
        (95, 5 + 9, 5 + 9),  # the last batch is counted as a whole one
        (10, 5, 5),
        (20, 2 * 5, 5 + 1),  # too few to time others than the first
        (10 * (1 + NUM_TIMED_BATCHES), 8, 8),
    ],
)
def test_the_first_batches_predict_the_whole(num_rows: int, predicted: float, seconds: float) -> None:
    rows = SlowRows(num_rows)
    timed = TimedRows(rows, lambda: rows.now)  # type: ignore[arg-type]
    assert sum(len(batch) for batch in timed.batches(10, torch.device("cpu"))) == num_rows
    assert (timed.predicted_seconds, timed.seconds, timed.started) == (predicted, seconds, 100.0)
