"""Which failures of an attempt are followed by another one, with Ray's own errors."""

from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from rcnn.config import ExecutionConfig
from rcnn.errors import ClusterError, TrainingError
from rcnn.storage import StageFolder, Storage
from rcnn.train.elastic import Waiting
from rcnn.train.loop import Stopped
from rcnn.train.ray_trainer import _Failures
from tests.plan.states import write_checkpoint_record

pytestmark = pytest.mark.long

LOST = RuntimeError("Connection closed by peer")
"""What the others say when a worker dies."""


@pytest.fixture
def target(tmp_path: Path) -> StageFolder:
    return StageFolder(Storage(str(tmp_path)), "run")


@pytest.fixture
def failures(target: StageFolder) -> _Failures:
    return _Failures(ExecutionConfig(max_failures=2), target)


def death() -> WorkerGroupError:
    return WorkerGroupError("lost", {0: LOST, 1: WorkerHealthCheckFailedError("gone", RayActorError())})


def bug(text: str = "index 7 is out of bounds") -> WorkerGroupError:
    return WorkerGroupError("failed", {0: IndexError(f"Traceback ...\nIndexError: {text}")})


def test_workers_may_die_as_often_as_allowed_and_a_new_checkpoint_starts_the_count_again(
    failures: _Failures, target: StageFolder
) -> None:
    failures.take(death())
    failures.take(death())
    write_checkpoint_record(target, epoch=0, step=7, seconds=1)
    failures.take(death())
    failures.take(RayActorError())  # the controller's
    with pytest.raises(TrainingError, match=r"execution\.max_failures = 2: workers failed more often than") as caught:
        failures.take(death())
    assert caught.value.retryable


def test_an_error_that_comes_again_at_the_same_place_ends_training(failures: _Failures, target: StageFolder) -> None:
    failures.take(bug())
    failures.take(bug("another"))
    write_checkpoint_record(target, epoch=0, step=7, seconds=1)
    failures.take(bug("another"))
    with pytest.raises(TrainingError, match="failed twice at the same place with: IndexError: another") as caught:
        failures.take(bug("another"))
    assert not caught.value.retryable


def test_too_little_memory_names_the_settings_to_change(failures: _Failures) -> None:
    error = WorkerGroupError("failed", {0: MemoryError("MemoryError: a recurrent layer has no memory")})
    failures.take(error)
    with pytest.raises(TrainingError, match=r"Lower train\.batch_size, or set execution\.recompute to true"):
        failures.take(error)


def test_an_error_of_our_own_ends_training_at_once_if_it_cannot_pass(failures: _Failures) -> None:
    passing = ClusterError("cannot be read", retryable=True)
    failures.take(WorkerGroupError("failed", {0: LOST, 1: passing}))
    with pytest.raises(ClusterError, match="cannot be read"):
        failures.take(WorkerGroupError("failed", {0: LOST, 1: passing}))
    with pytest.raises(TrainingError, match="no number"):
        failures.take(WorkerGroupError("failed", {0: TrainingError("no number"), 1: LOST}))


def test_a_stop_that_was_asked_for_does_not_count(failures: _Failures) -> None:
    for _ in range(9):
        failures.take(WorkerGroupError("failed", {0: Stopped(), 1: LOST}))
    failures.take(death())


def test_a_wait_for_room_says_so_and_has_an_end(
    failures: _Failures, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rcnn.train.elastic.room_for_workers", lambda how: 0)
    monkeypatch.setattr("rcnn.train.elastic._nodes_in_words", lambda: "head 0 of 2 cores")
    full = ControllerError(WorkerGroupStartupTimeoutError(1))
    with caplog.at_level("INFO", logger="rcnn"):
        failures.take(full)
        failures.take(full)
    said = "waiting for the cluster: 1 workers of 1 CPU cores are wanted, and there is room for 0; nodes: head 0 of 2 cores"
    assert caplog.text.count(said) == 1
    assert isinstance(failures._waiting, Waiting)
    failures._waiting._started -= 31 * 60
    with pytest.raises(
        ClusterError, match=r"there is room for 0, after 30 minutes\. Lower them, give num_workers a range"
    ):
        failures.take(full)
