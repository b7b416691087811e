"""Stages as jobs of a real Ray cluster of one node."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, SourceError
from rcnn.recipes import debug_tiny
from rcnn.results import IngestResult
from rcnn.stages import Parent

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray with a job server, which a Ray of our own does without; the server's address."""
    server, agent, client = (str(port) for port in free_ports(3))
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", "2", "--port", "0",
        "--node-ip-address", "127.0.0.1",
        "--dashboard-port", server, "--dashboard-agent-listen-port", agent, "--ray-client-server-port", client,
    ]  # fmt: skip
    ours = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }  # fmt: skip
    address = f"http://127.0.0.1:{server}"
    with subprocess.Popen(
        command, env=os.environ | ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not answers(address):
                assert process.poll() is None, "Ray has ended"
                assert time.monotonic() < deadline, "Ray does not start"
                time.sleep(0.3)
            yield address
        finally:
            process.terminate()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=5):
            return True
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def config(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return debug_tiny().with_settings({"storage": str(tmp_path), "ray.address": cluster})


def submit_instead(entrypoint: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets jobs run something short in place of a stage; the ids under which they are submitted."""
    from flows import jobs

    submitted: list[str] = []
    real_client = jobs.JobSubmissionClient

    def connect(address: str) -> object:
        client = real_client(address)
        submit = client.submit_job

        def submit_other(**arguments: object) -> None:
            submitted.append(str(arguments["submission_id"]))
            submit(**(arguments | {"entrypoint": entrypoint}))

        client.submit_job = submit_other
        return client

    monkeypatch.setattr(jobs, "JobSubmissionClient", connect)
    return submitted


def test_a_stage_runs_as_a_job_with_its_log_and_a_second_call_finds_the_result(
    config: PipelineConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.jobs import run_as_job

    said: list[str] = []
    monkeypatch.setattr("flows.jobs.say", said.append)
    first = run_as_job(config, "ingest", {})
    assert isinstance(first, IngestResult)
    assert first.rows == {"train": 4050, "val": 450, "test": 500}
    assert any(line.startswith("  | ingest: done") for line in said)
    said.clear()
    assert run_as_job(config, "ingest", {}) == first
    assert said[0].startswith("ingest: nothing to do")
    assert run_as_job(config, "ingest", {}, fresh=True).mlflow_run_id != first.mlflow_run_id


def test_a_config_of_any_length_reaches_the_job_and_no_argument_holds_it(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An argument of a shell ends at 128 KiB."""
    from flows import jobs

    entrypoints: list[str] = []
    real_client = jobs.JobSubmissionClient

    def connect(address: str) -> object:
        client = real_client(address)
        submit = client.submit_job

        def submit_and_keep(**arguments: str) -> None:
            entrypoints.append(arguments["entrypoint"])
            submit(**arguments)

        client.submit_job = submit_and_keep
        return client

    monkeypatch.setattr(jobs, "JobSubmissionClient", connect)
    rates = [0.001 + number * 1e-6 for number in range(20_000)]
    large = config.with_settings({"tune.space": {"train.learning_rate": rates}, "data.split_seed": 3})
    assert len(large.model_dump_json()) > 2**17
    assert isinstance(jobs.run_as_job(large, "ingest", {}), IngestResult)
    assert len(entrypoints[0]) < 1000


def test_the_stages_own_error_comes_back_from_the_job(config: PipelineConfig, tmp_path: Path) -> None:
    from flows.jobs import run_as_job

    wrong = config.with_settings({"data.source": "mnist", "data.root": str(tmp_path / "nowhere")})
    with pytest.raises(SourceError, match=r"data\.root = .*nowhere.*holds none of the files of mnist"):
        run_as_job(wrong, "ingest", {})


def test_a_job_that_failed_is_submitted_again_under_its_id(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import jobs

    submitted = submit_instead("exit 1", monkeypatch)
    for _ in range(2):
        with pytest.raises(ClusterError, match="ended as FAILED"):
            jobs.run_as_job(config, "ingest", {})
    assert len(submitted) == 2
    assert len(set(submitted)) == 1


def test_a_running_job_is_attached_to_and_stopped_with_its_flow(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import jobs

    real_client = jobs.JobSubmissionClient
    submitted = submit_instead("sleep 300", monkeypatch)

    async def leave(client: object, job_id: str) -> str:
        """Lets go of the job, like a flow that is killed."""
        return "RUNNING"

    said: list[str] = []
    monkeypatch.setattr(jobs, "say", said.append)
    monkeypatch.setattr(jobs, "_follow", leave)
    parent = Parent("", (("rcnn.prefect_flow_run", "flow-7"),))
    for _ in range(2):
        with pytest.raises(ClusterError, match="ended as RUNNING"):
            jobs.run_as_job(config, "ingest", {}, parent=parent)
    assert len(submitted) == 1
    assert "attaching to Ray job" in said[1]
    jobs.stop_jobs_of(None, _flow_run(config, "another"), None)
    client = real_client(config.ray.address)
    assert str(client.get_job_status(submitted[0]).value) in ("PENDING", "RUNNING")
    jobs.stop_jobs_of(None, _flow_run(config, "flow-7"), None)
    deadline = time.monotonic() + 60
    while str(client.get_job_status(submitted[0]).value) != "STOPPED" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert str(client.get_job_status(submitted[0]).value) == "STOPPED"


def _flow_run(config: PipelineConfig, run_id: str) -> SimpleNamespace:
    return SimpleNamespace(id=run_id, parameters={"config": config.model_dump(mode="json")})


def test_a_cluster_that_does_not_answer_is_named() -> None:
    from flows.jobs import run_as_job

    config = PipelineConfig().with_settings({"ray.address": "http://127.0.0.1:9"})
    with pytest.raises(ClusterError, match=r"ray\.address = http://127\.0\.0\.1:9.*cannot be used.*make up"):
        run_as_job(config, "ingest", {})
