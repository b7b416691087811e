"""What an attempt at a search has to itself, and what it shares with the attempts before it."""

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rcnn.storage import StageFolder, Storage
from rcnn.tune.attempt import MINUTES, Budget, only_attempt, scratch


@pytest.fixture
def target(tmp_path: Path) -> StageFolder:
    return StageFolder(Storage(str(tmp_path)), "runs/tune-x")


HOLD = """
import sys
from rcnn.storage import StageFolder, Storage
from rcnn.tune.attempt import only_attempt, scratch

target = StageFolder(Storage(sys.argv[1]), "runs/tune-x")
with only_attempt(target), scratch(target) as folder:
    target.storage.write_text(folder + "/state", "")
    print("holds", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_waits_for_the_first_and_a_killed_one_leaves_nothing(
    target: StageFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entered = threading.Event()

    def enter() -> None:
        with only_attempt(target), scratch(target):
            entered.set()

    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with first, caplog.at_level("INFO", "rcnn"):
        assert first.stdout
        assert first.stdout.readline() == "holds\n"
        second = threading.Thread(target=enter)
        second.start()
        assert not entered.wait(0.5)
        [kept] = target.storage.list_folders(target.name)  # the scratch folder of the first
        first.kill()
        second.join(timeout=30)
    assert entered.is_set()
    assert not target.storage.exists(target.path(kept))
    assert [each.message for each in caplog.records] == [
        f"  process {first.pid} on {socket.gethostname()} is running the same search: waiting for it to end"
    ]


def test_the_scratch_folder_of_another_machine_is_left(target: StageFolder) -> None:
    target.storage.write_text(target.path("ray-elsewhere-0a1b2c3d/state"), "")
    with scratch(target) as own:
        target.storage.write_text(f"{own}/state", "")
        assert len(target.storage.list_folders(target.name)) == 2
    assert target.storage.list_folders(target.name) == ["ray-elsewhere-0a1b2c3d"]


def test_an_object_store_is_locked_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with only_attempt(StageFolder(Storage("s3://bucket/prefix"), "runs/tune-x")):
        assert len(list(tmp_path.rglob("*runs-tune-x.lock"))) == 1


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_the_minutes_of_all_attempts_count(target: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("rcnn.tune.attempt.time", clock)
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
