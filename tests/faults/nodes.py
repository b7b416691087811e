"""A Ray cluster of machines that share nothing but a network: each is a network namespace of Linux, with an address of its own.

The head has no cores. An S3 store and an MLflow server are on the bridge between them, and the pipeline is started in a
namespace that is not part of the cluster. Needs root, and `ip`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from rcnn.config import PipelineConfig

NETWORK = "10.89.0"
BRIDGE, HEAD, USER = 254, 1, 100  # the last numbers of addresses
DASHBOARD_PORT, RAY_PORT, S3_PORT, MLFLOW_PORT = 8265, 6379, 5555, 5000
SECONDS_TO_START = 240
# The tests' own environment: nobody else reaches this network.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true",
}  # fmt: skip
BIN = Path(sys.executable).parent


def can_run() -> bool:
    """Whether this machine lets us make namespaces."""
    return os.geteuid() == 0 and shutil.which("ip") is not None


class Machine:
    """A namespace with an address."""

    network, bridge = NETWORK, "rcnn-net"

    def __init__(self, name: str, number: int):
        self.name, self.address = name, f"{self.network}.{number}"
        outside = f"{name}-out"
        _ip("netns", "add", name)
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", outside, "master", self.bridge, "up")
        for arguments in (
            ("addr", "add", f"{self.address}/24", "dev", "eth0"), ("link", "set", "eth0", "up"), ("link", "set", "lo", "up"),
        ):  # fmt: skip
            _ip("-n", name, *arguments)

    def start(self, command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
        """Starts a command there."""
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command], env=_environment(), stdout=output, stderr=output
            )

    @property
    def cpu_seconds(self) -> float:
        """The processor time of its processes, those that ended included."""
        total = 0.0
        for pid in _output("netns", "pids", self.name).split():
            with suppress(psutil.NoSuchProcess):
                total += sum(
                    psutil.Process(int(pid)).cpu_times()[:4]
                )  # ours, and those of the children that have ended
        return total

    def kill(self) -> None:
        """Ends every process on it at once, as a power cut does."""
        for pid in _output("netns", "pids", self.name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> None:
        self.kill()
        _ip("netns", "del", self.name)


class Undone(ABC):
    """A context whose `_start` is undone where it fails midway."""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    @abstractmethod
    def __exit__(self, *error: object) -> None:
        """Undoes what was started."""

    @abstractmethod
    def _start(self) -> None:
        """Starts all of it."""


class Nodes(Undone):
    """The cluster, the servers beside it, and the user's machine."""

    def __init__(self, folder: Path):
        self._folder, self._machines, self._processes = folder, {}, list[subprocess.Popen[bytes]]()
        self._machines: dict[str, Machine]
        self.tracking_uri = f"http://{NETWORK}.{BRIDGE}:{MLFLOW_PORT}"
        self.ray_address = f"http://{NETWORK}.{HEAD}:{DASHBOARD_PORT}"
        self.bucket = (
            f"s3://rcnn?scheme=http&endpoint_override={NETWORK}.{BRIDGE}:{S3_PORT}&region=us-east-1"
            "&allow_bucket_creation=true"
        )

    def __exit__(self, *error: object) -> None:
        for machine in self._machines.values():
            machine.remove()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(30)
        _ip("link", "del", "rcnn-net")

    def join(self, name: str, *, cpus: int) -> None:
        """Starts a node of the cluster; one that was killed comes back."""
        if name not in self._machines:
            self._machines[name] = Machine(name, HEAD + len(self._machines))
        machine = self._machines[name]
        place = f"--address={NETWORK}.{HEAD}:{RAY_PORT}"
        self._start_ray(machine, place, f"--num-cpus={cpus}")

    def cpu_seconds(self, name: str) -> float:
        """The processor time that a node has used."""
        return self._machines[name].cpu_seconds

    def kill(self, name: str) -> None:
        """Takes a node away without a word."""
        self._machines[name].kill()

    def run(self, config: PipelineConfig, log: Path) -> "subprocess.Popen[bytes]":
        """Starts `rcnn pipeline` on the user's machine, which is not part of the cluster."""
        file = log.with_suffix(".json")
        file.write_text(config.model_dump_json())
        command = [str(BIN / "rcnn"), "pipeline", "--config", str(file), "--ray", self.ray_address]
        return self._machines["rcnn-user"].start(command, log)

    def _start(self) -> None:
        _ip("link", "add", "rcnn-net", "type", "bridge")
        _ip("addr", "add", f"{NETWORK}.{BRIDGE}/24", "dev", "rcnn-net")
        _ip("link", "set", "rcnn-net", "up")
        for name, number in (("rcnn-head", HEAD), ("rcnn-user", USER)):
            self._machines[name] = Machine(name, number)
        here = f"{NETWORK}.{BRIDGE}"
        self._serve([str(BIN / "moto_server"), "-H", here, "-p", str(S3_PORT)])
        store = [f"--backend-store-uri=sqlite:///{self._folder}/mlflow.db", "--serve-artifacts"]
        store += [f"--artifacts-destination={self._folder}/artifacts", "--allowed-hosts=*", "--workers=1"]
        self._serve([sys.executable, "-m", "mlflow", "server", f"--host={here}", f"--port={MLFLOW_PORT}", *store])
        head = self._machines["rcnn-head"]
        dashboard = [f"--dashboard-host={head.address}", f"--dashboard-port={DASHBOARD_PORT}"]
        self._start_ray(head, "--head", "--num-cpus=0", f"--port={RAY_PORT}", *dashboard)
        user = self._machines["rcnn-user"]
        for url in (f"{self.ray_address}/api/version", f"{self.tracking_uri}/health"):
            self._wait(lambda url=url: self._answers(user, url), url)  # type: ignore[misc]

    def _start_ray(self, machine: Machine, *arguments: str) -> None:
        command = [str(BIN / "ray"), "start", "--block", f"--node-ip-address={machine.address}", *arguments]
        self._processes.append(machine.start(command, self._folder / f"{machine.name}.log"))

    def _serve(self, command: list[str]) -> None:
        with (self._folder / "servers.log").open("ab") as log:
            self._processes.append(subprocess.Popen(command, env=_environment(), stdout=log, stderr=log))

    def _answers(self, machine: Machine, url: str) -> bool:
        code = f"import urllib.request; urllib.request.urlopen({url!r}, timeout=5)"
        return machine.start([sys.executable, "-c", code], self._folder / "answers.log").wait() == 0

    def _wait(self, is_there: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not is_there():
            assert time.monotonic() < deadline, f"{what} does not answer"
            time.sleep(0.5)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RCNN_", "RAY_", "PREFECT_"))}
    return kept | ENVIRONMENT


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _output(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def end_left_over() -> None:
    """Removes what a test that was killed has left."""
    for line in _output("netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith("rcnn-"):
            for pid in _output("netns", "pids", name).split():
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(int(pid)).kill()
            _ip("netns", "del", name)
    if "rcnn-net" in _output("link", "show", "type", "bridge"):
        _ip("link", "del", "rcnn-net")
