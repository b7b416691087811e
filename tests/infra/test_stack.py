"""The local stack, for real; its start takes a minute, so most of this is `slow`."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


def stack(command: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "infra.local.stack", command],
        cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip


def test_a_taken_port_is_named_with_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = stack("up", MLFLOW_PORT=str(port))
    assert done.returncode == 2
    assert f"MLFLOW_PORT: port {port} is in use. Free it, or run `make up MLFLOW_PORT={port + 11}`" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_stack_comes_up_runs_the_flow_and_a_job_and_leaves_nothing(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.process_iter()}
    env = {"RCNN_STORAGE": str(tmp_path)}
    up = stack("up", **env)
    try:
        assert up.returncode == 0, up.stderr
        assert up.stdout.count("http://127.0.0.1:") == 3
        assert "is already running" in stack("up", **env).stdout
        config = subprocess.run(["rcnn", "config", "--recipe", "debug_tiny", "--json"], capture_output=True, check=True)
        flow = in_shell(
            "prefect deployment run rcnn/full-pipeline --watch --watch-timeout 400 --param config='"
            + config.stdout.decode().strip() + "'"
        )  # fmt: skip
        assert flow.returncode == 0, flow.stdout + flow.stderr
        assert (tmp_path / "reports").exists()
        job = in_shell("ray job submit -- rcnn train --recipe debug_tiny")
        assert job.returncode == 0, job.stdout + job.stderr
        assert "train: nothing to do" in job.stdout + job.stderr
    finally:
        down = stack("down")
    assert "the stack is stopped" in down.stdout, down.stderr
    left = [process for process in psutil.process_iter() if process.pid not in before and is_of_the_stack(process)]
    assert left == []
    assert "is not running" in stack("down").stdout


def in_shell(command: str) -> "subprocess.CompletedProcess[str]":
    call = ["bash", "-c", f". storage/stack/env.sh && {command}"]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False, timeout=450)


def is_of_the_stack(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return any(word in words for word in ("ray", "prefect", "mlflow", "honcho"))
