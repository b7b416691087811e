"""The automation for flow runs that no longer report, on a whole Prefect server."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from infra.local.ports import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECONDS_TO_START = 240
SECONDS_TO_NOTICE = 300
A_FLOW = """
import time
from prefect import flow

@flow(name="rcnn")
def endless():
    print("runs", flush=True)
    time.sleep(3600)

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
        deadline = time.monotonic() + SECONDS_TO_START
        while not answers(environment):
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.5)
        yield environment
    finally:
        process.terminate()
        process.wait()


def answers(environment: dict[str, str]) -> bool:
    with suppress(OSError):
        urllib.request.urlopen(f"{environment['PREFECT_API_URL']}/health", timeout=5).close()
        return True
    return False


def states(environment: dict[str, str]) -> list[str]:
    question = urllib.request.Request(
        f"{environment['PREFECT_API_URL']}/flow_runs/filter", data=b"{}", headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(question, timeout=30) as answer:
        return [run["state_name"] for run in json.load(answer)]


def test_a_run_whose_process_was_killed_is_crashed_when_its_heartbeats_stop(server: dict[str, str]) -> None:
    for _ in range(2):  # the second time, it is brought up to date
        subprocess.run([sys.executable, "-m", "flows.automations"], env=server, check=True)
    listing = subprocess.run(
        [Path(sys.executable).with_name("prefect"), "automation", "ls"],
        env=server,
        check=True,
        capture_output=True,
        text=True,
    )
    assert listing.stdout.count("no longer") == 1
    running = subprocess.Popen([sys.executable, "-c", A_FLOW], env=server, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "runs\n"
    assert states(server) == ["Running"]
    running.kill()
    running.wait()
    deadline = time.monotonic() + SECONDS_TO_NOTICE
    while states(server) != ["Crashed"]:
        assert time.monotonic() < deadline, states(server)
        time.sleep(1)
