"""Evaluation on one worker of one thread, on two, and in one process on all cores: images per second, in turn.

    python -m tests.bench.evaluation [--num-maps 32 96] [--num-steps 3] [--rounds 3] [--json FILE]

18,000 small random pictures of 28x28 in batches of 50, with initial weights. The clock runs from the first worker's first row
to the last row; the start of the workers, which is said apart, is not in it. All sides must write the same bytes.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from rcnn.config import PipelineConfig
from rcnn.evaluate.pace import Pace
from rcnn.evaluate.predictions import delete_parts, merge_parts, parts_of
from rcnn.evaluate.ray_scoring import score_on_workers
from rcnn.evaluate.scoring import ScoringJob, load_for_scoring, score_parts
from rcnn.ray_session import ensure_ray
from rcnn.results import IngestResult
from rcnn.storage import StageFolder, Storage
from tests.bench.common import Timing, arguments, machine, print_table, write_json
from tests.bench.growth import make_source
from tests.evaluate.scene import ingested, many_test_rows, untrained

NUM_ROWS, NUM_IMAGES, SIDE = 18_000, 20_000, 28
SIDES = ("1 worker", "2 workers", "this process")


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--num-maps", type=int, nargs="+", default=[32, 96], help="K")
    parser.add_argument("--num-steps", type=int, default=3, help="T")
    parser.set_defaults(rounds=3)
    options = parser.parse_args()
    print(machine())
    results = []
    with tempfile.TemporaryDirectory(prefix="rcnn-bench-") as folder:
        make_source(Path(folder, "images"), NUM_IMAGES, SIDE)
        settings = {
            "data.source": "parquet", "data.root": f"{folder}/images", "data.test_fraction": NUM_ROWS / NUM_IMAGES,
            "ray.num_cpus": 2, "model.t": options.num_steps,
        }  # fmt: skip
        config = many_test_rows(Path(folder), **settings)
        data = ingested(config)
        ensure_ray(config, Storage(config.storage))
        for num_maps in options.num_maps:
            sides = measured(config.with_settings({"model.k": num_maps}), data, options.rounds)
            for name, (timing, start_seconds) in sides.items():
                place = {"side": name, "num_maps": num_maps, "num_steps": options.num_steps}
                ratio = timing.median / sides[SIDES[0]][0].median
                results.append(
                    place | timing.as_json() | {"ratio_to_one_worker": ratio, "start_seconds": start_seconds}
                )
    rows = [
        {
            "K": str(row["num_maps"]),
            "side": str(row["side"]),
            "images/s (low to high)": f"{row['images_per_second']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f})",
            "to one worker": f"{row['ratio_to_one_worker']:.2f}",
            "start, s": f"{row['start_seconds']:.1f}",
        }
        for row in results
    ]
    print_table(f"T = {options.num_steps}, {NUM_ROWS:,} rows; all sides wrote the same bytes", rows)
    write_json(options.json, results)


def measured(config: PipelineConfig, data: IngestResult, rounds: int) -> dict[str, tuple[Timing, float]]:
    """Images per second, and the seconds of the start, of each side."""
    trained = untrained(config, data)
    target = StageFolder(Storage(config.storage), f"reports/{config.model.k}")
    job = ScoringJob(
        config.storage, target.name, data.folder, f"{trained.folder}/model", config.evaluate.batch_size, False, 1
    )
    speeds: dict[str, list[float]] = {name: [] for name in SIDES}
    starts: dict[str, list[float]] = {name: [] for name in SIDES}
    digests = set()
    for _ in range(rounds):
        for name in SIDES:
            side = here(job) if name == "this process" else on_workers(config, job, int(name[0]))
            begun = time.perf_counter()
            pace = side()
            speeds[name].append(pace.images_per_second)
            starts[name].append(pace.started - begun)
            digests.add(merge_parts(target, parts_of(NUM_ROWS, job.batch_size)))
            delete_parts(target)
    assert len(digests) == 1, f"predictions differ: {digests}"
    return {
        name: (Timing(median(speeds[name]), min(speeds[name]), max(speeds[name])), median(starts[name]))
        for name in SIDES
    }


def on_workers(config: PipelineConfig, job: ScoringJob, num_workers: int) -> Callable[[], Pace]:
    """Scores all rows on workers of one thread."""
    parts = parts_of(NUM_ROWS, job.batch_size)
    config = config.with_settings({"execution.num_workers": num_workers})

    def work() -> Pace:
        pace = Pace(NUM_ROWS, num_at_once=num_workers)
        score_on_workers(config, job, parts, on_start=pace.start, on_part=lambda part: pace.advance(len(part)))
        return pace

    return work


def here(job: ScoringJob) -> Callable[[], Pace]:
    """Scores all rows in this process, a batch on each core."""
    mine = replace(job, num_threads=torch.get_num_threads())

    def work() -> Pace:
        pace = Pace(NUM_ROWS, num_at_once=mine.num_at_once)
        model = load_for_scoring(mine)
        pace.start()
        score_parts(mine, model, parts_of(NUM_ROWS, mine.batch_size), on_batch=pace.advance)
        return pace

    return work


if __name__ == "__main__":
    main()
