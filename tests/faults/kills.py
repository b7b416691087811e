"""Kills a training again and again, at random, and compares its end with that of a run that was left alone.

    python -m tests.faults.kills [--kills 50] [--seed 0]

Each kill takes a worker or the driver. A killed driver is followed by one with 1, 2 or 4 workers. It prints a line for each
kill and, at the end, whether the weights are the same, bit for bit, and how much work was lost.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

WORKERS = (1, 2, 4)
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
        counts = ", ".join(f"{count} of the {victim}" for victim, count in sorted(self.kills.items()))
        lost = f"at most {max(self.seconds_lost):.1f} s of work lost by a kill" if self.seconds_lost else "no work lost"
        interval = f"checkpoints every {CHECKPOINT_SECONDS:g} s and at the end of each epoch"
        return f"{sum(self.kills.values())} kills ({counts}); {interval}; {lost}; {verdict}: {self.found} ({self.expected})"


class Training:
    """An `rcnn train`, or another stage with all before it, in a process of its own, and its Ray."""

    def __init__(
        self, storage: Path, num_workers: int | str, *, stage: str = "train", log: str = "log.txt", **changed: object
    ):
        settings = SETTINGS | {"storage": storage, "execution.num_workers": num_workers} | changed
        command = [sys.executable, "-m", "rcnn.cli", stage, "--recipe", "debug_tiny"]
        command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        self.log = storage / log
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        self.num_workers, self._ours = num_workers, [psutil.Process(self.process.pid)]

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def workers(self) -> list[psutil.Process]:
        """The processes that train; while a worker starts, it has no name of its own yet."""
        with suppress(psutil.Error):
            self._ours = [self._ours[0], *self._ours[0].children(recursive=True)]
        return [process for process in self._ours if "RayTrainWorker" in _name_of(process)]

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
    certificate, epochs = Certificate(), {"train.epochs": 4 + 5 * num_kills // 4}
    (storage / "alone").mkdir()
    (storage / "killed").mkdir()
    certificate.expected = _finish(Training(storage / "alone", 1, **epochs))
    training = Training(storage / "killed", random.choice(WORKERS), **epochs)
    while sum(certificate.kills.values()) < num_kills and not training.has_ended():
        _wait_for_progress(training)
        time.sleep(random.uniform(0, 2 * CHECKPOINT_SECONDS))
        if training.has_ended() or not training.workers():
            continue
        victim = random.choice(("worker", "driver"))
        lost = time.time() - max(_times_of_checkpoints(storage / "killed"), default=time.time())
        training.kill(victim)
        certificate.kills[victim] += 1
        certificate.seconds_lost.append(lost)
        print(
            f"kill {sum(certificate.kills.values())}: the {victim} of {training.num_workers} workers, {lost:.1f} s lost",
            flush=True,
        )
        if victim == "driver":
            training = Training(storage / "killed", random.choice(WORKERS), **epochs)
    certificate.found = _finish(training)
    return certificate


def _wait_for_progress(training: Training) -> None:
    """Waits until there is a checkpoint more."""
    folder = training.log.parent
    before, deadline = _times_of_checkpoints(folder), time.monotonic() + SECONDS_TO_START
    while _times_of_checkpoints(folder) == before and not training.has_ended():
        if time.monotonic() > deadline:
            sys.exit(f"no progress in {SECONDS_TO_START} s; the log:\n{training.log.read_text()}")
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
