"""Runs the small pipeline again and again while things break, and compares each end with that of a run that was left alone.

    python -m tests.faults.chaos [--seed 0] [--minutes 10]

Each round runs ingest, search, training, evaluation and registration in a new storage, with an MLflow server of its own, and
something breaks every few seconds. Faults are drawn by the seed and printed. At the end there is a certificate: faults by kind,
starts, work lost, whether all weights and predictions are the same, bit for bit, and what was left behind.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from rcnn.config import PipelineConfig
from rcnn.doctor import examine
from rcnn.registry.outbox import num_waiting
from tests.faults.kills import WORKERS, Training, _times_of_checkpoints
from tests.registry.server import Server

SECONDS_BETWEEN_FAULTS = (4.0, 20.0)
SECONDS_FOR_A_ROUND = 1800
EPOCHS = 10
SETTINGS = {"train.epochs": EPOCHS, "tune.enabled": True, "tune.early_stopping": "none", "ray.num_cpus": 4}
DIGESTS = (("train", "weights_sha256"), ("evaluate", "predictions_sha256"))


@dataclass
class Certificate:
    """What happened, and how it ended."""

    faults: Counter[str] = field(default_factory=Counter)
    num_rounds: int = 0
    num_starts: int = 0
    seconds_lost: float = 0.0
    digests: Counter[tuple[str, ...]] = field(default_factory=Counter)
    left_over: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether all rounds ended alike and left nothing."""
        return len(self.digests) == 1 and not self.left_over

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.faults.items()))
        ends = "the same weights and predictions in all" if len(self.digests) == 1 else f"OTHER DIGESTS: {self.digests}"
        left = "; ".join(self.left_over) or "nothing"
        return (
            f"{sum(self.faults.values())} faults ({kinds}) in {self.num_rounds} rounds, {self.num_starts} starts of the "
            f"pipeline; {self.seconds_lost:.0f} s of training lost; {ends}; left behind: {left}"
        )


class Round:
    """One pipeline, and what breaks it."""

    def __init__(self, folder: Path, certificate: Certificate):
        self.storage, self.certificate = folder / "storage", certificate
        (folder / "mlflow").mkdir(parents=True)
        self.storage.mkdir()
        self.server = Server(folder / "mlflow")
        self.server_is_back_at = 0.0
        self.rivals: list[Training] = []
        self._start_server()
        self.run = self.start()

    def start(self) -> Training:
        """Starts the pipeline, on 1, 2 or 4 workers."""
        self.certificate.num_starts += 1
        name, workers = f"{self.certificate.num_starts}.txt", random.choice(WORKERS)
        settings = SETTINGS | {"tracking.uri": self.server.url}
        return Training(self.storage, workers, stage="register", log=name, **settings)

    def close(self) -> None:
        """Ends what is left of a round that failed."""
        for run in (self.run, *self.rivals):
            if not run.has_ended():
                run.kill("driver")
        self.server.stop()

    def finish(self, break_something: Callable[["Round"], None]) -> None:
        """Lets things break until the pipeline has ended, and looks at what it left."""
        deadline = time.monotonic() + SECONDS_FOR_A_ROUND
        next_fault = time.monotonic() + random.uniform(*SECONDS_BETWEEN_FAULTS)
        while not all(run.has_ended() for run in (self.run, *self.rivals)):
            if time.monotonic() > deadline:
                sys.exit(f"no end in {SECONDS_FOR_A_ROUND} s; the last log:\n{self.run.log.read_text()}")
            if time.monotonic() > next_fault:
                break_something(self)
                next_fault = time.monotonic() + random.uniform(*SECONDS_BETWEEN_FAULTS)
            if self.server.process is None and time.monotonic() > self.server_is_back_at:
                self._start_server()
            time.sleep(0.1)
        for run in (self.run, *self.rivals):
            if run.process.returncode != 0:
                sys.exit(f"a run ended with {run.process.returncode}; its log:\n{run.log.read_text()}")
        self._note_the_end()

    def kill_driver(self) -> bool:
        """Kills it with its Ray, and starts another one."""
        self.certificate.seconds_lost += self._age_of_checkpoint()
        self.run.kill("driver")
        self.run = self.start()
        return True

    def kill_worker(self) -> bool:
        """Kills one of those that train, if there are some."""
        if not self.run.workers():
            return False
        self.certificate.seconds_lost += self._age_of_checkpoint()
        self.run.kill("worker")
        return True

    def terminate(self) -> bool:
        """SIGTERM; another one is started."""
        self.run.process.send_signal(signal.SIGTERM)
        self.run.process.wait(timeout=60)
        self.run = self.start()
        return True

    def pause(self) -> bool:
        """Stops the driver for some seconds."""
        self.run.process.send_signal(signal.SIGSTOP)
        time.sleep(random.uniform(2, 8))
        self.run.process.send_signal(signal.SIGCONT)
        return True

    def lose_mlflow(self) -> bool:
        """Its server goes away for a while."""
        if self.server.process is None:
            return False
        self.server.stop()
        self.server_is_back_at = time.monotonic() + random.uniform(5, 25)
        return True

    def damage_checkpoint(self) -> bool:
        """Changes a byte of the newest one, and kills the driver."""
        files = sorted(self.storage.glob("runs/train-*/checkpoints/*.pt"))
        if not files:
            return False
        self.kill_driver()
        content = bytearray(files[-1].read_bytes()) if files[-1].exists() else bytearray()
        if content:
            content[random.randrange(len(content))] ^= 1
            files[-1].write_bytes(content)
        return True

    def start_rival(self) -> bool:
        """The same command once more, at the same time."""
        if any(not rival.has_ended() for rival in self.rivals):
            return False
        self.rivals.append(self.start())
        return True

    def _start_server(self) -> None:
        self.server.start()
        self.server.wait()

    def _age_of_checkpoint(self) -> float:
        return max(0.0, time.time() - max(_times_of_checkpoints(self.storage), default=time.time()))

    def _note_the_end(self) -> None:
        if self.server.process is None:
            self._start_server()
        results = {stage: self._result(stage) for stage, _ in DIGESTS}
        self.certificate.digests[tuple(str(results[stage][name]) for stage, name in DIGESTS)] += 1
        config = PipelineConfig().with_settings({"storage": str(self.storage), "tracking.uri": self.server.url})
        left = [finding.text for finding in examine(config) if finding.part == "left over" and finding.remedy]
        left += [str(folder) for folder in self.storage.glob("runs/*/ray*")]
        left += [f"{num_waiting(config)} notes"] if num_waiting(config) else []
        points = MlflowClient(self.server.url).get_metric_history(results["train"]["mlflow_run_id"], "val/error")
        if sorted(point.step for point in points) != list(range(1, EPOCHS + 1)):
            left.append(f"a curve with the steps {sorted(point.step for point in points)}")
        self.certificate.left_over += left

    def _result(self, stage: str) -> dict[str, Any]:
        [file] = self.storage.glob(f"*/{stage}-*/_result.json")
        return dict(json.loads(file.read_text()))


FAULTS: dict[str, Callable[[Round], bool]] = {
    "a driver killed": Round.kill_driver,
    "a worker killed": Round.kill_worker,
    "SIGTERM": Round.terminate,
    "a driver paused": Round.pause,
    "MLflow away": Round.lose_mlflow,
    "a checkpoint damaged": Round.damage_checkpoint,
    "a second run at once": Round.start_rival,
}


def _leave_alone(each: Round) -> None:
    """Breaks nothing."""


def run(seed: int, minutes: float, folder: Path) -> Certificate:
    """One round that is left alone, and others until the time is up."""
    random.seed(seed)
    certificate, deadline = Certificate(), time.monotonic() + 60 * minutes

    def break_something(each: Round) -> None:
        kind = random.choice(list(FAULTS))
        if not each.run.has_ended() and FAULTS[kind](each):
            certificate.faults[kind] += 1
            print(f"round {certificate.num_rounds}, fault {sum(certificate.faults.values())}: {kind}", flush=True)

    while time.monotonic() < deadline or certificate.num_rounds < 2:
        with closing(Round(folder / str(certificate.num_rounds), certificate)) as each:
            each.finish(break_something if certificate.num_rounds else _leave_alone)
        certificate.num_rounds += 1
        print(f"so far: {certificate}", flush=True)
    return certificate


def main() -> None:
    """Breaks things, and prints the certificate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *arguments: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="rcnn-chaos-") as folder:
        certificate = run(options.seed, options.minutes, Path(folder))
    print(certificate)
    sys.exit(not certificate.is_sound)


if __name__ == "__main__":
    main()
