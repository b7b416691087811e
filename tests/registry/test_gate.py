"""The gate on simulated models: how often it promotes by chance, and how often it sees that a model is better."""

import numpy as np
import pytest

from rcnn.evaluate.paired import Paired
from rcnn.registry.gate import FALSE_PROMOTIONS, Standing, judge, level_of, not_comparable

NEW = Standing(2, 0.021, "same")
NUM_ROWS = 10_000
HARD_ROWS = 400
"""Rows that a model may get wrong, each with its own probability; the others are easy for all: 1 % test error."""


def test_a_clear_difference_is_enough_and_the_verdict_says_what_it_rests_on() -> None:
    verdict = judge(NEW, 1, Paired(NUM_ROWS, 60, 20), look=1)
    assert verdict.alias == "champion"
    for words in (
        "better: 2.10 %",
        "2.50 % of version 1",
        "60 of 10,000 rows are right here",
        "20 the other way",
        "look 1",
    ):
        assert words in verdict.reason


def test_a_difference_that_may_be_chance_says_what_would_do() -> None:
    verdict = judge(NEW, 1, Paired(NUM_ROWS, 55, 45), look=1)
    assert verdict.alias == "challenger"
    assert verdict.reason.startswith("not shown to be better")
    assert verdict.reason.endswith("; 61 to 39 would have been enough")
    assert judge(NEW, 1, Paired(NUM_ROWS, 61, 39), look=1).alias == "champion"
    assert judge(NEW, 1, Paired(NUM_ROWS, 60, 40), look=1).alias == "challenger"


def test_a_worse_model_and_an_equal_one_stay_challengers() -> None:
    for counts in ((20, 60), (0, 0), (30, 30)):
        verdict = judge(NEW, 1, Paired(NUM_ROWS, *counts), look=1)
        assert verdict.alias == "challenger"
        assert verdict.reason.startswith("not better")


def test_a_champion_without_predictions_of_these_rows_stays_champion() -> None:
    verdict = not_comparable(NEW, Standing(1, 0.9, "other"))
    assert verdict.alias == "challenger"
    assert "cannot be compared" in verdict.reason
    assert "rcnn registry promote 2 --reason" in verdict.reason


def test_the_levels_of_all_looks_add_up_to_the_budget() -> None:
    levels = [level_of(look) for look in range(1, 100_001)]
    assert levels == sorted(levels, reverse=True)
    assert sum(levels) < FALSE_PROMOTIONS
    rest = 100_000**-0.6 / 0.6 * levels[0]  # the integral of the levels that come after
    assert sum(levels) + rest == pytest.approx(FALSE_PROMOTIONS, rel=1e-4)


def promotions(random: np.random.Generator, num_challengers: int) -> tuple[bool, int]:
    """Whether the gate promotes any of these challengers, and how many the rule "fewer errors" promotes, one after another.

    All models are equally good: they get a row wrong with the same probability, which differs from row to row.
    """
    error_rates = random.beta(0.5, 1.5, HARD_ROWS)
    right = random.random((1 + num_challengers, HARD_ROWS), np.float32) > error_rates.astype(np.float32)
    champion, challengers = right[0], right[1:]
    won, lost = (challengers & ~champion).sum(1), (champion & ~challengers).sum(1)
    any_by_test = any(
        Paired(NUM_ROWS, int(ours), int(theirs)).p_value <= level_of(look)
        for look, (ours, theirs) in enumerate(zip(won, lost, strict=True), start=1)
    )
    errors = (~right).sum(1)
    fewest_before = np.minimum.accumulate(errors)[:-1]
    return any_by_test, int((errors[1:] < fewest_before).sum())


@pytest.mark.long
def test_of_1000_equally_good_challengers_the_gate_promotes_any_with_at_most_5_percent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    random, num_repeats = np.random.default_rng(0), 1000
    found = np.array([promotions(random, 1000) for _ in range(num_repeats)])
    by_test, by_count = found.T
    with capsys.disabled():
        print(
            f"\n1,000 equally good challengers, {num_repeats:,} times: the gate promoted any in {by_test.mean():.1%}; "
            f"'fewer errors' promoted {by_count.mean():.1f} of them on average, and any in {np.mean(by_count > 0):.1%}"
        )
    assert by_test.mean() <= FALSE_PROMOTIONS
    assert by_count.mean() > 3  # the rule that it replaced


def power(error: float, look: int, *, num_models: int = 2000) -> float:
    """How often a challenger replaces a champion with 2.4 % error that makes 60 % of the challenger's errors too."""
    random = np.random.default_rng(look)
    same = 0.6 * error * NUM_ROWS
    won, lost = (random.poisson(each * NUM_ROWS - same, num_models) for each in (0.024, error))
    return float(
        np.mean([Paired(NUM_ROWS, int(w), int(n)).p_value <= level_of(look) for w, n in zip(won, lost, strict=True)])
    )


def test_a_better_model_is_promoted_with_the_power_that_the_readme_states() -> None:
    assert [power(0.021, look) for look in (1, 10)] == pytest.approx([0.52, 0.12], abs=0.02)
    assert [power(0.018, look) for look in (1, 10)] == pytest.approx([0.98, 0.81], abs=0.02)
