"""How well `rcnn plan` predicts the time of an epoch: calibrated steps against an epoch that is then trained by `fit`.

For each K and T, a process times a few steps on random images, and another one trains and validates on others for some
seconds. On a busy machine, `--cpu-time` compares the processor time of one thread instead: the clock on the wall then says
more about the other work than about the prediction.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from rcnn.config import PipelineConfig
from rcnn.data.loader import Rows, TrainingData
from rcnn.plan.calibrate import Calibration, Job, calibrate, stand_in
from rcnn.train.loop import fit
from tests.bench.common import arguments, print_table, write_json

IMAGE_SHAPE, NUM_CLASSES, NUM_VAL = (32, 32, 3), 10, 512
MIN_STEPS, MAX_STEPS = 5, 200


def main() -> None:
    """Prints a row for each network, and the median of the errors."""
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(_side(*map(int, sys.argv[2:]))))
        return
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--num-maps", type=int, nargs="+", default=[32, 96, 160], help="K (default: 32 96 160)")
    parser.add_argument("--num-steps", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="T (default: 0 to 5)")
    parser.add_argument("--seconds", type=float, default=10, help="about as long an epoch (default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread, for busy machines")
    parser.set_defaults(rounds=1)
    options = parser.parse_args()
    results = [
        measure(num_maps, num_steps, seconds=options.seconds, cpu_time=options.cpu_time)
        for num_maps in options.num_maps
        for num_steps in options.num_steps
        for _ in range(options.rounds)
    ]
    print_table("seconds of an epoch", [_row(result) for result in results])
    median = statistics.median(abs(result["error"]) for result in results)
    print(f"\nmedian error {100 * median:.1f} %, largest {100 * max(abs(r['error']) for r in results):.1f} %")
    write_json(options.json, [*results, {"median_error": median}])


def measure(num_maps: int, num_steps: int, *, seconds: float, cpu_time: bool) -> dict[str, Any]:
    """The prediction for an epoch of about `seconds`, and its time."""
    load = os.getloadavg()[0]
    found = Calibration(**_ask(num_maps, num_steps, cpu_time, 0))
    steps = min(MAX_STEPS, max(MIN_STEPS, math.ceil(seconds / found.step_seconds)))
    taken = _ask(num_maps, num_steps, cpu_time, steps)
    return {
        "num_maps": num_maps,
        "num_steps": num_steps,
        "training_steps": steps,
        "predicted_seconds": predicted(found, steps),
        "seconds": taken,
        "error": predicted(found, steps) / taken - 1,
        "load": load,
    }


def _ask(*what: int) -> Any:
    side = [sys.executable, "-m", "tests.bench.plan", "--side", *(str(int(value)) for value in what)]
    return json.loads(subprocess.run(side, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _side(num_maps: int, num_steps: int, cpu_time: int, num_training_steps: int) -> Any:
    """In a process of its own: a calibration, or where there are training steps, the seconds of an epoch of them."""
    torch.set_num_threads(1 if cpu_time else os.cpu_count() or 1)
    if cpu_time:
        time.perf_counter = time.process_time  # all that is timed here asks it
    job = _job(num_maps, num_steps)
    return seconds_of_an_epoch(job, num_training_steps) if num_training_steps else asdict(calibrate(job))


def predicted(found: Calibration, num_training_steps: int) -> float:
    """As `rcnn plan` adds up an epoch."""
    return num_training_steps * found.step_seconds + NUM_VAL * found.score_seconds


def seconds_of_an_epoch(job: Job, num_training_steps: int) -> float:
    """Trains an epoch of random images with `fit`; the first one, which warms up, does not count."""
    ends: list[float] = []
    for num_steps in (3, num_training_steps):
        data = TrainingData(stand_in(job), _rows(num_steps * job.config.train.batch_size), _rows(NUM_VAL))
        fit(job.config, data, lambda metrics: ends.append(metrics["perf/seconds"]))
    return ends[-1]


def _job(num_maps: int, num_steps: int) -> Job:
    settings = {"model.k": num_maps, "model.t": num_steps, "train.epochs": 1, "train.learning_rate": 1e-6}
    return Job(PipelineConfig().with_settings(settings), IMAGE_SHAPE, NUM_CLASSES, num_steps=0)


def _rows(num_rows: int) -> Rows:
    height, width, channels = IMAGE_SHAPE
    images_NHWC = torch.randint(256, (num_rows, height, width, channels), dtype=torch.uint8)
    return Rows(images_NHWC.permute(0, 3, 1, 2), torch.randint(NUM_CLASSES, (num_rows,)))


def _row(result: dict[str, Any]) -> dict[str, str]:
    return {
        "K": str(result["num_maps"]),
        "T": str(result["num_steps"]),
        "steps": str(result["training_steps"]),
        "predicted": f"{result['predicted_seconds']:.1f}",
        "taken": f"{result['seconds']:.1f}",
        "error": f"{100 * result['error']:+.1f} %",
        "load before": f"{result['load']:.1f}",
    }


if __name__ == "__main__":
    main()
