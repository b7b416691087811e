"""The local stack, for real, beside another Ray with the usual ports; its start takes a minute, so most of this is `slow`."""

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rcnn.stages import STAGES
from tests.flows.heads import Head
from tests.infra.local_stack import LocalStack
from tests.waiting import wait_until

SECONDS_TO_CLOSE = 60


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
        tags = stack.tags("train")
        assert tags["rcnn.prefect_page"].endswith(f"/runs/flow-run/{first}")
        assert tags["rcnn.ray_page"].endswith(f"/#/jobs/{tags['rcnn.ray_submission']}")
        assert f"Prefect run: [{tags['rcnn.prefect_page']}]" in tags["mlflow.note.content"]
        artifacts = stack.ask("artifacts/filter", artifacts={"key": {"any_": ["rcnn-train"]}})
        assert any(tags["rcnn.ray_page"] in f"{each['data']}{each['description']}" for each in artifacts)
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
