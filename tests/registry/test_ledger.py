"""What is remembered of a look."""

from rcnn.evaluate.paired import Paired
from rcnn.registry.gate import Standing, Verdict
from rcnn.registry.ledger import LOOK_TAG, Look, earlier_look, looks_of, with_look

NOBODY_YET = Verdict("champion", "there was no champion")
NEW = Standing(3, 0.02, "rows")


def test_asking_again_about_the_same_rows_and_champion_gives_the_verdict_that_there_was() -> None:
    look = Look.of(NEW, 1, 4, Paired(500, 30, 10), Verdict("challenger", "because"))
    noted = with_look({}, look)
    assert earlier_look(noted, "rows", 1) == look
    assert earlier_look(noted, "rows", 2) is None
    assert earlier_look(noted, "other rows", 1) is None
    assert looks_of(noted)[0].summary == "not shown better: p = 0.0011, needs 0.0024 (look 4)"


def test_a_champion_that_had_no_predictions_may_have_them_by_now() -> None:
    noted = with_look({}, Look.without_test(NEW, 1, Verdict("challenger", "cannot be compared")))
    assert earlier_look(noted, "rows", 1) is None
    first = with_look({}, Look.without_test(NEW, 0, Verdict("champion", "there was no champion")))
    assert earlier_look(first, "rows", 0) is not None


def test_a_tag_that_somebody_wrote_by_hand_is_not_a_look() -> None:
    assert looks_of({LOOK_TAG: "three"}) == ()
    assert looks_of({LOOK_TAG: "[{}]"}) == ()
