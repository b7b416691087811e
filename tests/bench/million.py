"""A million images through ingest and the streaming loader: images per second, and the memory of the largest process.

    python -m tests.bench.million --folder EMPTY_FOLDER [--images 1000000]

The images are made here: 32x32 colour JPEGs of random shapes, in 20 Parquet files of the Hugging Face layout. Ingest runs as
a user would run it, in a process of its own, with Ray; each process is looked at twice a second.
"""

import io
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.bench.common import arguments, machine, write_json

NUM_FILES = 20
ROWS_PER_GROUP = 1000
NUM_DISTINCT = 4096
LIMIT_BYTES = 2 * 2**30
SECONDS_BETWEEN_LOOKS = 0.5

STREAM = """
import sys, time
from rcnn.data.augment import Augmentation
from rcnn.data.catalog import find_data_set
from rcnn.data.loader import Order, load_training_data
from rcnn.storage import Storage
import torch
storage = Storage(sys.argv[1])
data = load_training_data(storage, find_data_set(storage, "million"), engine="streaming")
loader = data.train.loader(Order(64, seed=0), Augmentation(max_shift=4, flip=True), torch.device("cpu"))
started = time.perf_counter()
images = sum(len(labels) for _, labels in loader.epoch(0))
print(images, time.perf_counter() - started)
"""


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where images and data set go; some 8 GB")
    parser.add_argument("--images", type=int, default=1_000_000)
    options = parser.parse_args()
    print(machine())
    source = options.folder / "million"
    if not source.exists():
        make_source(source, options.images)
    command = [sys.executable, "-m", "rcnn.cli", "ingest", "--set", f"storage={options.folder / 'storage'}"]
    command += ["--set", "data.source=parquet", "--set", f"data.root={source}"]
    seconds, peaks, _ = watch(command)
    results = [{"what": "ingest", "images": options.images, "seconds": seconds, "peak_bytes": peaks}]
    print(f"ingest: {options.images / seconds:,.0f} images/s ({seconds:.0f} s, process and Ray start included)")
    print_peaks(peaks)
    _, peaks, printed = watch([sys.executable, "-c", STREAM, str(options.folder / "storage")])
    images, seconds = (float(word) for word in printed.split())
    results.append({"what": "streaming", "images": int(images), "seconds": seconds, "peak_bytes": peaks})
    print(f"streaming, augmented: {images / seconds:,.0f} images/s")
    print_peaks(peaks)
    write_json(options.json, results)


def make_source(folder: Path, num_images: int) -> None:
    """Writes the images; some thousands of distinct ones, over and over."""
    encoded = [encode(np.random.default_rng(number)) for number in range(NUM_DISTINCT)]
    folder.mkdir(parents=True)
    per_file = -(-num_images // NUM_FILES)
    for number in range(NUM_FILES):
        rows = range(number * per_file, min(num_images, (number + 1) * per_file))
        images = [{"bytes": encoded[row % NUM_DISTINCT], "path": None} for row in rows]
        table = pa.table({"image": images, "label": [row % NUM_DISTINCT % 10 for row in rows]})
        pq.write_table(table, folder / f"train-{number:05d}.parquet", row_group_size=ROWS_PER_GROUP)


def encode(rng: np.random.Generator) -> bytes:
    """A smooth random picture as JPEG, about as large as a photograph of CIFAR-10."""
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize((32, 32), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=75)
    return stream.getvalue()


def watch(command: list[str]) -> tuple[float, dict[str, int], str]:
    """Runs a command; returns its seconds, the largest resident size by name of process, and what it printed."""
    peaks: dict[str, int] = {}
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        done = threading.Event()
        thread = threading.Thread(target=_look, args=(process.pid, peaks, done))
        thread.start()
        printed, _ = process.communicate()
        done.set()
        thread.join()
    if process.returncode:
        sys.exit(f"{' '.join(command[:6])} ... exited with {process.returncode}")
    return time.perf_counter() - started, peaks, printed


def _look(pid: int, peaks: dict[str, int], done: threading.Event) -> None:
    while not done.wait(SECONDS_BETWEEN_LOOKS):
        try:
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                # Without shared memory: Ray's object store is one, and every worker maps it.
                memory = process.memory_info()
                name = "driver" if process.pid == pid else " ".join(process.cmdline()[:1]).rpartition("/")[2]
            except psutil.Error:
                continue
            peaks[name] = max(peaks.get(name, 0), memory.rss - memory.shared)


def print_peaks(peaks: dict[str, Any]) -> None:
    """The largest processes, and whether they stay within the limit."""
    for name, size in sorted(peaks.items(), key=lambda item: -item[1])[:5]:
        print(f"  {size / 2**20:7,.0f} MiB  {name}")
    verdict = "within" if max(peaks.values()) <= LIMIT_BYTES else "ABOVE"
    print(f"  {verdict} the limit of {LIMIT_BYTES / 2**30:.0f} GiB a process (resident, without what is shared)")


if __name__ == "__main__":
    main()
