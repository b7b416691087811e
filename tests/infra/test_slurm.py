"""The batch script: read by shellcheck, and run by a stand-in for Slurm on two nodes with real Ray processes."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.nodes import can_run
from tests.infra.slurm.cluster import BIN, JOB_ID, SCRIPT, FakeSlurm

SECONDS_TO_WAIT = 1200
MLFLOW = "http://127.0.0.1:5000"
needs_root = pytest.mark.skipif(not can_run(), reason="network namespaces need root and `ip`")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", [SCRIPT, *sorted(BIN.iterdir())], ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        ([], {}, "no command. Try: sbatch infra/slurm/rcnn.sbatch train --recipe debug_tiny"),
        (["train"], {"RCNN_STORAGE": ""}, "RCNN_STORAGE is not set. Give a folder that all nodes mount, or a URI"),
        (["train"], {"RCNN_TRACKING__URI": ""}, "RCNN_TRACKING__URI is not set. Give an MLflow server"),
        (
            ["train"],
            {"PATH": "/usr/bin:/bin"},
            "rcnn and ray are not in PATH. Activate their environment before sbatch",
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(
    tmp_path: Path, words: list[str], env: dict[str, str], message: str
) -> None:
    job = FakeSlurm(tmp_path, 2).environment() | {"RCNN_TRACKING__URI": "http://mlflow:5000"} | env
    done = subprocess.run(["bash", str(SCRIPT), *words], env=job, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"rcnn.sbatch: {message}")


def test_a_ray_that_did_not_start_fails_the_job(tmp_path: Path) -> None:
    """`ray symmetric-run` ends with 0 then; so does this srun, which starts nothing."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "srun").chmod(0o755)
    env = FakeSlurm(tmp_path, 1).environment()
    env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
    done = subprocess.run(["bash", str(SCRIPT), "train"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the command has no exit code: Ray did not start, or was ended" in done.stderr


@pytest.mark.slow
@needs_root
def test_a_job_ends_with_its_command_and_leaves_nothing_on_its_nodes(tmp_path: Path) -> None:
    with FakeSlurm(tmp_path, 2) as slurm:
        job = slurm.run("recipes", RCNN_TRACKING__URI=MLFLOW)
        assert job.wait(SECONDS_TO_WAIT) == 0, slurm.log.read_text()
    assert "debug_tiny" in slurm.log.read_text()
    assert not list(tmp_path.glob("disks/*/*"))
    assert not list(tmp_path.rglob("ray-token"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@needs_root
def test_two_nodes_train_together_stop_when_asked_and_resume_when_queued_again(tmp_path: Path) -> None:
    """Each node offers one core, so that two workers of one core are on both."""
    settings = (
        "train.num_rows=0",
        "train.epochs=4",
        "model.k=16",
        "model.t=2",
        "train.num_shares=2",
        "tune.enabled=false",
    )
    command = ["train", "--recipe", "debug_tiny", *(word for setting in settings for word in ("--set", setting))]
    with FakeSlurm(tmp_path, 2) as slurm:
        serve_mlflow(slurm)
        job = slurm.run(*command, RCNN_TRACKING__URI=MLFLOW)
        wait_for(job, slurm.log, "predicted: ")  # said after the first steps
        job.send_signal(signal.SIGUSR1)  # what Slurm does at --signal=B:USR1@120
        assert job.wait(SECONDS_TO_WAIT) == 0, slurm.log.read_text()
        first = slurm.log.read_text()
        assert slurm.calls.read_text() == f"requeue {JOB_ID}\n"
        job = slurm.run(*command, RCNN_TRACKING__URI=MLFLOW, SLURM_RESTART_COUNT="1")
        assert job.wait(SECONDS_TO_WAIT) == 0, slurm.log.read_text()
    assert "on 2 workers" in first
    assert "stopping: writing a checkpoint" in first
    assert "epoch 4/4" not in first
    second = slurm.log.read_text()[len(first) :]
    assert re.search(r"resuming after step \d+ of 126 of epoch \d of 4, from the last checkpoint", second)
    assert "epoch 4/4" in second
    [result] = (tmp_path / "storage").glob("runs/train-*/_result.json")
    assert json.loads(result.read_text())["epochs"] == 4
    assert not list(tmp_path.rglob("ray-token"))
    assert not list(tmp_path.glob("disks/*/*"))


def serve_mlflow(slurm: FakeSlurm) -> None:
    """Starts an MLflow server on the first node; it ends with the nodes."""
    store = f"--backend-store-uri=sqlite:///{slurm.folder}/mlflow.db"
    call = ["mlflow", "server", "--host=127.0.0.1", "--port=5000", "--workers=1", store]
    env = slurm.environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = slurm.folder / "mlflow.log"
    wait_for(slurm.on_first_node(*call, env=env, log=log), log, "Application startup complete")


def wait_for(process: "subprocess.Popen[bytes]", log: Path, text: str) -> None:
    """Waits until a process has said something."""
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"{text!r} is missing in:\n{log.read_text()}"
        time.sleep(0.2)
