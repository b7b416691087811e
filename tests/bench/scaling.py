"""Training on two workers of one thread each against one, with and without shares: images per second, in turn.

    python -m tests.bench.scaling [--num-maps 64] [--num-steps 3] [--rounds 2] [--json FILE]

Each side is an `rcnn train` of digits of 28x28, start and validation not counted; its speed is the median of its epochs after
the first. Strong: both sides train with a batch of 64. Weak: two workers train with one of 128. Efficiency is the ratio to
one worker, divided by two. Two trainings at once, which never wait for each other, show what the machine itself allows.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench.common import Timing, arguments, machine, print_table, write_json

BATCH, EPOCHS = 64, 3
SIDES = {
    "1 worker": (1, 1, BATCH), "2 trainings at once": (2, 1, BATCH),
    "2 workers, strong": (1, 2, BATCH), "2 workers, weak": (1, 2, 2 * BATCH),
}  # fmt: skip
"""Trainings at once, workers of each, and images in a batch."""


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--num-maps", type=int, default=64, help="K")
    parser.add_argument("--num-steps", type=int, default=3, help="T")
    parser.add_argument("--num-shares", type=int, nargs="+", default=[0, 4], help="shares of a batch; 0: none")
    parser.set_defaults(rounds=2)
    options = parser.parse_args()
    print(machine())
    speeds: dict[tuple[int, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="rcnn-bench-") as folder:
        for _ in range(options.rounds):
            for num_shares in options.num_shares:
                for side, (num_trainings, num_workers, batch_size) in SIDES.items():
                    settings = {
                        "model.k": options.num_maps, "model.t": options.num_steps, "train.num_shares": num_shares,
                        "train.batch_size": batch_size, "execution.num_workers": num_workers,
                    }  # fmt: skip
                    with ThreadPoolExecutor() as pool:
                        places = [Path(folder, str(number)) for number in range(num_trainings)]
                        found = pool.map(lambda place, settings=settings: train(place, settings), places)
                        together = [sum(epoch) for epoch in zip(*found, strict=True)]
                    speeds.setdefault((num_shares, side), []).extend(together)
    timings = {place: Timing(statistics.median(all_), min(all_), max(all_)) for place, all_ in speeds.items()}
    results = [
        {"num_shares": num_shares, "side": side, "num_maps": options.num_maps, "num_steps": options.num_steps}
        | timing.as_json()
        | {"efficiency": timing.median / timings[num_shares, "1 worker"].median / (SIDES[side][0] * SIDES[side][1])}
        for (num_shares, side), timing in timings.items()
    ]
    rows = [
        {
            "shares": str(row["num_shares"] or "none"),
            "side": str(row["side"]),
            "images/s (low to high)": str(timings[row["num_shares"], row["side"]]),
            "efficiency": f"{row['efficiency']:.2f}",
        }
        for row in results
    ]
    print_table(f"K = {options.num_maps}, T = {options.num_steps}, a thread for each worker", rows)
    write_json(options.json, results)


def train(folder: Path, settings: Mapping[str, Any]) -> list[float]:
    """Trains once; returns the images per second of each epoch after the first."""
    everything = settings | {
        "storage": folder / "storage", "train.epochs": EPOCHS, "train.num_rows": 0, "tune.enabled": False, "ray.num_cpus": 2,
    }  # fmt: skip
    command = [sys.executable, "-m", "rcnn.cli", "train", "--recipe", "debug_tiny", "--fresh"]
    command += [part for name, value in everything.items() for part in ("--set", f"{name}={value}")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RCNN_")}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    [history] = (folder / "storage").glob("runs/train-*/history.json")
    epochs = json.loads(history.read_text())
    history.unlink()
    return [epoch["perf/images_per_second"] for epoch in epochs[1:]]


if __name__ == "__main__":
    main()
