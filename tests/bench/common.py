"""What the benchmarks share: the machine in words, rounds in which both sides take turns, and the JSON that they write."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Images per second over rounds: the median, and the lowest and highest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:,.0f} ({self.low:,.0f} to {self.high:,.0f})"

    def as_json(self) -> dict[str, float]:
        return {"images_per_second": self.median, "low": self.low, "high": self.high}


def take_turns(sides: Mapping[str, Callable[[], int]], *, rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Times each side once a round, in turn, so that a busy moment of the machine meets all of them.

    A side does some work and returns the number of images.
    """
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name, work in sides.items():
            started = time.perf_counter()
            images = work()
            seconds = time.perf_counter() - started
            if number >= warmup:
                speeds[name].append(images / seconds)
    return {name: Timing(statistics.median(all_), min(all_), max(all_)) for name, all_ in speeds.items()}


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    described = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def arguments(description: str, **more: Any) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, **more)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each side (default: %(default)s)")
    return parser


def write_json(file: Path | None, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes `{"machine": ..., "results": [...]}`, if a file is named."""
    if file is not None:
        file.write_text(json.dumps({"machine": machine(), "results": list(results)}, indent=2) + "\n")


def print_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """A table of text, as wide as it needs to be."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    print(f"\n{title}")
    print("  ".join(name.ljust(width) for name, width in widths.items()))
    for row in rows:
        print("  ".join(row[name].ljust(width) for name, width in widths.items()))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
