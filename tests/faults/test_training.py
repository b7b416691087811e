"""A training that loses workers, drivers and nodes ends with the bits that it would have had."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.kills import Training, _finish, _wait_for_progress, run

pytestmark = pytest.mark.slow

SECONDS_TO_NOTICE = 90  # a node that joins or leaves; a minute, and the start of the workers


def test_kills_of_workers_and_drivers_change_no_bit(tmp_path: Path) -> None:
    certificate = run(6, 1, tmp_path)
    assert certificate.found == certificate.expected, certificate
    assert sum(certificate.kills.values()) == 6
    assert max(certificate.seconds_lost) < 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_answered_with_a_checkpoint_within_ten_seconds(tmp_path: Path, number: int, code: int) -> None:
    training = Training(
        tmp_path, 2, **{"execution.checkpoint_minutes": 60, "train.epochs": 2, "model.t": 5, "model.k": 64}
    )
    deadline = time.monotonic() + 120
    while "predicted: " not in training.log.read_text():  # said after the first steps
        assert time.monotonic() < deadline, training.log.read_text()
        time.sleep(0.1)
    started = time.monotonic()
    training.process.send_signal(number)
    assert training.process.wait(timeout=30) == code
    assert time.monotonic() - started < 15
    text = training.log.read_text()
    assert "stopping: writing a checkpoint" in text
    assert "rcnn: stopped; the same command, without --fresh, resumes" in text
    [record] = tmp_path.glob("runs/train-*/checkpoints/*.json")
    assert record.stem.startswith("000000-0-0000")
    resumed = Training(tmp_path, 1, **{"train.epochs": 2, "model.t": 5, "model.k": 64})
    assert _finish(resumed)
    assert (
        f"resuming after step {int(record.stem[-4:])} of 126 of epoch 1 of 2, from the last checkpoint"
        in resumed.log.read_text()
    )


def test_a_driver_that_stops_responding_gives_way_and_writes_no_more(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "shared").mkdir()
    epochs = {"train.epochs": 12}
    expected = _finish(Training(tmp_path / "alone", 1, **epochs))
    first = Training(tmp_path / "shared", 1, log="first.txt", **epochs)
    _wait_for_progress(first)
    first.process.send_signal(signal.SIGSTOP)  # its worker goes on, and writes checkpoints
    second = Training(tmp_path / "shared", 2, log="second.txt", **epochs)
    assert _finish(second) == expected
    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(timeout=120) == 2
    assert "took over this work. No work is lost" in first.log.read_text()
    assert f"process {first.process.pid} on" in second.log.read_text()
    [result] = (tmp_path / "shared").glob("runs/train-*/_result.json")
    assert json.loads(result.read_text())["weights_sha256"] == expected


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray of one node with one core."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def wait_for(training: Training, line: str, count: int) -> None:
    """Waits until the training has said something `count` times."""
    deadline = time.monotonic() + SECONDS_TO_NOTICE
    while training.log.read_text().count(line) < count:
        assert time.monotonic() < deadline, f"{line!r} is missing in:\n{training.log.read_text()}"
        assert not training.has_ended(), training.log.read_text()
        time.sleep(0.5)


def test_nodes_that_join_and_leave_change_the_number_of_workers_but_no_bit(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alone").mkdir()
    expected = _finish(Training(tmp_path / "alone", 1))
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    training = Training(tmp_path, "1..4", **{"ray.address": "auto"})
    wait_for(training, "  epoch 1/", 1)
    assert "workers: 1 of at most 4" in training.log.read_text()
    node = cluster.add_node(num_cpus=2)
    wait_for(training, "workers: 3 of at most 4", 1)
    wait_for(training, "resuming after ", 1)
    cluster.remove_node(node, allow_graceful=False)
    wait_for(training, "workers: 1 of at most 4", 2)
    cluster.add_node(num_cpus=1)
    wait_for(training, "workers: 2 of at most 4", 1)
    assert _finish(training) == expected


def test_workers_leave_a_node_that_is_about_to_be_taken_away_and_lose_nothing(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    size: dict[str, Any] = {"model.k": 64, "train.epochs": 2}
    (tmp_path / "alone").mkdir()
    expected = _finish(Training(tmp_path / "alone", 1, **size))
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    node = cluster.add_node(num_cpus=1)
    training = Training(tmp_path, "1..2", **size, **{"ray.address": "auto", "execution.checkpoint_minutes": 60})
    wait_for(training, "predicted: ", 1)  # said after the first steps
    assert "workers: 2 of at most 2" in training.log.read_text()
    given_notice = time.time()
    give_notice(cluster, node, seconds=60)
    wait_for(
        training, "a node with workers is being drained: writing a checkpoint, then restarting on the other nodes", 1
    )
    wait_for(training, "workers: 1 of at most 2", 1)
    assert time.time() - given_notice < 30
    [record] = tmp_path.glob("runs/train-*/checkpoints/*.json")
    assert record.stem.startswith("000000-0-0000")
    assert record.stat().st_mtime > given_notice
    wait_for(training, f"resuming after step {int(record.stem[-4:])} of ", 1)
    assert _finish(training) == expected
    assert "failed" not in training.log.read_text()


def give_notice(cluster: Any, node: Any, *, seconds: float) -> None:
    """Tells Ray, as a cloud's agent would, that the node will be taken away."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int(1000 * (time.time() + seconds))
    accepted, why_not = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "spot market", deadline)
    assert accepted, why_not
