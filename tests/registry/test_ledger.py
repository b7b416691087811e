"""Which look a version has, whatever order the notes of two processes arrive in."""

import itertools

import pytest

from rcnn.evaluate.paired import Paired
from rcnn.registry.gate import FALSE_PROMOTIONS, Standing, Verdict, level_of
from rcnn.registry.ledger import LOOK_TAG, Look, earlier_look, looks_of, number_of_look, with_look

NOBODY_YET = Verdict("champion", "there was no champion")
NEW = Standing(3, 0.02, "rows")


def tags(*numbers: int, digest: str = "rows") -> dict[str, str]:
    """The tags of a version that had looks with these numbers; 0: one that cost nothing."""
    found = {"test_digest": digest}
    for number in numbers:
        look = Look.of(Standing(1, 0.02, digest), 1, number, Paired(10, 1, 0), NOBODY_YET)
        found |= with_look(found, look)
    return found


def test_the_first_comparison_is_look_1_though_the_champion_came_before_it() -> None:
    assert number_of_look(2, "rows", {1: tags(0), 2: tags()}, 0) == 1


def test_looks_at_other_rows_do_not_count() -> None:
    assert number_of_look(3, "rows", {1: tags(0), 2: tags(1, digest="other"), 3: tags()}, 0) == 1


def test_a_deleted_version_has_been_paid_for() -> None:
    assert number_of_look(9, "rows", {1: tags(0), 9: tags()}, num_known=7) == 8
    assert number_of_look(9, "rows", {1: tags(0), 8: tags(7), 9: tags()}, num_known=0) == 8


def test_a_version_that_meets_another_champion_has_another_look() -> None:
    assert number_of_look(2, "rows", {1: tags(0), 2: tags(1), 3: tags(2)}, 2) == 3


@pytest.mark.parametrize("sees_notes", [True, False])
@pytest.mark.parametrize("order", list(itertools.permutations(range(2, 6))))
def test_versions_that_ask_at_once_never_spend_more_than_the_budget(order: tuple[int, ...], sees_notes: bool) -> None:
    """In any order, and whether each sees the notes of those that came before it or all ask before the first note."""
    versions, numbers = {1: tags(0)} | {version: tags() for version in order}, []
    for version in order:
        known = max(numbers, default=0) if sees_notes else 0
        numbers.append(number_of_look(version, "rows", versions, known))
        if sees_notes:
            versions[version] = tags(numbers[-1])
    assert sum(map(level_of, numbers)) <= sum(level_of(look) for look in range(1, 5)) < FALSE_PROMOTIONS


def test_asking_again_about_the_same_rows_and_champion_gives_the_verdict_that_there_was() -> None:
    look = Look.of(NEW, 1, 4, Paired(500, 30, 10), Verdict("challenger", "because"))
    noted = with_look({}, look)
    assert earlier_look(noted, "rows", 1) == look
    assert earlier_look(noted, "rows", 2) is None
    assert earlier_look(noted, "other rows", 1) is None
    assert looks_of(noted)[0].summary == "not shown better: p = 0.0011, needs 0.0024 (look 4)"


def test_a_tag_that_somebody_wrote_by_hand_is_not_a_look() -> None:
    assert looks_of({LOOK_TAG: "three"}) == ()
    assert looks_of({LOOK_TAG: "[{}]"}) == ()
