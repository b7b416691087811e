"""Kills a training again and again, at random, and compares its end with that of a run that was left alone.

    python -m tests.faults.kills [--kills 50] [--seed 0]

It runs on a Ray of four cores on three nodes, and a head without any. Each kill takes a worker, the driver or a node. A killed
driver is followed by one with 1, 2, 4 or 1 to 4 workers, and a node by another one within some seconds. It prints a line for
each kill and, at the end, whether the weights are the same, bit for bit, and how much work was lost.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

WORKERS = (1, 2, 4)
VICTIMS = ("worker", "driver", "node")
CORES_OF_NODES = (2, 1, 1)
SECONDS_WITHOUT_A_NODE = 10.0
CHECKPOINT_SECONDS = 2.0
SECONDS_TO_START = 180
SETTINGS = {
    "train.num_shares": 4, "train.deterministic": True, "train.num_rows": 0, "train.epochs": 20, "model.k": 16, "model.t": 3,
    "train.schedule": "one_cycle", "train.learning_rate": 0.03, "model.dropout": 0.3,
    "augment.max_shift": 2, "train.ema_decay": 0.9, "tune.enabled": False, "ray.num_cpus": 4,
    "execution.max_failures": 1000, "execution.checkpoint_minutes": CHECKPOINT_SECONDS / 60,
}  # fmt: skip


@dataclass
class Certificate:
    """What happened, and how it ended."""

    kills: Counter[str] = field(default_factory=Counter)
    seconds_lost: list[float] = field(default_factory=list)
    expected: str = ""
    found: str = ""

    def __str__(self) -> str:
        verdict = "the same bits" if self.found == self.expected else "OTHER BITS"
        counts = ", ".join(f"{count} of {victim}s" for victim, count in sorted(self.kills.items()))
        lost = f"at most {max(self.seconds_lost):.1f} s of work lost by a kill" if self.seconds_lost else "no work lost"
        interval = f"checkpoints every {CHECKPOINT_SECONDS:g} s and at the end of each epoch"
        return f"{sum(self.kills.values())} kills ({counts}); {interval}; {lost}; {verdict}: {self.found} ({self.expected})"


class Machines:
    """A Ray of some nodes, all on this machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._nodes = [(cores, self._cluster.add_node(num_cpus=cores)) for cores in CORES_OF_NODES]
        self._missing: list[tuple[float, int]] = []
        self.address = str(self._cluster.address)

    def lose_one(self) -> None:
        """Kills a node; another one joins a little later."""
        cores, node = self._nodes.pop(random.randrange(len(self._nodes)))
        self._cluster.remove_node(node, allow_graceful=False)
        self._missing.append((time.monotonic() + random.uniform(0, SECONDS_WITHOUT_A_NODE), cores))

    def add_what_is_due(self, *, until: float = 0.0) -> None:
        """Adds the nodes whose time has come, or comes `until` then. By the main thread: Ray sets a signal handler."""
        for each in [each for each in self._missing if each[0] <= max(until, time.monotonic())]:
            self._missing.remove(each)
            self._nodes.append((each[1], self._cluster.add_node(num_cpus=each[1])))

    def has_nodes_to_lose(self) -> bool:
        return len(self._nodes) > 1

    def close(self) -> None:
        self._cluster.shutdown()


class Training:
    """An `rcnn train`, or another stage with all before it, in a process of its own, with its Ray or on the machines."""

    def __init__(
        self,
        storage: Path,
        num_workers: int | str,
        *,
        stage: str = "train",
        log: str = "log.txt",
        machines: Machines | None = None,
        **changed: object,
    ):
        settings = SETTINGS | {"storage": storage, "execution.num_workers": num_workers} | changed
        command = [sys.executable, "-m", "rcnn.cli", stage, "--recipe", "debug_tiny"]
        command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        self.log = storage / log
        place = {"RAY_ADDRESS": machines.address} if machines else {}
        with self.log.open("a") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | place)
        self.num_workers, self._ours = num_workers, [psutil.Process(self.process.pid)]
        self._is_on_machines = machines is not None

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def workers(self) -> list[psutil.Process]:
        """The processes that train; while a worker starts, it has no name of its own yet."""
        if self._is_on_machines:
            there = psutil.Process().children(recursive=True)
        else:
            with suppress(psutil.Error):
                self._ours = [self._ours[0], *self._ours[0].children(recursive=True)]
            there = self._ours
        return [process for process in there if "RayTrainWorker" in _name_of(process)]

    def kill(self, victim: str) -> None:
        """Kills a worker, or the driver with all that it started."""
        if victim == "worker":
            random.choice(self.workers()).kill()
            return
        self.workers()  # remembers what is there
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(self._ours, timeout=10)
        for process in alive:  # of this training alone
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=10)


def run(num_kills: int, seed: int, storage: Path) -> Certificate:
    """Trains once alone and once with kills."""
    random.seed(seed)
    certificate = Certificate()
    epochs: dict[str, object] = {"train.epochs": 4 + 5 * num_kills // 4}
    (storage / "alone").mkdir()
    (storage / "killed").mkdir()
    certificate.expected = _finish(Training(storage / "alone", 1, **epochs))
    with closing(Machines()) as machines:
        _kill_until_the_end(certificate, num_kills, storage / "killed", machines, epochs)
    return certificate


def _kill_until_the_end(
    certificate: Certificate, num_kills: int, storage: Path, machines: Machines, epochs: dict[str, object]
) -> None:
    def start() -> Training:
        num_workers = random.choice((*WORKERS, "1..4"))
        return Training(storage, num_workers, machines=machines, **epochs, **{"ray.address": "auto", "ray.num_cpus": 0})

    training = start()
    while sum(certificate.kills.values()) < num_kills and not training.has_ended():
        _wait_for_progress(training, meanwhile=machines.add_what_is_due)
        time.sleep(random.uniform(0, 2 * CHECKPOINT_SECONDS))
        if training.has_ended() or not training.workers():
            continue
        victim = random.choice(VICTIMS if machines.has_nodes_to_lose() else VICTIMS[:2])
        lost = time.time() - max(_times_of_checkpoints(storage), default=time.time())
        machines.lose_one() if victim == "node" else training.kill(victim)
        certificate.kills[victim] += 1
        certificate.seconds_lost.append(lost)
        print(
            f"kill {sum(certificate.kills.values())}: the {victim} of {training.num_workers} workers, {lost:.1f} s lost",
            flush=True,
        )
        if victim == "driver":
            training = start()
    machines.add_what_is_due(until=math.inf)
    certificate.found = _finish(training)


def _wait_for_progress(training: Training, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Waits until there is a checkpoint more."""
    folder = training.log.parent
    before, deadline = _times_of_checkpoints(folder), time.monotonic() + SECONDS_TO_START
    while _times_of_checkpoints(folder) == before and not training.has_ended():
        if time.monotonic() > deadline:
            sys.exit(f"no progress in {SECONDS_TO_START} s; the log:\n{training.log.read_text()}")
        meanwhile()
        time.sleep(0.1)


def _times_of_checkpoints(folder: Path) -> list[float]:
    times = []
    for record in folder.glob("runs/train-*/checkpoints/*.json"):
        with suppress(FileNotFoundError):
            times.append(record.stat().st_mtime)
    return times


def _finish(training: Training) -> str:
    """Waits for the end; returns the SHA-256 of the weights."""
    if training.process.wait(timeout=1800):
        sys.exit(f"the training failed; its log:\n{training.log.read_text()}")
    [result] = training.log.parent.glob("runs/train-*/_result.json")
    return str(json.loads(result.read_text())["weights_sha256"])


def _name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def main() -> None:
    """Kills, and prints the certificate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *arguments: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="rcnn-kills-") as folder:
        certificate = run(options.kills, options.seed, Path(folder))
    print(certificate)
    sys.exit(certificate.found != certificate.expected)


if __name__ == "__main__":
    main()
