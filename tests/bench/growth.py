"""The memory of an ingest's driver against the number of shards: it should stay the same.

    python -m tests.bench.growth [--shards 8 32 128] [--side 96] [--json FILE]

The images are made here: colour JPEGs of random shapes, in one Parquet file, cut into shards of 1 MB. Ingest runs as a user
would run it, in a process of its own, which is looked at twice a second.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.bench.common import arguments, machine, write_json
from tests.bench.million import watch


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--side", type=int, default=96, help="of the images, in pixels")
    options = parser.parse_args()
    print(machine())
    results = []
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
    growth = results[-1]["peak_bytes"] - results[0]["peak_bytes"]
    per_shard = growth / max(1, results[-1]["shards"] - results[0]["shards"])
    print(f"{per_shard / 2**20:.2f} MiB more for each shard more")
    write_json(options.json, results)


def make_source(folder: Path, num_images: int, side: int) -> None:
    """Writes smooth random pictures, as JPEG."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = []
    for _ in range(num_images):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=75)
        images.append({"bytes": stream.getvalue(), "path": None})
    table = pa.table({"image": images, "label": [row % 10 for row in range(num_images)]})
    pq.write_table(table, folder / "train-00000.parquet", row_group_size=500)


if __name__ == "__main__":
    main()
