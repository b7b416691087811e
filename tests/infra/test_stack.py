"""The local stack, for real, beside another Ray with the usual ports; its start takes a minute, so most of this is `slow`."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from rcnn.stages import STAGES
from tests.flows.heads import Head

ROOT = Path(__file__).parents[2]
SECONDS_TO_CLOSE = 60


class LocalStack:
    """A stack in a folder of its own."""

    def __init__(self, folder: Path):
        self.storage, self.state = folder / "storage", folder / "stack"
        self._env = {"RCNN_STORAGE": str(self.storage), "STACK_STATE": str(self.state)}

    def call(self, command: str, **env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "infra.local.stack", command], cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"} | self._env | env,
            capture_output=True, text=True, check=False, timeout=1200,
        )  # fmt: skip

    def in_shell(self, command: str) -> "subprocess.CompletedProcess[str]":
        call = ["bash", "-c", f". {self.state}/env.sh && {command}"]
        return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)

    def status(self) -> dict[str, str]:
        """The lines of `make status` by part."""
        return {line.split()[0]: line for line in self.call("status").stdout.splitlines() if line.strip()}

    def processes(self, part: str) -> list[psutil.Process]:
        """The processes of a part, but no children that changed their environment."""
        mark = json.loads((self.state / "state.json").read_text())["mark"]
        return [each for each in psutil.process_iter() if _has(each, mark, part)]

    def ask(self, path: str, **data: Any) -> Any:
        """Prefect's answer."""
        port = json.loads((self.state / "state.json").read_text())["ports"]["PREFECT_PORT"]
        send = httpx.post if data else httpx.get
        return send(f"http://127.0.0.1:{port}/api/{path}", timeout=60, **({"json": data} if data else {})).json()

    def start_flow(self, name: str, **parameters: Any) -> str:
        deployment = self.ask(f"deployments/name/rcnn/{name}")["id"]
        run = self.ask(f"deployments/{deployment}/create_flow_run", parameters=parameters, state={"type": "SCHEDULED"})
        return str(run["id"])

    def state_of(self, flow_run: str) -> str:
        return str(self.ask(f"flow_runs/{flow_run}")["state_name"])

    def log_of(self, flow_run: str) -> str:
        """What the page of a flow run shows."""
        logs = {"flow_run_id": {"any_": [flow_run]}}
        lines: list[str] = []
        while len(lines) % 200 == 0:
            found = self.ask("logs/filter", logs=logs, sort="TIMESTAMP_ASC", limit=200, offset=len(lines))
            lines += [line["message"] for line in found]
            if not found:
                break
        return "\n".join(lines)

    def wait_for_line(self, flow_run: str, pattern: str, seconds: float = 60) -> str:
        """Waits for a line of a flow's log, which Prefect has some seconds after it was said; returns the log."""
        wait_until(lambda: re.search(pattern, self.log_of(flow_run)) is not None, seconds)
        return self.log_of(flow_run)

    def runs(self) -> dict[str, str]:
        """The state of MLflow's runs by name, as its database has them."""
        import sqlite3

        database = sqlite3.connect(f"file:{self.storage}/mlflow.db?mode=ro", uri=True)
        return dict(database.execute("select name, status from runs order by start_time"))


def _has(process: psutil.Process, mark: str, part: str) -> bool:
    try:
        environment = process.environ()
    except psutil.Error:
        return False
    return environment.get("STACK_MARK") == mark and environment.get("STACK_PART") == part


def wait_until(is_so: Callable[[], bool], seconds: float) -> float:
    """Waits for a condition; returns how long that took."""
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < seconds, "it did not come true"
        time.sleep(0.5)
    return time.monotonic() - started


@pytest.mark.long
def test_a_taken_port_is_named_with_the_way_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = LocalStack(tmp_path).call("up", MLFLOW_PORT=str(port))
    assert done.returncode == 2
    assert f"MLFLOW_PORT: port {port} is in use. Free it, or run `make up MLFLOW_PORT={port + 11}`" in done.stderr


@pytest.mark.long
def test_what_does_not_run_is_said_to_not_run(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path)
    for command, exit_code in (("status", 1), ("down", 0)):
        done = stack.call(command)
        assert (done.returncode, done.stdout) == (exit_code, "the stack is not running\n")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A stack that starts while another Ray has the ports that Ray takes where it is not told otherwise."""
    before = {process.pid for process in psutil.process_iter()}
    stack = LocalStack(tmp_path_factory.mktemp("stack"))
    with Head(has_usual_ports=True):
        up = stack.call("up")
        try:
            assert up.returncode == 0, up.stdout + up.stderr
            assert up.stdout.count("http://127.0.0.1:") == 3
            yield stack
        finally:
            down = stack.call("down")
        assert "the stack is stopped" in down.stdout, down.stderr
    left = [process for process in psutil.process_iter() if process.pid not in before and is_of_the_stack(process)]
    assert left == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
class TestStack:
    """In this order: what breaks parts comes last."""

    def test_every_part_is_well_and_a_shell_reaches_ray(self, stack: LocalStack) -> None:
        status = stack.call("status")
        assert status.returncode == 0, status.stdout
        assert [line.split()[1] for line in status.stdout.splitlines()[1:6]] == ["well"] * 5
        assert "is already running" in stack.call("up").stdout
        shown = stack.in_shell("ray status")
        assert "Active:" in shown.stdout, shown.stdout + shown.stderr

    def test_servers_listen_on_loopback_and_the_token_is_private(self, stack: LocalStack) -> None:
        assert (stack.state / "ray-token").stat().st_mode & 0o777 == 0o600
        for part in ("prefect", "mlflow", "ray", "worker", "keeper"):
            for process in stack.processes(part):
                listening = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
                addresses = {each.laddr.ip.removeprefix("::ffff:") for each in listening}
                assert addresses <= {"127.0.0.1"}, f"{part}: {process.cmdline()}"

    def test_a_flow_ends_with_the_table_and_a_rerun_is_short(self, stack: LocalStack) -> None:
        first = stack.start_flow("full-pipeline", recipe="debug_tiny")
        wait_until(lambda: stack.state_of(first) in ("Completed", "Failed", "Crashed"), 1200)
        assert stack.state_of(first) == "Completed", stack.log_of(first)
        assert stack.ask(f"flow_runs/{first}")["name"] == "mnist-sample RCNN-8 T=1"
        log = stack.wait_for_line(first, "registered +rcnn-mnist-sample version 1, champion")
        assert "job_manager.py" not in log
        started = time.monotonic()
        again = stack.start_flow("full-pipeline", recipe="debug_tiny")
        wait_until(lambda: stack.state_of(again) == "Completed", 300)
        print(f"a rerun with nothing to do: {time.monotonic() - started:.1f} s")
        log = stack.wait_for_line(again, "registered +rcnn-mnist-sample version 1, champion")
        assert log.count("nothing to do") == len(STAGES)

    def test_a_stage_has_a_deployment_which_ends_with_it(self, stack: LocalStack) -> None:
        run = stack.start_flow("train", recipe="debug_tiny")
        wait_until(lambda: stack.state_of(run) == "Completed", 300)
        assert stack.ask(f"flow_runs/{run}")["name"] == "mnist-sample RCNN-8 T=1 train"
        log = stack.wait_for_line(run, "train: nothing to do")
        assert "evaluate" not in log

    def test_a_job_by_hand_uses_what_the_flow_made(self, stack: LocalStack) -> None:
        job = stack.in_shell("ray job submit -- rcnn train --recipe debug_tiny")
        assert job.returncode == 0, job.stdout + job.stderr
        assert "train: nothing to do" in job.stdout + job.stderr

    def test_what_a_crash_leaves_open_is_closed_and_a_cancelled_flow_ends_its_training(self, stack: LocalStack) -> None:
        settings = ["train.epochs=4000", "train.num_rows=0", "tune.enabled=false"]
        first = stack.start_flow("full-pipeline", recipe="debug_tiny", settings=settings)
        stack.wait_for_line(first, "epoch 2/4000", 900)
        for process in stack.processes("worker"):  # with the flow's process, as in a crash of the machine
            process.kill()
        seconds = wait_until(lambda: stack.state_of(first) == "Crashed", SECONDS_TO_CLOSE)
        wait_until(lambda: stack.runs()["pipeline"] == "KILLED", SECONDS_TO_CLOSE - seconds)
        assert stack.runs()["train"] == "RUNNING"  # its job lives: the next flow attaches to it
        wait_until(lambda: "well" in stack.status()["worker"], 300)
        assert "terminated by SIGKILL" in stack.status()["worker"]
        second = stack.start_flow("full-pipeline", recipe="debug_tiny", settings=settings)
        stack.wait_for_line(second, "attaching to Ray job", 300)
        stack.ask(f"flow_runs/{second}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
        seconds = wait_until(lambda: stack.runs()["train"] == "KILLED", 60)
        print(f"a cancelled training ended after {seconds:.1f} s")
        wait_until(lambda: stack.state_of(second) == "Cancelled", 120)

    def test_a_server_that_dies_is_started_again_and_up_repairs_what_is_half_dead(self, stack: LocalStack) -> None:
        [leader] = [process for process in stack.processes("mlflow") if "server" in process.cmdline()][:1]
        leader.kill()
        wait_until(lambda: "terminated by SIGKILL" in stack.status()["mlflow"], 60)
        wait_until(lambda: "well" in stack.status()["mlflow"], 300)
        [raylet] = [process for process in stack.processes("ray") if process.name() == "raylet"]
        raylet.send_signal(signal.SIGTERM)  # `ray start --block` takes that for intended, and stays
        raylet.wait(60)
        assert "its process raylet is missing" in stack.status()["ray"]
        up = stack.call("up")
        assert up.returncode == 0, up.stdout + up.stderr
        assert "ray is down (its process raylet is missing): starting it again" in up.stdout
        assert stack.call("status").returncode == 0


def is_of_the_stack(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
        return "pytest" not in words and any(word in words for word in ("rcnn-stack-", "infra.local", "supervisord"))
    except psutil.Error:
        return False
