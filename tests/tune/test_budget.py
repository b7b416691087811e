"""The minutes that attempts at a search share."""

from pathlib import Path

import pytest

from rcnn.storage import StageFolder, Storage
from rcnn.tune.budget import MINUTES, Budget


@pytest.fixture
def target(tmp_path: Path) -> StageFolder:
    return StageFolder(Storage(str(tmp_path)), "runs/tune-x")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_the_minutes_of_all_attempts_count(target: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("rcnn.tune.budget.time", clock)
    first = Budget(target, max_minutes=3)
    clock.now = 120
    assert not first.is_spent()  # which notes the two minutes; then it is killed
    second = Budget(target, max_minutes=3)
    assert second.minutes_used == 2
    assert not second.is_spent()
    clock.now = 181
    assert second.is_spent()
    assert Budget(target, max_minutes=3).is_spent()
    assert not Budget(target, max_minutes=5).is_spent()
    assert not Budget(target, max_minutes=0).is_spent()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"minutes": "x"}', '{"minutes": -3}'])
def test_damaged_minutes_count_as_none(target: StageFolder, damage: str) -> None:
    target.storage.write_text(target.path(MINUTES), damage)
    assert Budget(target, max_minutes=1).minutes_used == pytest.approx(0, abs=0.01)
