"""Scoring predicts its end: pieces of known speed, and a clock that they advance."""

import pytest

from rcnn.evaluate.pace import ROUNDS_TIMED, Pace


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("num_rows", "predicted", "seconds"),
    [
        (100, 5 + 9, 5 + 9),
        (95, 5 + 8.5, 5 + 9),  # a last batch of half the rows is expected to take half the time
        (10, 5, 5),
        (20, 2 * 5, 5 + 1),  # too few to time others than the first
        (10 * (1 + ROUNDS_TIMED), 8, 8),
    ],
)
def test_the_first_pieces_predict_the_whole(num_rows: int, predicted: float, seconds: float) -> None:
    clock = Clock()
    pace = Pace(num_rows, num_at_once=1, clock=clock)
    assert pace.images_per_second == 0
    clock.now += 60  # the model is loaded
    pace.start()
    for start in range(0, num_rows, 10):
        clock.now += 1 if start else 5
        pace.advance(min(10, num_rows - start))
    assert (pace.predicted_seconds, pace.seconds, pace.started) == (predicted, seconds, 160.0)
    assert pace.images_per_second == num_rows / seconds


def test_pieces_that_end_together_are_counted_as_a_round() -> None:
    clock = Clock()
    pace = Pace(1000, num_at_once=4, clock=clock)
    pace.start()
    for number in range(100):
        clock.now += 2 if number % 4 == 0 else 0
        pace.advance(10)
        if number == 0:
            assert pace.predicted_seconds == 25 * 2
    assert pace.seconds == 50
    assert pace.predicted_seconds == pytest.approx(50, rel=0.05)
