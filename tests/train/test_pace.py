"""The clock of a run, with a clock that the test moves."""

import time
from typing import Any

import pytest
import torch

from rcnn.train.pace import TIMED_STEPS, WARMUP_STEPS, Forecast, Pace

NUM_STEPS = 100


class Clock:
    """A time that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def pace_of(forecasts: list[Forecast], **options: Any) -> Pace:
    device = torch.device("cpu")
    return Pace(
        device, num_steps=2 * NUM_STEPS, num_epochs=2, validation_steps=30, on_forecast=forecasts.append, **options
    )  # type: ignore[arg-type]


def test_a_limit_may_follow_from_the_forecast(clock: Clock) -> None:
    pace = pace_of([], limit_of=lambda forecast: 3 * forecast.seconds_left)
    clock.now += 1e6
    assert not pace.is_over(0)
    clock.now -= 1e6
    take_steps(pace, clock, WARMUP_STEPS + TIMED_STEPS, seconds=1)
    limit = pace.max_seconds
    assert limit > 2 * NUM_STEPS
    clock.now += limit / 3
    assert not pace.is_over(0)
    clock.now += limit
    assert pace.is_over(0)


def take_steps(pace: Pace, clock: Clock, count: int, seconds: float) -> None:
    for _ in range(count):
        clock.now += seconds
        pace.after_step()


def test_the_forecast_leaves_the_slow_first_steps_out(clock: Clock) -> None:
    forecasts: list[Forecast] = []
    pace = pace_of(forecasts)
    take_steps(pace, clock, WARMUP_STEPS, seconds=50)
    take_steps(pace, clock, TIMED_STEPS, seconds=2)
    [forecast] = forecasts
    steps_left = 2 * NUM_STEPS - WARMUP_STEPS - TIMED_STEPS
    assert forecast.seconds_left == pytest.approx(2 * steps_left + 2 * 30 * 2 / 3)  # scoring: a third of a step
    take_steps(pace, clock, NUM_STEPS, seconds=9)
    assert len(forecasts) == 1


def test_a_forecast_ends_at_the_limit(clock: Clock) -> None:
    forecasts: list[Forecast] = []
    pace = pace_of(forecasts, max_seconds=300, seconds_spent=200)
    take_steps(pace, clock, WARMUP_STEPS + TIMED_STEPS, seconds=2)
    assert forecasts[0].seconds_left == pytest.approx(300 - 200 - 2 * (WARMUP_STEPS + TIMED_STEPS))


def test_the_time_is_up_when_a_step_and_a_validation_no_longer_fit(clock: Clock) -> None:
    pace = pace_of([], max_seconds=200)
    take_steps(pace, clock, 88, seconds=2)  # 176 s; a step of 2 s and a validation of 20 s fit into 200 s
    assert not pace.is_over()
    take_steps(pace, clock, 2, seconds=2)
    assert pace.is_over()
    pace.after_validation(seconds=10)  # it takes less than was thought
    assert not pace.is_over()


def test_without_a_limit_the_time_is_never_up(clock: Clock) -> None:
    pace = pace_of([])
    clock.now += 1e9
    assert not pace.is_over()
