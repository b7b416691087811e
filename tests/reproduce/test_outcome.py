"""Means, intervals and verdicts, against scipy and figures worked out by hand."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from rcnn.reproduce.outcome import Outcome

ERRORS = (0.0036, 0.0041, 0.0039, 0.0044, 0.0040)


def test_mean_spread_and_interval_are_those_of_a_prediction_interval() -> None:
    outcome = Outcome(ERRORS, num_rows=10_000, published=0.0042)
    assert outcome.mean == pytest.approx(np.mean(ERRORS))
    assert outcome.spread == pytest.approx(np.std(ERRORS, ddof=1))
    low, high = stats.t.interval(0.95, 4, loc=np.mean(ERRORS), scale=np.std(ERRORS, ddof=1) * math.sqrt(1.2))
    assert outcome.half_width == pytest.approx((high - low) / 2)


def test_the_interval_holds_one_more_run_in_95_of_100_cases() -> None:
    """Draws six runs from one distribution, thousands of times: the sixth falls within the interval of the others."""
    draws = np.random.default_rng(0).normal(0.004, 0.0003, (4000, 6))
    hits = [
        abs(statistics.fmean(runs[:5]) - runs[5]) <= Outcome(tuple(runs[:5]), 10_000, runs[5]).half_width
        for runs in draws.tolist()
    ]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.012)


def test_one_seed_has_the_interval_of_two_independent_models() -> None:
    outcome = Outcome((0.10,), num_rows=10_000, published=0.09)
    assert outcome.spread is None
    assert outcome.half_width == pytest.approx(1.96 * math.sqrt(2 * 0.1 * 0.9 / 10_000), rel=1e-4)


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (Outcome((), 0, 0.0042), "not run"),
        (Outcome(ERRORS, 10_000, 0.0042), "reproduced"),
        (Outcome(ERRORS, 10_000, 0.0060), "better"),
        (Outcome(ERRORS, 10_000, 0.0020), "worse"),
        (Outcome((0.0042, 0.0042), 10_000, 0.00425), "reproduced"),  # no spread, and published with two decimals
        (Outcome(ERRORS, 10_000, 0.0042, is_comparable=False), "not comparable"),
        (Outcome(ERRORS, 10_000, None), "not published"),
    ],
)
def test_verdicts(outcome: Outcome, verdict: str) -> None:
    assert outcome.verdict == verdict
