"""Starts and stops the local stack: a Prefect server, an MLflow server, a Ray head and a Prefect worker, on loopback.

`up` runs the Procfile under honcho in the background, waits until each part responds, and deploys `prefect.yaml`. `down`
ends the processes with this stack's mark in their environment, and their descendants, but no others.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, ConfigError, RcnnError
from rcnn.signals import SECONDS_TO_END
from rcnn.tracking import has_store, runs_page

ROOT = Path(__file__).parents[2]
STORAGE = Path(os.environ.get("RCNN_STORAGE", ROOT / "storage")).absolute()
# Independent of the settings: `make down` must find what `make up` started. Tests use their own.
STATE = Path(os.environ.get("STACK_STATE", ROOT / "storage" / "stack"))
PORTS = {"PREFECT_PORT": 4200, "MLFLOW_PORT": 5000, "RAY_DASHBOARD_PORT": 8265, "RAY_PORT": 6379}
MARK = "STACK_MARK"
SECONDS_TO_START = 180  # on two idle cores the slowest part, MLflow, takes 17 s; a busy machine takes far longer
SECONDS_TO_STOP = 15


def main() -> int:
    """Runs `up`, `down`, or `worker`, which the Procfile calls."""
    commands = {"up": up, "down": down, "worker": run_worker}
    try:
        commands[sys.argv[1]]()
    except RcnnError as error:
        print(f"stack: {error}", file=sys.stderr)
        return 2
    return 0


def up() -> None:
    """Starts the stack unless it is running; returns when every part responds.

    Raises:
        ClusterError: a port is in use, or a part does not start.
    """
    if _processes():
        print("the stack is already running; `make down` stops it")
        _print_addresses()
        return
    ports = {name: _port(name) for name in PORTS}
    _require_free(ports)
    _create_store()
    STATE.mkdir(parents=True, exist_ok=True)
    env = _environment(ports)
    (STATE / "state.json").write_text(json.dumps({"mark": env[MARK], "ports": ports}))
    (STATE / "env.sh").write_text(_shell_lines(ports))
    print(f"starting Prefect, MLflow, Ray and a worker; their output goes to {STATE / 'stack.log'}")
    subprocess.run(["ray", "get-auth-token", "--generate"], env=env, check=True, stdout=subprocess.DEVNULL)
    with open(STATE / "stack.log", "w") as log:
        honcho = subprocess.Popen(
            ["honcho", "-f", "infra/local/Procfile", "start"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_until_all_answer(ports, honcho)
        _deploy(env)
    except BaseException:
        down()
        raise
    _print_addresses()


def down() -> None:
    """Stops the stack: SIGTERM first, and SIGKILL for processes that remain after some seconds."""
    processes = _processes()
    if not processes:
        print("the stack is not running")
        return
    # honcho first: it forwards the signal to its children, so that each can shut down cleanly.
    leaders = [process for process in processes if process.name() == "honcho"] or processes
    _signal(leaders, signal.SIGTERM)
    _, left = psutil.wait_procs(processes, timeout=SECONDS_TO_STOP)
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = list({*left, *_processes()})
        _signal(left, number)
        _, left = psutil.wait_procs(left, timeout=5)
    if left:
        raise ClusterError(f"{len(left)} processes do not end", where=", ".join(str(process.pid) for process in left))
    (STATE / "state.json").unlink()
    print("the stack is stopped")


def run_worker() -> None:
    """Waits for the Prefect server, then becomes the worker of the pool "rcnn"."""
    _wait(lambda: _answers(f"{os.environ['PREFECT_API_URL']}/health"), "Prefect")
    os.execvp("prefect", ["prefect", "worker", "start", "--pool", "rcnn", "--type", "process", "--name", "local"])


def _create_store() -> None:
    """Creates MLflow's store before its server would: a server that is killed while creating it leaves a broken store."""
    config = PipelineConfig().with_settings({"storage": str(STORAGE)})
    if not has_store(config):
        from rcnn.registry.mlflow_store import create_store  # late: MLflow takes seconds to import

        create_store(config)


def _environment(ports: dict[str, int]) -> dict[str, str]:
    """The environment of all parts of the stack; RCNN_... variables give the flow and the jobs the addresses."""
    return os.environ | {
        **{name: str(port) for name, port in ports.items()},
        MARK: uuid.uuid4().hex,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PWD": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "RCNN_STORAGE": str(STORAGE),
        "RCNN_TRACKING__URI": f"http://127.0.0.1:{ports['MLFLOW_PORT']}",
        "PREFECT_HOME": str(STATE / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{ports['PREFECT_PORT']}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # Saves 5 s of the server's start (22 s to 17 s) and eight processes, for features that are not used here.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_END),  # of jobs that are submitted by hand
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # 0 keeps Ray on loopback, on Linux too
    }


def _shell_lines(ports: dict[str, int]) -> str:
    """The exports that a shell needs to use the stack."""
    lines = {
        "PATH": f"{Path(sys.executable).parent}:$PATH",
        "PREFECT_API_URL": f"http://127.0.0.1:{ports['PREFECT_PORT']}/api",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports['MLFLOW_PORT']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['RAY_DASHBOARD_PORT']}",
        "RAY_AUTH_MODE": "token",
    }
    return "".join(f'export {name}="{value}"\n' for name, value in lines.items())


def _port(name: str) -> int:
    text = os.environ.get(name, str(PORTS[name]))
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ConfigError(f"{text!r} is not a port", where=name, remedy="Give a number from 1 to 65535")
    return int(text)


def _require_free(ports: dict[str, int]) -> None:
    for name, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise ClusterError(
                    f"port {port} is in use", where=name, remedy=f"Free it, or run `make up {name}={port + 11}`"
                ) from error


def _wait_until_all_answer(ports: dict[str, int], honcho: "subprocess.Popen[bytes]") -> None:
    api = f"http://127.0.0.1:{ports['PREFECT_PORT']}/api"
    parts: dict[str, Callable[[], bool]] = {
        "Prefect": lambda: _answers(f"{api}/health"),
        "MLflow": lambda: _answers(f"http://127.0.0.1:{ports['MLFLOW_PORT']}/health"),
        "Ray": lambda: _answers(f"http://127.0.0.1:{ports['RAY_DASHBOARD_PORT']}/api/version"),
        "the worker": lambda: _has_worker(api),
    }
    started = time.monotonic()
    for name, is_up in parts.items():
        _wait(is_up, name, lambda: honcho.poll() is None)
        print(f"  {name} is up after {time.monotonic() - started:.0f} s")


def _wait(is_up: Callable[[], bool], name: str, is_alive: Callable[[], bool] = lambda: True) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not is_up():
        if not is_alive() or time.monotonic() > deadline:
            raise ClusterError(
                f"{name} did not start", where=str(STATE / "stack.log"), remedy="See that file for the reason"
            )
        time.sleep(0.3)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()  # noqa: S310  (our own loopback address)
    except urllib.error.HTTPError:
        return True  # it requires a token, so it is up
    except OSError:
        return False
    return True


def _has_worker(api: str) -> bool:
    workers = _asked(f"{api}/work_pools/rcnn/workers/filter", {})
    return any(worker["status"] == "ONLINE" for worker in workers or [])


def _asked(url: str, question: dict[str, Any]) -> Any:
    """What one of our servers answers to a POST; None where it does not."""
    request = urllib.request.Request(  # noqa: S310
        url, data=json.dumps(question).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:  # noqa: S310
            return json.load(answer)
    except OSError:
        return None


def _mlflow_page(port: int) -> str:
    """The training runs of the experiment that was used last; MLflow's own address as long as there is none."""
    address = f"http://127.0.0.1:{port}"
    question = {"max_results": 1, "filter": "name LIKE 'rcnn/%'", "order_by": ["last_update_time DESC"]}
    answer = _asked(f"{address}/api/2.0/mlflow/experiments/search", question) or {}
    found = [each["experiment_id"] for each in answer.get("experiments", [])]
    return runs_page(address, found[0]) if found else address


def _deploy(env: dict[str, str]) -> None:
    with open(STATE / "stack.log", "a") as log:
        command = ["prefect", "--no-prompt", "deploy", "--all"]
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log, check=False)
    if done.returncode:
        raise ClusterError(
            f"`{' '.join(command)}` failed with exit code {done.returncode}",
            where="prefect.yaml",
            remedy=f"See its output at the end of {STATE / 'stack.log'}",
        )


def _print_addresses() -> None:
    ports = json.loads((STATE / "state.json").read_text())["ports"]
    print(
        f"""
  Prefect  http://127.0.0.1:{ports["PREFECT_PORT"]}
  MLflow   {_mlflow_page(ports["MLFLOW_PORT"])}
  Ray      http://127.0.0.1:{ports["RAY_DASHBOARD_PORT"]}

Next:
  source {STATE / "env.sh"}
  prefect deployment run rcnn/full-pipeline --watch
  ray job submit -- rcnn train --recipe debug_tiny
  make down"""
    )


def _processes() -> list[psutil.Process]:
    """Every process of this stack: processes with its mark, orphans included, and all of their descendants.

    The mark is not enough: Ray's workers overwrite their environment with their process title.
    """
    state = STATE / "state.json"
    if not state.exists():
        return []
    mark = json.loads(state.read_text())["mark"]
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.update((process, *process.children(recursive=True)))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return list(found)


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    sys.exit(main())
