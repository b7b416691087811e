"""MLflow goes away in the middle of everything, and ends with every point once."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.faults.kills import Training, _finish
from tests.registry.server import Server

pytestmark = pytest.mark.slow

SECONDS_TO_SEE = 240


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    root = tmp_path / "server"
    root.mkdir()
    server = Server(root)
    yield server
    server.stop()


class Command:
    """An `rcnn` in a process of its own."""

    def __init__(self, storage: Path, name: str, **settings: object):
        self.log = storage / f"{name}.txt"
        command = [sys.executable, "-m", "rcnn.cli", name, "--recipe", "debug_tiny", "--set", f"storage={storage}"]
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def wait_for(self, line: str) -> None:
        wait_for(line, self.log, self.process)

    def finish(self) -> str:
        assert self.process.wait(timeout=900) == 0, self.log.read_text()
        return self.log.read_text()


def wait_for(line: str, log: Path, process: Any) -> None:
    deadline = time.monotonic() + SECONDS_TO_SEE
    while line not in log.read_text():
        assert time.monotonic() < deadline, f"{line!r} is missing in:\n{log.read_text()}"
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)


def runs_of(server: Server) -> dict[str, Any]:
    client = MlflowClient(server.url)
    runs = client.search_runs([client.get_experiment_by_name("rcnn/mnist-sample").experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs), "a run was made twice"
    return {run.info.run_name.split()[0]: run for run in runs}  # `train RCNN-8 T=1 52.00 % val`


def steps(server: Server, run: Any, name: str) -> list[int]:
    return [point.step for point in MlflowClient(server.url).get_metric_history(run.info.run_id, name)]


def test_a_server_that_goes_away_in_a_search_misses_nothing_and_only_register_waits(
    tmp_path: Path, server: Server
) -> None:
    server.start()
    server.wait()
    settings = {"tracking.uri": server.url, "train.epochs": 4, "tune.epochs": 3, "ray.num_cpus": 2}
    command = Command(tmp_path, "register", **settings)
    command.wait_for("trial-00")  # the line of its first epoch
    server.stop()
    command.wait_for("Notes for MLflow are kept in")
    command.wait_for("evaluate: done")
    command.wait_for("waiting for MLflow, for up to ")
    server.start()
    said = command.finish()
    assert "notes sent" in said
    runs = runs_of(server)
    assert set(runs) == {"ingest", "tune", "trial-00", "trial-01", "train", "evaluate", "audit"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert steps(server, runs["train"], "val/error") == [1, 2, 3, 4]
    for trial in ("trial-00", "trial-01"):
        found = steps(server, runs[trial], "val/error")
        assert found == list(range(1, len(found) + 1))
        assert runs[trial].data.tags["mlflow.parentRunId"] == runs["tune"].info.run_id
        assert "model.k" in runs[trial].data.params
        assert "outcome" in runs[trial].data.tags
    assert runs["train"].data.params["train.epochs"] == "4"
    client = MlflowClient(server.url)
    pictures = {file.path for file in client.list_artifacts(runs["evaluate"].info.run_id)}
    assert {"report.md", "confusion.png"} <= pictures
    assert client.get_model_version("rcnn-mnist-sample", "1").run_id == runs["train"].info.run_id
    assert list((tmp_path / "outbox").iterdir()) == []
    assert Command(tmp_path, "register", **settings).finish().count("nothing to do") == 6


def test_a_driver_that_is_killed_while_mlflow_is_away_leaves_a_whole_curve(tmp_path: Path, server: Server) -> None:
    settings = {"tracking.uri": server.url, "train.epochs": 8}
    training = Training(tmp_path, 1, **settings)
    wait_for("  epoch 3/", training.log, training.process)
    training.kill("driver")
    assert training.process.returncode == -signal.SIGKILL
    assert any((tmp_path / "outbox").iterdir())
    server.start()
    server.wait()
    _finish(Training(tmp_path, 2, **settings))
    run = runs_of(server)["train"]
    assert run.info.status == "FINISHED"
    for name in ("val/error", "train/loss", "learning_rate"):
        assert sorted(steps(server, run, name)) == list(range(1, 9))
