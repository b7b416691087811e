"""Nodes for a fake Slurm: network namespaces of Linux with an address each, joined by a bridge that the first one holds.

Nothing of it lies outside these namespaces. `bin/srun` starts tasks in them. Needs root, and `ip`.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL
from typing import Self

BIN = Path(__file__).parent / "bin"
SCRIPT = Path(__file__).parents[3] / "infra" / "slurm" / "rcnn.sbatch"
JOB_ID = str(os.getpid())


class FakeSlurm:
    """A job's nodes, and what its batch script finds in its environment.

    Args:
        folder: that all nodes see; the storage, the logs and each node's disk lie in it.
        num_nodes: of the job.
    """

    def __init__(self, folder: Path, num_nodes: int):
        self.folder, self.num_nodes = folder, num_nodes
        self._name, self._processes = f"slurm{os.getpid()}", list[subprocess.Popen[bytes]]()
        self.calls = folder / "scontrol"
        self.log = folder / "job.log"

    def __enter__(self) -> Self:
        for number in range(self.num_nodes):
            node = f"{self._name}-{number}"
            _ip("netns", "add", node)
            _ip("-n", node, "link", "set", "lo", "up")
        first = f"{self._name}-0"
        _ip("-n", first, "link", "add", "eth0", "type", "bridge")
        for number in range(1, self.num_nodes):
            node, port = f"{self._name}-{number}", f"port{number}"
            _ip("-n", node, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", first)
            _ip("-n", first, "link", "set", port, "master", "eth0", "up")
        for number in range(self.num_nodes):
            node = f"{self._name}-{number}"
            _ip("-n", node, "addr", "add", f"10.88.0.{number + 1}/24", "dev", "eth0")
            _ip("-n", node, "link", "set", "eth0", "up")
        return self

    def __exit__(self, *error: object) -> None:
        for number in range(self.num_nodes):
            node = f"{self._name}-{number}"
            for pid in subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), SIGKILL)
            _ip("netns", "del", node)
        for process in self._processes:
            process.wait()
        with suppress(FileNotFoundError):
            Path(f"/tmp/ray-{JOB_ID}").rmdir()  # empty: a disk of its own lay over it on each node

    def run(self, *words: str, **env: str) -> "subprocess.Popen[bytes]":
        """Starts the batch script as Slurm does: on the first node, and only there."""
        return self.on_first_node("bash", str(SCRIPT), *words, env=self.environment() | env, log=self.log)

    def on_first_node(self, *command: str, env: Mapping[str, str], log: Path) -> "subprocess.Popen[bytes]":
        """Starts a command there."""
        with log.open("ab") as output:
            call = ["ip", "netns", "exec", f"{self._name}-0", *command]
            self._processes.append(subprocess.Popen(call, env=dict(env), stdout=output, stderr=output))
        return self._processes[-1]

    def environment(self) -> dict[str, str]:
        """What Slurm and the user set."""
        return os.environ | {
            "PATH": f"{BIN}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": JOB_ID,
            "SLURM_JOB_NUM_NODES": str(self.num_nodes),
            "SLURM_CPUS_PER_TASK": "1",
            "HOME": str(self.folder),
            "RCNN_STORAGE": str(self.folder / "storage"),
            "FAKE_NODES": self._name,
            "FAKE_DISKS": str(self.folder / "disks"),
            "FAKE_SCONTROL": str(self.calls),
        }


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
