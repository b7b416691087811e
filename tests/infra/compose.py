"""`infra/compose/compose.yaml` as tests read it, and its services as processes of this machine.

No Docker engine runs on the machines where this project is developed. Each service runs by the command, environment, health
check and order of the file, in a network namespace of its own, in which the names of the other services resolve.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Self

import yaml

from tests.faults.nodes import Machine, Undone, _ip, can_run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "compose"
SECONDS_TO_START = 400
DOOR = "deploy"
"""The service beside which a door can be opened, at prefect.door.test and so on: it has ended, and its ports are free."""
POSTGRES_BINARIES = Path(os.path.realpath(shutil.which("postgres") or "")).parent


def services() -> dict[str, dict[str, Any]]:
    """The services, with the merge keys of YAML resolved, but no variables."""
    return dict(yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"])


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """A value of the file with its variables replaced, as Compose does it."""
    if isinstance(value, dict):
        return {name: interpolated(each, variables) for name, each in value.items()}
    if isinstance(value, list):
        return [interpolated(each, variables) for each in value]
    if not isinstance(value, str):
        return value

    def value_of(found: re.Match[str]) -> str:
        name, kind, text = found.groups()
        if kind == ":?":
            assert variables.get(name), f"{name} is not set: {text}"
        return variables.get(name) or (text if kind == ":-" else "")

    return re.sub(r"\$\{(\w+)(:[?-])?([^}]*)\}", value_of, value)


def can_run_services() -> bool:
    """Whether this machine has the servers, and lets us make namespaces."""
    programs = ("postgres", "weed", "wget", "setpriv")
    return can_run() and all(map(shutil.which, programs))


class _Container(Machine):
    network, bridge = "10.90.0", "compose-net"


class Stack(Undone):
    """The services as processes; entering starts them in the order of `depends_on`, each when those before it are healthy."""

    def __init__(self, folder: Path, variables: Mapping[str, str]):
        self._folder = folder
        self.services: dict[str, dict[str, Any]] = interpolated(services(), variables)
        self._machines: dict[str, _Container] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        _ip("link", "add", _Container.bridge, "type", "bridge")
        _ip("link", "set", _Container.bridge, "up")
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for machine in self._machines.values():
            machine.remove()
            shutil.rmtree(Path("/etc/netns", machine.name), ignore_errors=True)
        _ip("link", "del", _Container.bridge)

    def run(self, service: str, *command: str, timeout: float = 900) -> "subprocess.CompletedProcess[str]":
        """Runs a command to its end where a service runs, with its environment."""
        call = self._call(service, command)
        return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout)

    def start(self, service: str, *command: str) -> "subprocess.Popen[bytes]":
        """Starts a command beside a service; it ends with the stack."""
        with (self._folder / f"{command[0]}.log").open("ab") as log:
            self._processes[command[0]] = subprocess.Popen(
                self._call(service, command), cwd=ROOT, stdout=log, stderr=log
            )
        return self._processes[command[0]]

    def log(self, service: str) -> str:
        """The output of a service."""
        return (self._folder / f"{service}.log").read_text()

    def _start(self) -> None:
        for place in ("home", "s3"):
            (self._folder / place).mkdir()
        order = TopologicalSorter({name: set(each.get("depends_on", ())) for name, each in self.services.items()})
        for number, name in enumerate(self.services, start=1):
            # The links of a stack that ended a moment ago may still be there: this process has names of its own.
            machine = self._machines[name] = _Container(f"c{os.getpid()}-{number}", number)
            _ip("-n", machine.name, "route", "add", "default", "dev", "eth0")
        hosts = "".join(f"{machine.address} {name}\n" for name, machine in self._machines.items())
        hosts += "".join(f"{self._machines[DOOR].address} {name}.door.test\n" for name in ("prefect", "mlflow", "ray"))
        for machine in self._machines.values():
            own = Path("/etc/netns", machine.name)
            own.mkdir(parents=True)
            (own / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
            (own / "resolv.conf").write_text(
                "nameserver 127.0.0.1\n"
            )  # refuses at once; gRPC waits for a server that is away
        for name in order.static_order():
            if name == "postgres":
                self._create_databases()
            self._serve(name, self.services[name].get("command") or self._postgres())
            if "healthcheck" in self.services[name]:
                self._wait(name)
            else:
                assert self._processes.pop(name).wait(SECONDS_TO_START) == 0, self.log(name)

    def _serve(self, name: str, command: list[str]) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self._call(name, [*self.services[name].get("entrypoint", ()), *command]),
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def _wait(self, name: str) -> None:
        test = self.services[name]["healthcheck"]["test"]
        assert test[0] == "CMD"
        deadline = time.monotonic() + SECONDS_TO_START
        while (answer := self.run(name, *test[1:], timeout=60)).returncode != 0:
            self._restart_what_ended()
            assert time.monotonic() < deadline, f"{name} is not healthy: {answer.stderr}{self.log(name)[-3000:]}"
            time.sleep(0.5)

    def _restart_what_ended(self) -> None:
        """As `restart: unless-stopped` does. On a busy machine, Ray ends its head when one of its parts starts too late."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None:
                self._serve(name, self.services[name].get("command") or self._postgres())

    def _call(self, name: str, command: "list[str] | tuple[str, ...]") -> list[str]:
        """A command in the namespace and with the environment of a service. Folders of its container are folders of ours."""
        places = {"/home/rcnn": str(self._folder / "home"), "/app": str(ROOT)}
        for volume in self.services[name].get("volumes", ()):
            source, target = volume.split(":")[:2]
            places[target] = str(FOLDER / source) if source.startswith(".") else str(self._folder / source)
        # A /tmp of its own: Ray's nodes on one machine find each other's clusters there.
        own = self._folder / self._machines[name].name
        own.mkdir(exist_ok=True)
        environment = {
            "RAY_TMPDIR": str(own), "TMPDIR": str(own),
            "PATH": f"{Path(sys.executable).parent}:{POSTGRES_BINARIES}:{os.environ['PATH']}",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "HOME": str(self._folder / "home"), "DO_NOT_TRACK": "1",
            "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONUNBUFFERED": "1",
            **self.services[name].get("environment", {}),
        }  # fmt: skip
        for target, place in places.items():
            environment = {key: re.sub(rf"^{target}(?=/|$)", place, value) for key, value in environment.items()}
            command = [re.sub(rf"(?<=-dir=){target}$", place, word) for word in command]
        variables = [f"{key}={value}" for key, value in environment.items()]
        return ["ip", "netns", "exec", self._machines[name].name, "env", "-i", *variables, *command]

    def _postgres(self) -> list[str]:
        return [*_as("postgres"), "postgres", "-D", str(self._folder / "postgres" / "data"), "-h", "*"]

    def _create_databases(self) -> None:
        """What the entrypoint of PostgreSQL's image does on an empty volume."""
        environment = self.services["postgres"]["environment"]
        home, password = self._folder / "postgres", self._folder / "postgres" / "password"
        home.mkdir()
        password.write_text(environment["POSTGRES_PASSWORD"])
        for place in (home, password):
            shutil.chown(place, "postgres")
        # Without UTF8, psycopg returns bytes, and MLflow's server does not start.
        make = ["initdb", "--auth=scram-sha-256", "--username=postgres", f"--pwfile={password}", "--encoding=UTF8"]
        done = self.run("postgres", *_as("postgres"), *make, "--locale=C.UTF-8", str(home / "data"))
        assert done.returncode == 0, done.stderr
        password.unlink()
        with (home / "data" / "pg_hba.conf").open("a") as rules:
            rules.write("host all all all scram-sha-256\n")
        with (home / "data" / "postgresql.conf").open("a") as settings:
            settings.write(f"unix_socket_directories = '{home}'\n")
        self._serve("postgres", self._postgres())
        self._wait("postgres")
        for script in sorted((FOLDER / "postgres").glob("*.sql")):
            done = self.psql("postgres", "postgres", environment["POSTGRES_PASSWORD"], "--file", str(script))
            assert done.returncode == 0, done.stderr
        server = self._processes.pop("postgres")
        server.terminate()
        server.wait(30)

    def psql(self, database: str, role: str, password: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Runs psql against the server, over its network."""
        options = ["--host", "postgres", "--username", role, "--no-align", "--tuples-only", "--set", "ON_ERROR_STOP=1"]
        return self.run("postgres", "env", f"PGPASSWORD={password}", "psql", *options, "--dbname", database, *arguments)


def _as(user: str) -> list[str]:
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
