"""Stages as jobs of a real Ray cluster of one node."""

import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, SourceError
from rcnn.recipes import debug_tiny
from rcnn.results import IngestResult
from rcnn.stages import Parent, stage_folder
from tests.flows.heads import Head, Proxy
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

SEEDS = itertools.count(1)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray with a job server, which a Ray of our own does without."""
    with Head() as head:
        yield head


@pytest.fixture
def config(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    """Each test has other settings, so that its job has another id."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    settings = {"storage": str(tmp_path), "ray.address": head.address, "data.split_seed": next(SEEDS)}
    return debug_tiny().with_settings(settings)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said to the user."""
    lines: list[str] = []
    for module in ("jobs", "job_server", "followers"):
        monkeypatch.setattr(f"flows.{module}.say", lines.append)
    return lines


def submit_instead(entrypoint: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets jobs run something short in place of a stage; the ids under which they are submitted."""
    from flows import job_server, jobs

    submitted: list[str] = []
    submit = job_server.JobServer.submit

    def submit_other(server: job_server.JobServer, job_id: str, _: str, **options: Any) -> None:
        submitted.append(job_id)
        submit(server, job_id, entrypoint, **options)

    monkeypatch.setattr(jobs.JobServer, "submit", submit_other)
    return submitted


def submit_and_leave(config: PipelineConfig, flow_run: str, monkeypatch: pytest.MonkeyPatch, **options: bool) -> None:
    """Submits a job or attaches to it, and lets go of it, like a flow that is killed."""
    from flows import jobs

    with monkeypatch.context() as patch:
        patch.setattr(jobs._Job, "_follow", lambda job, log: "RUNNING")
        with pytest.raises(ClusterError, match="ended as RUNNING"):
            jobs.run_as_job(config, "ingest", {}, parent=parent_of(flow_run), **options)


def parent_of(flow_run: str) -> Parent:
    return Parent("", (("rcnn.prefect_flow_run", flow_run),))


def cancel(config: PipelineConfig, flow_run: str) -> None:
    """What Prefect calls for a cancelled flow run."""
    from flows.jobs import stop_jobs_of

    stop_jobs_of(None, SimpleNamespace(id=flow_run, parameters={"config": config.model_dump(mode="json")}), None)


def status_of(config: PipelineConfig, job_id: str) -> str | None:
    from flows.job_server import JobServer

    return JobServer(config.ray.address, minutes=0).status(job_id)


def wait_until_stopped(config: PipelineConfig, job_id: str) -> None:
    deadline = time.monotonic() + 60
    while status_of(config, job_id) != "STOPPED" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert status_of(config, job_id) == "STOPPED"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} is missing"
        time.sleep(0.1)


def kill_follower(config: PipelineConfig, job_id: str, flow_run: str) -> None:
    """Makes a mark as old as that of a flow that was killed two minutes ago."""
    mark = Path(config.storage, "runs/jobs", job_id, f"followed-by-{flow_run}")
    os.utime(mark, (time.time() - 120, time.time() - 120))


def test_a_stage_runs_as_a_job_with_its_log_and_a_second_call_finds_the_result(
    config: PipelineConfig, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config may be of any length: an argument of a shell would end at 128 KiB."""
    from flows import jobs

    entrypoints: list[str] = []
    submit = jobs.JobServer.submit

    def submit_and_keep(server: jobs.JobServer, job_id: str, entrypoint: str, **options: Any) -> None:
        entrypoints.append(entrypoint)
        submit(server, job_id, entrypoint, **options)

    monkeypatch.setattr(jobs.JobServer, "submit", submit_and_keep)
    rates = [0.001 + number * 1e-6 for number in range(20_000)]
    config = config.with_settings({"tune.space": {"train.learning_rate": rates}})
    assert len(config.model_dump_json()) > 2**17
    first = jobs.run_as_job(config, "ingest", {})
    assert isinstance(first, IngestResult)
    assert first.rows == {"train": 4050, "val": 450, "test": 500}
    assert len(entrypoints[0]) < 1000
    assert any(line.startswith("  | ingest: done") for line in said)
    said.clear()
    assert jobs.run_as_job(config, "ingest", {}) == first
    assert said[0].startswith("ingest: nothing to do")
    said.clear()
    assert jobs.run_as_job(config, "ingest", {}, fresh=True).mlflow_run_id != first.mlflow_run_id
    assert sum(line.startswith("  | ingest: done") for line in said) == 1  # nothing of the first job's log


@pytest.mark.thorough
def test_a_stage_of_the_command_line_is_a_job_that_brings_our_code_along(
    head: Head, config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], capsys: Any
) -> None:
    """The code that is sent says so; that of the node does not. Both give one result, since the line affects none."""
    from flows import code_package
    from flows.job_server import JobServer

    package = tmp_path / "sent" / "rcnn"
    shutil.copytree(code_package.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (package / "cli.py").read_text()
    (package / "cli.py").write_text(code.replace("\nif __name__ ==", "\nprint('sent along')\n\nif __name__ =="))
    monkeypatch.setattr(code_package, "PACKAGE", package)
    settings = {"storage": config.storage, "tune.enabled": False, "train.epochs": 1, "ray.send_code": True}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    assert main(["train", "--recipe", "debug_tiny", "--ray", head.address, *words]) == 0
    assert "weights_sha256" in json.loads(capsys.readouterr().out)
    assert "  | sent along" in said
    [job] = [line for line in said if "submitted as Ray job" in line]
    job_id = job.rpartition("/")[2]
    assert job.endswith(f"{head.address}/#/jobs/{job_id}")
    details = JobServer(head.address, minutes=0)._connected().get_job_info(job_id)
    assert details.metadata["stage"] == "train"
    assert details.metadata["model"] == "RCNN-8, T = 1"


def test_two_storages_have_jobs_of_their_own_on_one_cluster(config: PipelineConfig, tmp_path: Path) -> None:
    from flows.jobs import _Job

    other = config.with_settings({"storage": str(tmp_path / "other")})
    ids = [_Job(each, "ingest", {}, fresh=False, parent=Parent()).id for each in (config, config, other)]
    assert ids[0] == ids[1] != ids[2]


def test_the_stages_own_error_comes_back_from_the_job(config: PipelineConfig, tmp_path: Path) -> None:
    from flows.jobs import run_as_job

    wrong = config.with_settings({"data.source": "mnist", "data.root": str(tmp_path / "nowhere")})
    with pytest.raises(SourceError, match=r"data\.root = .*nowhere.*holds none of the files of mnist"):
        run_as_job(wrong, "ingest", {})


@pytest.mark.thorough
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
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    submitted = submit_instead("sleep 300", monkeypatch)
    for _ in range(2):
        submit_and_leave(config, "flow-7", monkeypatch)
    assert len(submitted) == 1
    assert "attaching to Ray job" in said[1]
    cancel(config, "another")
    assert status_of(config, submitted[0]) in ("PENDING", "RUNNING")
    cancel(config, "flow-7")
    wait_until_stopped(config, submitted[0])


@pytest.mark.thorough
def test_a_flow_that_attaches_shows_the_last_lines_of_the_log_and_what_follows(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    from flows import jobs
    from flows.job_server import JobServer

    submitted = submit_instead("seq 1000; sleep 300", monkeypatch)
    submit_and_leave(config, "killed", monkeypatch)
    [job_id] = submitted
    server = JobServer(config.ray.address, minutes=0)
    wait_until(lambda: "\n1000\n" in server.whole_log(job_id), seconds=60)
    said.clear()
    logs: list[jobs.JobLog] = []
    monkeypatch.setattr(jobs._Job, "_follow", lambda job, log: logs.append(log) or "RUNNING")
    with pytest.raises(ClusterError, match="ended as RUNNING"):
        jobs.run_as_job(config, "ingest", {}, parent=parent_of("next"))
    assert server.page_of(job_id) in said.pop()
    logs[0].begin()(server.whole_log(job_id) + "news\n")
    assert said == [f"  | {line}" for line in (996, 997, 998, 999, 1000, "news")]
    cancel(config, "next")


def test_a_job_of_two_flows_is_stopped_when_the_last_living_one_is_cancelled(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    from flows.followers import Followers
    from rcnn.storage import Storage

    monkeypatch.setattr("flows.followers.SECONDS_BETWEEN_RENEWALS", 0.5)
    submitted = submit_instead("sleep 300", monkeypatch)
    for flow_run in ("killed", "first", "second"):
        submit_and_leave(config, flow_run, monkeypatch)
    [job_id] = submitted
    kill_follower(config, job_id, "killed")
    with Followers(Storage(config.storage), f"runs/jobs/{job_id}", "second").following():
        cancel(config, "first")
        assert said[-1] == f"  Ray job {job_id} keeps running, since another flow follows it"
        assert status_of(config, job_id) in ("PENDING", "RUNNING")
    cancel(config, "second")
    wait_until_stopped(config, job_id)


def test_a_flow_is_marked_as_a_follower_before_it_submits(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import jobs

    def die(server: jobs.JobServer, job_id: str, entrypoint: str, **options: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(jobs.JobServer, "submit", die)
    with pytest.raises(SystemExit):
        jobs.run_as_job(config, "ingest", {}, parent=parent_of("flow-8"))
    assert len(list(Path(config.storage).glob("runs/jobs/*/followed-by-flow-8"))) == 1


@pytest.mark.parametrize("caller", [{"parent": parent_of("flow-9")}, {"follower": "command-9"}])
def test_ctrl_c_stops_the_job(config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, caller: dict[str, Any]) -> None:
    from flows import jobs

    def interrupt(job: object, log: object) -> str:
        raise KeyboardInterrupt

    submitted = submit_instead("sleep 300", monkeypatch)
    monkeypatch.setattr(jobs._Job, "_follow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        jobs.run_as_job(config, "ingest", {}, **caller)
    wait_until_stopped(config, submitted[0])
    marks = Path(config.storage).glob("runs/jobs/*/followed-by-command-9")
    assert list(marks) == []  # of which no later call could be the owner


def test_fresh_is_refused_while_a_job_runs_unless_it_may_be_stopped_and_doctor_names_one_without_a_flow(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows import jobs

    submitted = submit_instead("sleep 300", monkeypatch)
    submit_and_leave(config, "first", monkeypatch)
    left = Path(config.storage, stage_folder(config, "ingest", {}).name, "draft")
    left.parent.mkdir(parents=True)
    left.touch()
    with pytest.raises(
        ClusterError,
        match=rf"{submitted[0]} is running .*`ray job stop --address {config.ray.address} {submitted[0]}`.*--stop-running",
    ):
        jobs.run_as_job(config, "ingest", {}, fresh=True, parent=parent_of("second"))
    assert left.exists()
    assert status_of(config, submitted[0]) in ("PENDING", "RUNNING")
    submit_and_leave(config, "second", monkeypatch, fresh=True, stop_running=True)
    assert len(submitted) == 2
    submit_and_leave(
        config, "second", monkeypatch, fresh=True
    )  # a retry of that flow attaches to the job that it submitted
    assert len(submitted) == 2
    assert [text for text, *_ in jobs.left_jobs(config)] == ["no job runs without a flow"]
    kill_follower(config, submitted[0], "first")
    kill_follower(config, submitted[0], "second")
    file = Path(config.storage, "config.json")
    file.write_text(config.model_dump_json())
    assert main(["doctor", "--config", str(file)]) == 2
    left_job = f"FAULT jobs       Ray job {submitted[0]} is running, and no flow follows it"
    assert left_job in capsys.readouterr().out
    main(["doctor", "--config", str(file), "--mend"])
    assert (
        f"ok    jobs       Ray job {submitted[0]} is running, and no flow follows it: ended" in capsys.readouterr().out
    )
    wait_until_stopped(config, submitted[0])


def test_a_retry_of_a_fresh_flow_takes_the_result_that_its_job_has_left(
    config: PipelineConfig, digits: IngestResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import jobs

    submitted = submit_instead("exit 0", monkeypatch)
    submit_and_leave(config, "flow-5", monkeypatch, fresh=True)
    outcome = {"result": digits.model_dump(mode="json")}
    Path(config.storage, "runs/jobs", submitted[0], "outcome.json").write_text(json.dumps(outcome))
    while status_of(config, submitted[0]) != "SUCCEEDED":
        time.sleep(0.1)
    assert jobs.run_as_job(config, "ingest", {}, fresh=True, parent=parent_of("flow-5")) == digits
    assert len(submitted) == 1


def test_a_stopped_job_has_time_to_write_a_checkpoint(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray by itself kills it after 3 s."""
    saves = f"trap 'sleep 5; touch {tmp_path}/saved; exit 143' TERM; touch {tmp_path}/started; sleep 300 & wait"
    submitted = submit_instead(saves, monkeypatch)
    submit_and_leave(config, "flow-6", monkeypatch)
    wait_for(tmp_path / "started")
    cancel(config, "flow-6")
    wait_until_stopped(config, submitted[0])
    assert (tmp_path / "saved").exists()


@pytest.mark.thorough
def test_a_log_whose_connection_dies_silently_is_printed_whole_and_once(
    head: Head, config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    from flows import jobs

    monkeypatch.setattr("flows.ray_client.SECONDS_OF_SILENCE", 2)
    monkeypatch.setattr("flows.job_server.SECONDS_TO_ANSWER", 2)
    submit_instead("for i in $(seq 40); do echo line $i; sleep 0.2; done; printf end; sleep 3; exit 1", monkeypatch)
    with Proxy(head) as proxy:

        def say(text: str) -> None:
            said.append(text)
            if text == "  | line 10":
                proxy.cut()
            if text == "  | line 20":
                proxy.fall_silent()
            if text.startswith("  no answer from the Ray cluster"):
                proxy.heal()

        for module in ("jobs", "job_server"):
            monkeypatch.setattr(f"flows.{module}.say", say)
        with pytest.raises(ClusterError, match="ended as FAILED"):
            jobs.run_as_job(config.with_settings({"ray.address": proxy.address}), "ingest", {})
    printed = [line for line in said if line.startswith(("  | line", "  | end"))]
    assert printed == [f"  | line {number}" for number in range(1, 41)] + ["  | end"]
    assert any("trying for 30 min more" in line for line in said)
    assert any("the Ray cluster answers again" in line for line in said)


def test_a_cluster_that_does_not_answer_is_named(said: list[str]) -> None:
    from flows.jobs import run_as_job

    config = PipelineConfig().with_settings({"ray.address": "http://127.0.0.1:9", "ray.reconnect_minutes": 0.05})
    with pytest.raises(ClusterError, match=r"ray\.address = http://127\.0\.0\.1:9.*cannot be used.*make up") as caught:
        run_as_job(config, "ingest", {})
    assert not caught.value.retryable  # it has been waited for
    refused = "[Errno 111] Connection refused"
    assert said == [f"  no answer from the Ray cluster at http://127.0.0.1:9 ({refused}); trying for 3 s more"]


def entrypoints_at(head: Head) -> list[str]:
    from flows.job_server import JobServer

    return [str(job.entrypoint) for job in JobServer(head.address, minutes=0)._connected().list_jobs()]


@pytest.mark.thorough
def test_batch_prediction_runs_as_a_job_and_bad_images_do_not_fail_it(
    head: Head,
    tiny_config: PipelineConfig,
    digits: IngestResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from flows import batch_predict as flow
    from rcnn.data.manifest import require_manifest
    from rcnn.storage import Storage
    from rcnn.train.checkpoint import build_classifier, save_model

    for folder in ("model", "in"):
        (tmp_path / folder).mkdir()
    manifest = require_manifest(Storage(tiny_config.storage), digits.folder)
    save_model(build_classifier(tiny_config, manifest).state_dict(), tiny_config, manifest, tmp_path / "model")
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    environment = {"RCNN_RAY__ADDRESS": head.address, "RCNN_STORAGE": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    monkeypatch.setattr(flow, "say", said.append)
    monkeypatch.setattr("flows.jobs.say", said.append)
    done = flow.batch_predict.fn(str(tmp_path / "in"), str(tmp_path / "out"), str(tmp_path / "model"))
    assert (done["rows"], done["bad"]) == (1, 1)
    assert any("1 of 2 images could not be read" in line for line in said)
    monkeypatch.chdir(tmp_path)
    words = ["batch-predict", "absent", "--to", "out", "--model", "model", "--ray", head.address]
    words += ["--set", "execution.max_failures=7"]
    assert main(words) == 2
    assert f"{tmp_path}/absent" in "".join(said)  # the job has another working directory
    assert any("execution.max_failures=7" in entrypoint for entrypoint in entrypoints_at(head))
    assert "ended as FAILED." in capsys.readouterr().err
