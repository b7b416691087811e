"""How well `rcnn plan` predicts the time of an epoch: calibrated steps against an epoch that is then trained by `fit`.

For each K and T, a process times a few steps on random images, and another one trains and validates on others for some
seconds. Both have all cores.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import torch

from rcnn.config import PipelineConfig
from rcnn.data.loader import Rows, TrainingData
from rcnn.plan.calibrate import Calibration, Job, _manifest_of, calibrations_of
from rcnn.storage import Storage
from rcnn.train.loop import fit
from tests.bench.common import arguments, print_table, write_json

IMAGE_SHAPE, NUM_CLASSES, NUM_VAL = (32, 32, 3), 10, 512
MAX_STEPS = 200


def main() -> None:
    """Prints a row for each network, and the median of the errors."""
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(seconds_of_an_epoch(*map(int, sys.argv[2:]))))
        return
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--num-maps", type=int, nargs="+", default=[32, 96, 160], help="K (default: 32 96 160)")
    parser.add_argument("--num-steps", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="T (default: 0 to 5)")
    parser.add_argument("--seconds", type=float, default=10, help="about as long an epoch (default: %(default)s)")
    parser.set_defaults(rounds=1)
    options = parser.parse_args()
    results = [
        measure(num_maps, num_steps, seconds=options.seconds)
        for num_maps in options.num_maps
        for num_steps in options.num_steps
        for _ in range(options.rounds)
    ]
    print_table("seconds of an epoch", [_row(result) for result in results])
    median = statistics.median(abs(result["error"]) for result in results)
    print(f"\nmedian error {100 * median:.1f} %, largest {100 * max(abs(r['error']) for r in results):.1f} %")
    write_json(options.json, [*results, {"median_error": median}])


def measure(num_maps: int, num_steps: int, *, seconds: float) -> dict[str, Any]:
    """The prediction for an epoch of about `seconds`, and its time."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        job = _job(num_maps, num_steps)
        [found] = calibrations_of([job], Storage(folder), num_threads=os.cpu_count() or 1)
    steps = min(MAX_STEPS, max(5, math.ceil(seconds / found.step_seconds)))
    side = [sys.executable, "-m", "tests.bench.plan", "--side", *map(str, (num_maps, num_steps, steps))]
    taken = json.loads(subprocess.run(side, capture_output=True, text=True, check=True).stdout)
    return {
        "num_maps": num_maps,
        "num_steps": num_steps,
        "training_steps": steps,
        "predicted_seconds": predicted(found, steps),
        "seconds": taken,
        "error": predicted(found, steps) / taken - 1,
        "load": load,
    }


def predicted(found: Calibration, steps: int) -> float:
    """As `rcnn plan` adds up an epoch."""
    return steps * found.step_seconds + NUM_VAL * found.score_seconds


def seconds_of_an_epoch(num_maps: int, num_steps: int, steps: int) -> float:
    """Trains an epoch of random images with `fit`; the first one, which warms up, does not count."""
    job = _job(num_maps, num_steps)
    torch.set_num_threads(os.cpu_count() or 1)
    ends = []
    for count in (3, steps):
        data = TrainingData(_manifest_of(job), _rows(count * job.config.train.batch_size), _rows(NUM_VAL))
        fit(job.config, data, lambda metrics, save: ends.append(metrics["perf/seconds"]))
    return ends[-1]


def _job(num_maps: int, num_steps: int) -> Job:
    settings = {"model.k": num_maps, "model.t": num_steps, "train.epochs": 1, "train.learning_rate": 1e-6}
    return Job(PipelineConfig().with_settings(settings), IMAGE_SHAPE, NUM_CLASSES, num_steps=0)


def _rows(count: int) -> Rows:
    height, width, channels = IMAGE_SHAPE
    images_NHWC = torch.randint(256, (count, height, width, channels), dtype=torch.uint8)
    return Rows(images_NHWC.permute(0, 3, 1, 2), torch.randint(NUM_CLASSES, (count,)))


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
