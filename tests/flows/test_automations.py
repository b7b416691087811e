"""The automation for flow runs that no longer report, on a whole Prefect server."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from flows.automations import NAME
from infra.local.ports import free_ports
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECONDS_TO_START = 240
SECONDS_TO_NOTICE = 300
A_FLOW = """
import signal
from prefect import flow

@flow(name="rcnn")
def endless():
    print("runs", flush=True)
    signal.pause()

endless()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A server with its services; yields the environment of its clients."""
    [port] = free_ports(1)
    environment = os.environ | {
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    }
    prefect = str(Path(sys.executable).with_name("prefect"))
    process = subprocess.Popen(
        [prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)], env=environment
    )
    try:
        wait_until(lambda: process.poll() is not None or answers(environment), seconds=SECONDS_TO_START)
        assert process.poll() is None, "the server has ended"
        yield environment
    finally:
        process.terminate()
        process.wait()


def answers(environment: dict[str, str]) -> bool:
    with suppress(OSError):
        urllib.request.urlopen(f"{environment['PREFECT_API_URL']}/health", timeout=5).close()
        return True
    return False


def ask(environment: dict[str, str], what: str, question: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{environment['PREFECT_API_URL']}/{what}/filter",
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def states(environment: dict[str, str]) -> list[str]:
    return [run["state_name"] for run in ask(environment, "flow_runs", {})]


def has_heartbeat(environment: dict[str, str]) -> bool:
    question = {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}}}
    return bool(ask(environment, "events", question)["events"])


def test_a_run_whose_process_was_killed_is_crashed_when_its_heartbeats_stop(server: dict[str, str]) -> None:
    for _ in range(2):  # the second time, it is brought up to date
        subprocess.run([sys.executable, "-m", "flows.automations"], env=server, check=True)
    assert [each["name"] for each in ask(server, "automations", {})] == [NAME]
    running = subprocess.Popen([sys.executable, "-c", A_FLOW], env=server, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "runs\n"
    wait_until(lambda: has_heartbeat(server), seconds=SECONDS_TO_START)
    assert states(server) == ["Running"]
    running.kill()
    running.communicate()
    wait_until(lambda: states(server) == ["Crashed"], seconds=SECONDS_TO_NOTICE)
