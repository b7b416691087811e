"""Batch prediction of generated rows against the bare model on the same cores, with ONNX and pt2 beside them.

    python -m tests.bench.batch_predict [--rows 1000000] [--num-maps 32] [--num-steps 1] [--rounds 4] [--json FILE]

Rows of MNIST's shape in Parquet files of 100,000, in row groups of 10,000. The bare model, ONNX and pt2 predict batches of 128
from memory in this process, on all cores, half of the rounds before `rcnn batch-predict` and half after it. The command's clock
covers everything, the start of Ray included; its steady speed is that between its first part and its last. Peak memory is that
of all processes together, each without what it shares with others (USS).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pyarrow.parquet as pq
import torch

from rcnn.data.schema import Block, build_table, table_schema
from rcnn.evaluate.predict import BATCH_SIZE
from rcnn.registry.export import export_model
from rcnn.storage import Storage
from rcnn.train.checkpoint import build_classifier, load_model, save_model
from tests.bench.common import Timing, arguments, machine, print_table, take_turns, write_json
from tests.evaluate.scene import ingested, many_test_rows

ROWS_PER_FILE, ROWS_PER_GROUP = 100_000, 10_000
ROWS_PER_ROUND = 20 * BATCH_SIZE
SHAPE = (28, 28, 1)
SECONDS_BETWEEN_LOOKS = 1.0
ENOUGH = 0.8


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    options = parsed()
    print(machine())
    with tempfile.TemporaryDirectory(prefix="rcnn-bench-") as folder:
        rows, model = write_rows(Path(folder, "rows"), options.rows), write_model(Path(folder), options)
        sides = sides_of(model, Path(folder, "exports"))
        half = max(1, options.rounds // 2)
        before = take_turns(sides, rounds=half)
        whole = run_command(rows, model, Path(folder, "out"))
        after = take_turns(sides, rounds=half, warmup=0)
    results = [{"side": name, **merged(before[name], after[name]).as_json()} for name in sides]
    bare = results[0]["images_per_second"]
    results.append({"side": "batch-predict", **whole})
    for row in results:
        row["ratio_to_bare"] = row["images_per_second"] / bare
    results[-1]["steady_ratio_to_bare"] = whole["steady_images_per_second"] / bare
    show(results, options.rows)
    write_json(options.json, results)


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--num-maps", type=int, default=32, help="K")
    parser.add_argument("--num-steps", type=int, default=1, help="T")
    parser.set_defaults(rounds=4)
    return parser.parse_args()


def write_rows(folder: Path, num_rows: int) -> Path:
    """Random pixels; those of a row group are drawn once, since the model's speed does not depend on them."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (ROWS_PER_GROUP, *SHAPE), dtype=np.uint8)
    for first in range(0, num_rows, ROWS_PER_FILE):
        last = min(first + ROWS_PER_FILE, num_rows)
        with pq.ParquetWriter(folder / f"{first:09d}.parquet", table_schema(SHAPE), compression="none") as writer:
            for start in range(first, last, ROWS_PER_GROUP):
                count = min(ROWS_PER_GROUP, last - start)
                ids = [f"row/{start + row}" for row in range(count)]
                writer.write_table(build_table(Block(pixels[:count], np.zeros(count, np.int64), ids)))
    return folder


def write_model(folder: Path, options: argparse.Namespace) -> Path:
    """Initial weights, normalised as for the sample digits."""
    from rcnn.data.manifest import require_manifest

    config = many_test_rows(folder, **{"model.k": options.num_maps, "model.t": options.num_steps})
    manifest = require_manifest(Storage(config.storage), ingested(config).folder)
    (folder / "model").mkdir()
    save_model(build_classifier(config, manifest).state_dict(), config, manifest, folder / "model")
    return folder / "model"


def sides_of(model_folder: Path, exports: Path) -> dict[str, Callable[[], int]]:
    """What is compared in this process, each on one array of rows in memory."""
    images_NCHW = np.random.default_rng(0).integers(0, 256, (ROWS_PER_ROUND, 1, *SHAPE[:2]), dtype=np.uint8)
    export_model(model_folder, exports)
    model, _ = load_model(model_folder)
    program = torch.export.load(exports / "model.pt2").module()
    session = onnxruntime.InferenceSession(exports / "model.onnx", providers=["CPUExecutionProvider"])

    def by_torch(module: Any) -> Callable[[np.ndarray], Any]:
        return lambda batch: module(torch.from_numpy(batch)).softmax(1).numpy()

    def side(predict: Callable[[np.ndarray], Any]) -> Callable[[], int]:
        def work() -> int:
            with torch.inference_mode():
                for start in range(0, ROWS_PER_ROUND, BATCH_SIZE):
                    predict(images_NCHW[start : start + BATCH_SIZE])
            return ROWS_PER_ROUND

        return work

    return {
        "bare model": side(by_torch(model)),
        "onnx": side(lambda batch: session.run(None, {"images": batch})),
        "pt2": side(by_torch(program)),
    }


def run_command(rows: Path, model: Path, out: Path) -> dict[str, Any]:
    """The command in a process of its own: its speeds, and the peak memory of its processes."""
    command = [sys.executable, "-m", "rcnn.cli", "batch-predict", str(rows), "--to", str(out), "--model", str(model)]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=out.parent, env=os.environ | {"PYTHONPATH": str(Path.cwd())})
    peak, largest = 0, 0
    while process.poll() is None:
        used = memory_of(process.pid)
        peak, largest = max(peak, sum(used)), max(largest, *used, 0)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_BETWEEN_LOOKS)
    seconds = time.monotonic() - started
    assert process.returncode == 0, f"exit code {process.returncode}"
    batch = json.loads((out / "_batch.json").read_text())
    return {
        "images_per_second": batch["rows"] / seconds,
        "seconds": seconds,
        "steady_images_per_second": steady_speed(out),
        "peak_megabytes": peak / 1e6,
        "largest_process_megabytes": largest / 1e6,
    }


def memory_of(pid: int) -> list[int]:
    """The bytes of a process and its descendants, each without shared memory."""
    used = [0]
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return used
    for process in tree:
        try:
            used.append(process.memory_full_info().uss)
        except psutil.Error:
            continue
    return used


def steady_speed(out: Path) -> float:
    """Images per second from the end of the first part to the end of the last one."""
    ends = sorted((file.stat().st_mtime, json.loads(file.read_text())["rows"]) for file in out.glob("_parts/*.json"))
    seconds = ends[-1][0] - ends[0][0]
    return sum(rows for _, rows in ends[1:]) / seconds if seconds > 0 else float("nan")


def merged(first: Timing, second: Timing) -> Timing:
    """Two halves of the rounds."""
    return Timing(median([first.median, second.median]), min(first.low, second.low), max(first.high, second.high))


def show(results: list[dict[str, Any]], num_rows: int) -> None:
    """Prints the table, and whether the aim was reached."""
    rows = [
        {
            "side": row["side"],
            "images/s": f"{row['images_per_second']:,.0f}",
            "to the bare model": f"{row['ratio_to_bare']:.2f}",
        }
        for row in results
    ]
    print_table(f"{num_rows:,} rows", rows)
    whole = results[-1]
    print(
        f"batch-predict: {whole['seconds']:,.0f} s, {whole['ratio_to_bare']:.2f} of the bare model (aim: {ENOUGH}), "
        f"{whole['steady_ratio_to_bare']:.2f} without start and end; peak memory of all its processes "
        f"{whole['peak_megabytes']:,.0f} MB, of the largest one {whole['largest_process_megabytes']:,.0f} MB"
    )


if __name__ == "__main__":
    main()
