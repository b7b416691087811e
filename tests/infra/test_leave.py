"""The preStop hook of the Ray pods, on real nodes of this machine."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.job_server import JobServer
from tests.faults.kills import Training, _finish
from tests.flows.heads import Head

pytestmark = [
    pytest.mark.slow,
    # Ray's own `Cluster` leaves a socket open.
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]

LEAVE = Path(__file__).parents[2] / "infra" / "kuberay" / "base" / "leave.py"
SECONDS_TO_WAIT = 300
SIZE: dict[str, Any] = {"model.k": 64, "train.epochs": 2, "execution.checkpoint_minutes": 60}


def leave(*words: str) -> None:
    subprocess.run([sys.executable, str(LEAVE), *words], check=True, timeout=120)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray of one node with one core."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


def test_a_worker_pod_that_is_ended_loses_no_step(tmp_path: Path, cluster: Any) -> None:
    node = cluster.add_node(num_cpus=1)
    training = Training(tmp_path, "1..2", **SIZE, **{"ray.address": "auto"})
    wait_for("predicted: ", training)  # said after the first steps
    assert "workers: 2 of at most 2" in training.log.read_text()
    leave("worker", "--node-id", node.node_id)
    assert "a node with workers is being drained: writing a checkpoint" in training.log.read_text()
    [record] = tmp_path.glob("runs/train-*/checkpoints/*.json")
    cluster.remove_node(node, allow_graceful=False)  # the pod is gone
    wait_for(f"resuming after step {int(record.stem[-4:])} of 126 of epoch 1 of 2", training)
    assert _finish(training)
    assert "failed" not in training.log.read_text()


def test_a_head_pod_that_is_ended_lets_its_job_write_a_checkpoint(tmp_path: Path) -> None:
    sets = SIZE | {
        "storage": tmp_path,
        "train.num_rows": 0,
        "train.epochs": 9,
        "tune.enabled": False,
        "ray.address": "auto",
    }
    words = " ".join(f"--set {name}={value}" for name, value in sets.items())
    with Head() as head:
        jobs = JobServer(
            head.address, minutes=5
        )  # waits for Ray's agent, and gives a job 15 s to stop, as the manifest does
        jobs.submit("training", f"rcnn train --recipe debug_tiny {words}")
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while "predicted: " not in jobs.whole_log("training"):
            assert time.monotonic() < deadline, jobs.whole_log("training")
            time.sleep(0.5)
        leave("head", "--dashboard", head.address)
        assert jobs.status("training") == "STOPPED"
        assert "stopping: writing a checkpoint" in jobs.whole_log("training")
    assert list(tmp_path.glob("runs/train-*/checkpoints/*.json"))


def test_a_head_without_jobs_leaves_at_once() -> None:
    with Head() as head:
        leave("head", "--dashboard", head.address)


def wait_for(line: str, training: Training) -> None:
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while line not in training.log.read_text():
        assert time.monotonic() < deadline, f"{line!r} is missing in:\n{training.log.read_text()}"
        assert not training.has_ended(), training.log.read_text()
        time.sleep(0.5)
