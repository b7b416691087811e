"""The local stack from a shell: `make up`, `make up-prod`, `make down`, `make status`.

`up` starts the parts of `parts.py` under supervisor, waits until each has shown that it works, and deploys `prefect.yaml`;
where some parts of a stack are down, it starts these. `down` ends the processes with this stack's mark in their environment,
and their descendants, but no others.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import psutil

from infra.local import seaweed
from infra.local.parts import KINDS, PART, ROOT, STATE, Kind, Part, Stack, recorded
from infra.local.ports import free_ports, is_free
from infra.local.private import write_private
from infra.local.supervision import LOGS, SECONDS_TO_START, Supervisor, end_processes, last_exit, log_of, processes_of
from rcnn.errors import ClusterError, ConfigError, RcnnError
from rcnn.progress import as_duration

SECONDS_TO_STOP = 40
SECONDS_BETWEEN_LOOKS = 0.3
SECONDS_YOUNG = 120
"""A part of this age that is not well is probably on its way: supervisor has started it after its last end."""


def main() -> int:
    """Runs `up`, `up-prod`, `down` or `status`, or `run PART`, which supervisor calls; returns the exit code."""
    commands: dict[str, Callable[[], int | None]] = {"down": down, "status": status, "run": lambda: run(sys.argv[2])}
    commands |= {row.target: partial(up, kind) for kind, row in KINDS.items()}
    try:
        return commands[sys.argv[1]]() or 0
    except RcnnError as error:
        print(f"stack: {error}", file=sys.stderr)
        return 2


def up(kind: str) -> None:
    """Starts the stack, or those of its parts that are down; returns when every part has shown that it works.

    Args:
        kind: a key of `KINDS`.

    Raises:
        ClusterError: a stack of another kind is running, a program is missing, a port is in use, or a part does not start.
    """
    stack = recorded()
    if stack and Supervisor(stack).answers():
        _require_kind(stack, kind)
        _repair(stack)
        return
    if stack:
        _end_all(stack)
    stack = _new_stack(kind)
    print(f"starting {', '.join(part.name for part in stack.parts)}; their output goes to {LOGS}")
    try:
        supervisor = Supervisor(stack)
        supervisor.start()
        _wait_for_supervisor(supervisor)
        _wait_until_well(stack, stack.parts)
        _deploy(stack)
    except BaseException:
        _end_all(stack)
        raise
    _print_addresses(stack)


def _require_kind(stack: Stack, kind: str) -> None:
    if stack.kind != kind:
        raise ClusterError(
            f"the stack of `make {stack.row.target}` is running here",
            where=str(STATE),
            remedy=f"Use it, or run `make down` and then `make {KINDS[kind].target}`",
        )


def down() -> None:
    """Stops the stack."""
    stack = recorded()
    if not stack or not processes_of(stack.mark):
        print("the stack is not running")
        return
    _end_all(stack)
    print("the stack is stopped")


def status() -> int:
    """Prints a line for each part; returns 1 where one is not well."""
    stack = recorded()
    if not stack:
        print("the stack is not running")
        return 1
    supervisor = Supervisor(stack)
    is_there = supervisor.answers()
    rows = [("part", "state", "up", "address", "last error")]
    num_faults = 0
    for part in stack.parts:
        fault, seconds = supervisor.fault_of(part) if is_there else ("not running", 0.0)
        num_faults += bool(fault)
        rows.append((part.name, fault or "well", as_duration(seconds), part.address(stack) or "-", last_exit(part)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not is_there:
        print(f"its supervisor is not running: `make {stack.row.target}` starts the stack again")
    elif num_faults:
        print(f"`make {stack.row.target}` starts what is down")
    print(f"output: {LOGS}/PART.log")
    return 1 if num_faults else 0


def run(name: str) -> None:
    """Becomes a part; what an earlier process of it left is ended first, since it may hold the ports."""
    stack = recorded()
    assert stack, "supervisor runs in a stack"
    part = stack.part(name)
    os.environ[PART] = part.name
    family = {os.getpid(), *(each.pid for each in psutil.Process().parents())}

    def left_over() -> set[psutil.Process]:
        return {each for each in processes_of(stack.mark, part.name) if each.pid not in family and not _is_flow(each)}

    if left := left_over():
        print(f"stack: ending {len(left)} processes of the {part.name} before", flush=True)
        end_processes(left_over, seconds=3)
    for needed in part.needs:
        _wait_for_part(stack.part(needed), stack)
    command = part.command(stack)
    os.execve(command[0], command, os.environ | part.environment(stack))


def _is_flow(process: psutil.Process) -> bool:
    """Whether it belongs to a flow run, which does not need the worker that started it."""
    try:
        return "PREFECT__FLOW_RUN_ID" in process.environ()
    except psutil.Error:
        return False


def _wait_for_part(part: Part, stack: Stack) -> None:
    supervisor = Supervisor(stack)
    while supervisor.fault_of(part)[0]:
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _new_stack(kind: str) -> Stack:
    """Chooses the ports of a new stack, makes its folders and its token, and records it."""
    row = KINDS[kind]
    usual = _usual_ports(row)
    inner = free_ports(len(row.inner_ports), but=usual.values())
    row.prepare()
    folder = tempfile.mkdtemp(prefix="rcnn-stack-")
    stack = Stack(kind, uuid.uuid4().hex, usual | dict(zip(row.inner_ports, inner, strict=True)), folder)
    STATE.mkdir(parents=True, exist_ok=True)
    for old in ("supervisor.log", "logs"):
        _remove(STATE / old)
    # A token of this stack's own: whoever answers to it is our Ray.
    write_private(STATE / "ray-token", secrets.token_hex(32))
    (STATE / "state.json").write_text(json.dumps(vars(stack)))
    write_private(STATE / "env.sh", _shell_lines(stack))
    return stack


def _usual_ports(kind: Kind) -> dict[str, int]:
    """The ports that people use: as the environment says, or else the usual ones or, where these are taken, others.

    Raises:
        ConfigError: a variable is not a port.
        ClusterError: the port that a variable asks for is in use.
    """
    ports: dict[str, int] = {}
    for name, usual in kind.usual_ports.items():
        text = os.environ.get(name, "")
        port = _as_port(text, name) if text else usual
        if text and not is_free(port):
            raise ClusterError(
                f"port {port} is in use", where=name, remedy=f"Free it, or run `make {kind.target} {name}={port + 11}`"
            )
        if not is_free(port):
            [port] = free_ports(1, but=ports.values())
            print(f"port {usual} is in use: {name} is {port}")
        ports[name] = port
    return ports


def _as_port(text: str, name: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ConfigError(f"{text!r} is not a port", where=name, remedy="Give a number from 1 to 65535")
    return int(text)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _shell_lines(stack: Stack) -> str:
    """The exports that a shell needs to use the stack."""
    lines = {
        "PATH": f"{Path(sys.executable).parent}:$PATH",
        "PREFECT_API_URL": stack.prefect_api,
        "MLFLOW_TRACKING_URI": stack.url("MLFLOW_PORT"),
        "RAY_ADDRESS": f"127.0.0.1:{stack.ports['RAY_PORT']}",
        **stack.ray_client(),
        **stack.row.shell(stack),
    }
    # What an AWS profile of the user's would put before the stack's own S3.
    unset = "unset AWS_PROFILE AWS_SESSION_TOKEN AWS_ENDPOINT_URL_S3\n" if "AWS_ENDPOINT_URL" in lines else ""
    return unset + "".join(f'export {name}="{value}"\n' for name, value in lines.items())


def _wait_for_supervisor(supervisor: Supervisor) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not supervisor.answers():
        if time.monotonic() > deadline:
            raise _did_not_start("supervisor", "it does not answer", STATE / "supervisor.out")
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _did_not_start(name: str, why: str, log: Path) -> ClusterError:
    return ClusterError(f"{name} did not start ({why})", where=str(log), remedy="See that file for the reason")


def _wait_until_well(stack: Stack, parts: Iterable[Part]) -> None:
    """Returns when each part has shown that it works."""
    os.environ.update(stack.environment())  # for the proof that is a Ray job
    supervisor, started = Supervisor(stack), time.monotonic()
    for part in parts:
        while fault := supervisor.fault_of(part)[0]:
            has_given_up = supervisor.process(part).state == "FATAL"
            if has_given_up or time.monotonic() > started + SECONDS_TO_START:
                raise _did_not_start(part.name, fault, log_of(part))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if part.proof:
            part.proof(stack)
        print(f"  {part.name} is up after {time.monotonic() - started:.0f} s", flush=True)


def _repair(stack: Stack) -> None:
    """Starts the parts that are down, and starts again those that are not well; those that have just started are waited for."""
    supervisor, faulty = Supervisor(stack), list[Part]()
    for part in stack.parts:
        fault, seconds = supervisor.fault_of(part)
        if not fault:
            continue
        faulty.append(part)
        if 0 < seconds < SECONDS_YOUNG:
            print(f"{part.name} is starting ({fault})")
            continue
        print(f"{part.name} is down ({fault}): starting it again")
        supervisor.stop_part(part)
        supervisor.start_part(part)
    if not faulty:
        print("the stack is already running, and all of it is well; `make down` stops it")
    _wait_until_well(stack, faulty)
    _print_addresses(stack)


def _end_all(stack: Stack) -> None:
    """Ends every process of a stack, and forgets it."""
    supervisor = Supervisor(stack)
    if supervisor.answers():
        supervisor.shut_down()
        psutil.wait_procs(list(processes_of(stack.mark)), timeout=SECONDS_TO_STOP)
    family = {os.getpid(), *(each.pid for each in psutil.Process().parents())}
    left = end_processes(
        lambda: {each for each in processes_of(stack.mark) if each.pid not in family}, seconds=SECONDS_TO_STOP / 4
    )
    if left:
        raise ClusterError(f"{len(left)} processes do not end", where=", ".join(str(process.pid) for process in left))
    shutil.rmtree(stack.folder, ignore_errors=True)
    seaweed.remove_sockets(stack.ports)
    (STATE / "state.json").unlink(missing_ok=True)


def _deploy(stack: Stack) -> None:
    command, log = ["prefect", "--no-prompt", "deploy", "--all"], LOGS / "deploy.log"
    with open(log, "w") as output:
        env = os.environ | stack.environment()
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=output, stderr=output, check=False)
    if done.returncode:
        raise ClusterError(
            f"`{' '.join(command)}` failed with exit code {done.returncode}",
            where="prefect.yaml",
            remedy=f"See its output in {log}",
        )


_HINTS = {"ray": f" (its page asks for the token in {STATE / 'ray-token'})"}


def _print_addresses(stack: Stack) -> None:
    for part in stack.parts:
        if address := part.address(stack):
            print(f"  {part.name:8} {address}{_HINTS.get(part.name, '')}")
    print(
        f"""
Next:
  source {STATE / "env.sh"}
  prefect deployment run rcnn/full-pipeline --watch
  ray job submit -- rcnn train --recipe debug_tiny
  make status
  make down"""
    )


if __name__ == "__main__":
    sys.exit(main())
