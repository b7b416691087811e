"""The marks of the flow runs that follow a job: who counts as living."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows import followers as module
from flows.followers import Followers
from rcnn.storage import Storage

pytestmark = pytest.mark.long

FOLDER = "runs/jobs/rcnn-x"


def followers(tmp_path: Path, flow_run: str) -> Followers:
    return Followers(Storage(str(tmp_path)), FOLDER, flow_run)


def mark(tmp_path: Path, flow_run: str, seconds_old: float) -> Path:
    """The mark of a flow run that renewed it some time ago and does not any more."""
    with followers(tmp_path, flow_run).following():
        file = tmp_path / FOLDER / f"followed-by-{flow_run}"
    os.utime(file, (time.time() - seconds_old,) * 2)
    return file


def test_our_mark_is_seen_by_a_later_attempt_of_the_same_flow_run_alone(tmp_path: Path) -> None:
    assert not followers(tmp_path, "a").include_us()
    mark(tmp_path, "a", 300)
    assert followers(tmp_path, "a").include_us()
    assert not followers(tmp_path, "b").include_us()
    with followers(tmp_path, "").following():
        pass
    assert not followers(tmp_path, "").include_us()  # outside of a flow there are no attempts


def test_the_only_one_and_one_beside_old_marks_are_the_last(tmp_path: Path) -> None:
    mark(tmp_path, "a", 0)
    assert followers(tmp_path, "a").leave()
    mark(tmp_path, "killed", 120)
    mark(tmp_path, "b", 0)
    assert followers(tmp_path, "b").leave()
    assert not followers(tmp_path, "b").include_us()


def test_one_beside_a_mark_that_is_renewed_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_RENEWALS", 0.2)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0.1)
    mark(tmp_path, "a", 0)
    with followers(tmp_path, "living").following():
        assert not followers(tmp_path, "a").leave()


def test_a_young_mark_of_a_killed_flow_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_ALIVE", 3)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0.1)
    mark(tmp_path, "killed", 1)
    started = time.monotonic()
    assert followers(tmp_path, "a").leave()
    assert 1.5 < time.monotonic() - started < 3


def test_a_flow_that_was_killed_on_this_machine_is_known_to_be_dead(tmp_path: Path) -> None:
    code = f"""
import os
from flows.followers import Followers
from rcnn.storage import Storage
with Followers(Storage({str(tmp_path)!r}), {FOLDER!r}, "killed").following():
    os._exit(1)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1
    assert (tmp_path / FOLDER / "followed-by-killed").exists()
    assert not followers(tmp_path, "a").are_there()
    started = time.monotonic()
    assert followers(tmp_path, "a").leave()
    assert time.monotonic() - started < module.SECONDS_ALIVE / 2


def test_a_flow_that_starts_to_follow_meanwhile_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0.1)
    mark(tmp_path, "killed", 1)
    timer = threading.Timer(0.5, lambda: mark(tmp_path, "new", 0))
    timer.start()
    assert not followers(tmp_path, "a").leave()
    timer.join()


def test_the_storages_clock_counts_and_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "time", lambda: 0.0)
    mark(tmp_path, "killed", 0)
    os.utime(tmp_path / FOLDER / "followed-by-killed", (1.0, 1.0))
    assert followers(tmp_path, "a").leave()


def test_old_marks_of_others_are_removed(tmp_path: Path) -> None:
    ours, young, old = (mark(tmp_path, name, age) for name, age in (("a", 300), ("b", 0), ("c", 300)))
    followers(tmp_path, "a").forget_dead()
    assert ours.exists()
    assert young.exists()
    assert not old.exists()


def test_a_mark_that_is_renewed_is_seen_by_a_clock_of_whole_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0)
    looks = iter([0.0, 1.0, 2.0, 0.0])  # as an object store tells the age: renewed in the second of the first look
    monkeypatch.setattr(Followers, "_ages", lambda self: {"followed-by-living": next(looks)})
    assert not followers(tmp_path, "a").leave()
