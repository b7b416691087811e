"""The process manager, supervisor: it starts the parts of a stack, and starts again those that end.

Its socket is in a folder that only its user can enter, and it listens on no port.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import psutil
from supervisor.xmlrpc import SupervisorTransport

from infra.local.parts import MARK, PART, ROOT, STATE, Part, Stack
from rcnn.errors import ClusterError

SECONDS_TO_ANSWER = 10
SECONDS_TO_STOP = 15
SECONDS_TO_START = 300
"""On two idle cores the slowest part, MLflow, takes 17 s; a busy machine takes far longer."""
LOG, LOGS = STATE / "supervisor.log", STATE / "logs"

_CONFIG = """\
[supervisord]
nodaemon = true
logfile = {log}
logfile_maxbytes = 5MB
pidfile = {folder}/supervisor.pid
childlogdir = {folder}

[unix_http_server]
file = {socket}
chmod = 0600

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
"""
_PROGRAM = """
[program:{name}]
command = "{python}" -m infra.local.stack run {name}
directory = {root}
priority = {priority}
autostart = true
autorestart = true
startsecs = 5
startretries = 20
stopsignal = {stop_signal}
stopwaitsecs = {seconds}
redirect_stderr = true
stdout_logfile = {log}
stdout_logfile_maxbytes = 10MB
stdout_logfile_backups = 2
"""


@dataclass(frozen=True)
class Process:
    """What supervisor says of a part.

    Attributes:
        state: RUNNING, STARTING, BACKOFF, STOPPED, EXITED or FATAL.
        pid: 0: there is none.
        seconds: since its start.
    """

    state: str
    pid: int
    seconds: float

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self.state in ("RUNNING", "STARTING") and self.pid > 0


class Supervisor:
    """The supervisor of one stack."""

    def __init__(self, stack: Stack):
        self._stack = stack

    def _request(self, name: str, *arguments: Any) -> Any:
        """Asks, by a connection of its own: one that failed cannot be used again.

        Raises:
            ClusterError: it does not answer.
            Fault: it refuses.
        """
        transport = SupervisorTransport(None, None, f"unix://{self._stack.socket}")
        try:
            return getattr(ServerProxy("http://127.0.0.1", transport=transport).supervisor, name)(*arguments)
        except (OSError, HTTPException) as error:
            raise ClusterError(
                f"supervisor does not answer ({type(error).__name__})",
                where=self._stack.socket,
                remedy=f"`make {self._stack.row.target}` starts the stack again",
            ) from error

    def start(self) -> "subprocess.Popen[bytes]":
        """Starts it, and with it all parts."""
        LOGS.mkdir(parents=True, exist_ok=True)
        file = STATE / "supervisor.conf"
        file.write_text(self._config())
        with open(STATE / "supervisor.out", "w") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "supervisor.supervisord", "-c", str(file)],
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        """A Ray that the user's shell uses is none of the stack's business, nor are an S3 or a database of the user's."""
        foreign = ("RAY_ADDRESS", *self._stack.row.foreign)
        own = {name: text for name, text in os.environ.items() if not name.startswith(foreign)}
        return own | self._stack.environment()

    def _config(self) -> str:
        def escaped(path: object) -> str:
            return str(path).replace("%", "%%")

        common = {"folder": escaped(self._stack.folder), "socket": escaped(self._stack.socket), "log": escaped(LOG)}
        programs = [
            _PROGRAM.format(
                name=part.name,
                python=escaped(sys.executable),
                root=escaped(ROOT),
                priority=number,
                stop_signal=part.stop_signal,
                seconds=SECONDS_TO_STOP,
                log=escaped(log_of(part)),
            )
            for number, part in enumerate(self._stack.parts)
        ]
        return _CONFIG.format(**common) + "".join(programs)

    def answers(self) -> bool:
        """Whether it is there."""
        try:
            return bool(self._request("getState")["statename"] == "RUNNING")
        except (ClusterError, Fault):
            return False

    def process(self, part: Part) -> Process:
        """How a part's process is."""
        found = self._request("getProcessInfo", part.name)
        return Process(found["statename"], found["pid"], found["now"] - found["start"] if found["pid"] else 0)

    def fault_of(self, part: Part) -> tuple[str, float]:
        """What is wrong with a part, or nothing; and for how many seconds it has been running."""
        process = self.process(part)
        if not process.is_running:
            return {"BACKOFF": "ends at its start", "FATAL": "given up"}.get(process.state, "not running"), 0.0
        try:
            return part.fault(self._stack, psutil.Process(process.pid)), process.seconds
        except psutil.NoSuchProcess:
            return "not running", 0.0

    def start_part(self, part: Part) -> None:
        """Starts a part, unless it is running."""
        self._ask("startProcess", part, waits=False)

    def stop_part(self, part: Part, *, waits: bool = True) -> None:
        """Ends a part, unless it is not running."""
        self._ask("stopProcess", part, waits=waits)

    def _ask(self, request: str, part: Part, *, waits: bool) -> None:
        """Sends a request; that a part is already as wanted is not an error."""
        try:
            self._request(request, part.name, waits)
        except Fault as fault:
            if fault.faultString.split(":")[0] not in ("ALREADY_STARTED", "NOT_RUNNING"):
                raise ClusterError(f"supervisor refuses {request}: {fault.faultString}", where=part.name) from fault

    def shut_down(self) -> None:
        """Ends the parts and the supervisor: those who use the servers first, so that they can say goodbye."""
        for part in reversed(self._stack.parts):
            self.stop_part(part, waits=bool(part.needs))
        self._request("shutdown")


def log_of(part: Part) -> Path:
    """Where a part's output goes."""
    return LOGS / f"{part.name}.log"


def last_exit(part: Part) -> str:
    """When and how a part ended last; empty: it never did by itself. The lines are those of supervisor and of the keeper."""
    pattern = re.compile(rf"^(\S+ [\d:]+)\S* \S+ (?:exited|gave up|restarting): {part.name}[ ,:]+(.*)")
    lines = [line for file in (LOG, LOGS / "keeper.log") if file.exists() for line in file.read_text().splitlines()]
    found = sorted(match.groups() for line in lines if (match := pattern.match(line)))
    return f"{found[-1][1].strip('()')} at {found[-1][0]}" if found else ""


def processes_of(mark: str, part: str = "") -> set[psutil.Process]:
    """Every process of a stack, or of a part: those with its mark, orphans included, and all of their descendants.

    The mark is not enough: Ray's workers overwrite their environment with their process title.
    """
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get(MARK) != mark or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if not part or environment.get(PART) == part:
                found.update((process, *process.children(recursive=True)))
        except psutil.Error:
            continue
    return found


def end_processes(find: Callable[[], set[psutil.Process]], *, seconds: float) -> list[psutil.Process]:
    """Ends what `find` returns, by SIGTERM and then by SIGKILL; returns what remains."""
    left: list[psutil.Process] = []
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 5)):
        left = list({*left, *find()})
        for process in left:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        _, left = psutil.wait_procs(left, timeout=patience)
    return left


def timestamp() -> str:
    """As supervisor writes it in its log."""
    return time.strftime("%Y-%m-%d %H:%M:%S")
