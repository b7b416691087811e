"""Flows that lose Ray's head, Prefect's server or their own process, and flows that are cancelled."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError
from rcnn.recipes import debug_tiny
from rcnn.results import IngestResult, TrainResult
from rcnn.stages import Parent
from tests.flows.heads import Head, free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SECONDS_TO_START = 600
SETTINGS = {
    "train.num_shares": 2, "train.deterministic": True, "train.epochs": 12, "model.k": 8, "model.t": 2,
    "tune.enabled": False, "ray.num_cpus": 2,
}  # fmt: skip


@pytest.fixture
def head() -> Iterator[Head]:
    with Head() as head:
        yield head


@pytest.fixture
def config(head: Head, tiny_config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PipelineConfig:
    """A training of some minutes on that head; the data set is there."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "datasets").symlink_to(Path(tiny_config.storage, "datasets"))
    return debug_tiny().with_settings(SETTINGS | {"storage": str(tmp_path), "ray.address": head.address})


def follow(config: PipelineConfig, digits: IngestResult, react: Callable[[str], None], monkeypatch: Any) -> Any:
    """Trains as a job; `react` is called with each line that is said."""
    from flows import job_server, jobs

    for module in (jobs, job_server):
        monkeypatch.setattr(module, "say", react)
    return jobs.run_as_job(
        config, "train", {"ingest": digits}, parent=Parent("", (("rcnn.prefect_flow_run", "flow-1"),))
    )


def test_a_head_that_dies_and_starts_again_gets_the_job_again_which_resumes(
    head: Head, config: PipelineConfig, digits: IngestResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def restart() -> None:
        head.kill()
        time.sleep(10)
        head.start()

    restarting = threading.Thread(target=restart)

    def react(line: str) -> None:
        print(line)
        said.append(line)
        if "epoch 2/12" in line and not restarting.ident:
            restarting.start()

    result = follow(
        config.with_settings({"execution.checkpoint_minutes": 0.02, "train.num_rows": 0}), digits, react, monkeypatch
    )
    restarting.join()
    assert isinstance(result, TrainResult)
    assert any("no answer from the Ray cluster" in line for line in said)
    assert any("the Ray cluster answers again" in line for line in said)
    assert any("no longer knows job" in line for line in said)
    assert any("resuming after " in line for line in said)
    assert [line for line in said if "epoch 1/12" in line] == [line for line in said if "epoch 1/12" in line][:1]


def test_a_cancelled_flow_ends_its_training_in_15_seconds_with_a_checkpoint(
    config: PipelineConfig, digits: IngestResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.jobs import stop_jobs

    started: list[float] = []
    # Its epochs take minutes, and only the signal makes it write a checkpoint.
    config = config.with_settings(
        {"execution.checkpoint_minutes": 60, "train.num_rows": 0, "model.k": 64, "model.t": 5}
    )

    def react(line: str) -> None:
        print(line)
        if "predicted: " in line and not started:  # said after the first steps
            started.append(time.monotonic())
            stop_jobs(config, "flow-1")

    with pytest.raises(ClusterError, match="ended as STOPPED"):
        follow(config, digits, react, monkeypatch)
    assert time.monotonic() - started[0] < 15 + 5  # and the look at the job's status
    [record] = Path(config.storage).glob("runs/train-*/checkpoints/*.json")
    assert record.stem.startswith("000000-0-0000")


class Pipeline:
    """A `rcnn pipeline` in a process of its own."""

    def __init__(self, config: PipelineConfig, **environment: str):
        folder = Path(config.storage)
        (folder / "config.json").write_text(config.model_dump_json())
        self._log = folder / f"log-{time.time_ns()}.txt"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rcnn.cli", "pipeline", "--config", str(folder / "config.json")],
                env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while text not in self.output():
            assert self.process.poll() is None, f"it has ended:\n{self.output()}"
            assert time.monotonic() < deadline, f"{text!r} is missing in:\n{self.output()}"
            time.sleep(0.2)

    def kill(self) -> None:
        """Kills it with its temporary Prefect server, which a process that is killed cannot end."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.kill()
        self.process.wait()

    def output(self) -> str:
        return self._log.read_text()


def test_a_job_survives_its_flow_and_ends_with_one_that_is_interrupted(
    config: PipelineConfig, digits: IngestResult
) -> None:
    from flows.job_server import JobServer

    config = config.with_settings({"train.epochs": 1000})
    server = JobServer(config.ray.address, minutes=1)
    killed = Pipeline(config)
    killed.wait_for("  |   epoch 1/1000")
    [job_id] = [path.name for path in Path(config.storage, "runs/jobs").glob("rcnn-train-*")]
    killed.kill()
    retried = Pipeline(config)
    retried.wait_for(f"train: attaching to Ray job {job_id}, which is running")
    retried.wait_for("  |   epoch 2/1000")
    assert server.is_running(job_id)
    retried.process.send_signal(signal.SIGINT)
    assert retried.process.wait(timeout=180) == 130, retried.output()
    assert f"stopping Ray job {job_id}" in retried.output()
    deadline = time.monotonic() + 60
    while server.is_running(job_id):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert server.status(job_id) == "STOPPED"


class PrefectServer:
    """A Prefect server that tests stop and start again."""

    def __init__(self, folder: Path):
        [self._port] = free_ports(1)
        self.url = f"http://127.0.0.1:{self._port}/api"
        self._env = os.environ | {"PREFECT_HOME": str(folder), "PREFECT_API_URL": self.url}

    def start(self) -> None:
        command = [str(Path(sys.executable).with_name("prefect")), "server", "start", "--host", "127.0.0.1"]
        self._process = subprocess.Popen(
            [*command, "--port", str(self._port)], env=self._env, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + SECONDS_TO_START
        while not self._answers():
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.3)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def artifacts(self) -> set[str]:
        request = urllib.request.Request(
            f"{self.url}/artifacts/filter", data=b"{}", headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return {artifact["key"] for artifact in json.load(answer)}

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
        except OSError:
            return False
        return True


def test_a_flow_goes_on_without_prefects_server_and_shows_everything_when_it_is_back(
    tmp_path: Path,
) -> None:
    config = debug_tiny().with_settings(SETTINGS | {"storage": str(tmp_path / "storage"), "train.num_rows": 0})
    Path(config.storage).mkdir()
    server = PrefectServer(tmp_path / "prefect")
    server.start()
    try:
        flow = Pipeline(config, PREFECT_API_URL=server.url, PREFECT_HOME=str(tmp_path / "client"))
        flow.wait_for("ingest: reading")
        server.stop()
        flow.wait_for("epoch 1/12")
        assert "what it shows of ingest is sent later" in flow.output()
        server.start()
        assert flow.process.wait(timeout=600) == 0, flow.output()
        assert server.artifacts() == {f"rcnn-{name}" for name in ("ingest", "train", "evaluate", "audit", "register")}
    finally:
        server.stop()
