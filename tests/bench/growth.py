"""The memory of an ingest's driver against the number of shards (it should stay the same), and for a plan of 10 million rows.

    python -m tests.bench.growth [--shards 8 32 128] [--side 96] [--rows 10000000] [--json FILE]

The images are made here: colour JPEGs of random shapes, in one Parquet file, cut into shards of 1 MB. Ingest runs as a user
would run it, in a process of its own, which is looked at twice a second. For the plan, small images are enough: it is made
from footers and labels alone.
"""

import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.bench.common import arguments, machine, write_json
from tests.bench.million import watch

ROWS_PER_FILE = 100_000
PLAN = """
import pickle, sys, time
from pathlib import Path
from rcnn.config import DataConfig
from rcnn.data.ingest import _Draft, _plan_shards, split_rows
from rcnn.data.sources import open_source
from rcnn.storage import Storage
started = time.perf_counter()
data = DataConfig(source="parquet", root=sys.argv[1])
origin = open_source(data, Path(sys.argv[1]))
listed = time.perf_counter()
jobs = list(_plan_shards(origin, split_rows(origin, data), data, _Draft(Storage(sys.argv[1] + "/storage"), "datasets/x")))
print(len(jobs), listed - started, time.perf_counter() - listed, sum(len(pickle.dumps(job)) for job in jobs))
"""


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, nargs="*", default=[8, 32, 128])
    parser.add_argument("--side", type=int, default=96, help="of the images, in pixels")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the plan; 0: no plan")
    options = parser.parse_args()
    print(machine())
    results: list[dict[str, float]] = [*plan(options.rows)] if options.rows else []
    first = len(results)
    for num_shards in options.shards:
        with tempfile.TemporaryDirectory() as folder:
            num_images = num_shards * (1_000_000 // (3 * options.side**2))
            source = Path(folder, "images")
            make_source(source, num_images, options.side)
            command = [sys.executable, "-m", "rcnn.cli", "ingest", "--set", f"storage={folder}/storage"]
            command += [
                "--set",
                "data.source=parquet",
                "--set",
                f"data.root={source}",
                "--set",
                "data.shard_megabytes=1",
            ]
            command += ["--set", f"data.image_size={options.side}"]
            seconds, peaks, _ = watch(command)
            written = len(list(Path(folder).rglob("train-*.parquet")))
        peak = peaks["driver"]
        print(f"{written:5} training shards, {num_images:,} images: {peak / 2**20:,.0f} MiB, {seconds:.0f} s")
        results.append({"shards": written, "images": num_images, "peak_bytes": peak, "seconds": seconds})
    if len(options.shards) > 1:
        growth = results[-1]["peak_bytes"] - results[first]["peak_bytes"]
        per_shard = growth / max(1, results[-1]["shards"] - results[first]["shards"])
        print(f"{per_shard / 2**20:.2f} MiB more for each shard more")
    write_json(options.json, results)


def plan(num_rows: int) -> Iterator[dict[str, float]]:
    """Lists and plans that many rows, in files of 100,000."""
    with tempfile.TemporaryDirectory() as folder:
        table = pa.table(
            {
                "image": [{"bytes": encoded(np.zeros((8, 8, 3), np.uint8)), "path": None}] * ROWS_PER_FILE,
                "label": [row % 10 for row in range(ROWS_PER_FILE)],
            }
        )
        for number in range(-(-num_rows // ROWS_PER_FILE)):
            pq.write_table(table, Path(folder, f"train-{number:05d}.parquet"))
        _, peaks, printed = watch([sys.executable, "-c", PLAN, folder])
    num_jobs, listing, planning, pickled = (float(word) for word in printed.split())
    print(
        f"{num_rows:,} rows: {peaks['driver'] / 2**20:,.0f} MiB, {listing:.1f} s to list them, {planning:.1f} s to plan "
        f"{num_jobs:.0f} shards, whose jobs take {pickled / 2**20:,.0f} MiB when they are sent"
    )
    yield {"rows": num_rows, "peak_bytes": peaks["driver"], "listing_seconds": listing, "planning_seconds": planning}


def make_source(folder: Path, num_images: int, side: int) -> None:
    """Writes smooth random pictures, as JPEG."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = []
    for _ in range(num_images):
        images.append({"bytes": encoded(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), side), "path": None})
    table = pa.table({"image": images, "label": [row % 10 for row in range(num_images)]})
    pq.write_table(table, folder / "train-00000.parquet", row_group_size=500)


def encoded(pixels: np.ndarray, side: int = 8) -> bytes:
    """The picture, enlarged, as JPEG."""
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=75)
    return stream.getvalue()


if __name__ == "__main__":
    main()
