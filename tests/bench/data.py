"""How fast images come: ingest, and both loading engines against torchvision's data sets behind a `DataLoader`.

    python -m tests.bench.data --mnist FOLDER --cifar10-jpeg FOLDER

Both sides deliver the same thing: shuffled uint8 batches of 64 on the CPU, padded by 4 black pixels and cropped at random,
and for CIFAR-10-JPEG flipped at random. The baseline has two worker processes, which are started before the clock.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from rcnn.config import PipelineConfig
from rcnn.data import streaming
from rcnn.data.augment import Augmentation
from rcnn.data.ingest import run_ingest
from rcnn.data.loader import Batch, Loader, Order, Rows, load_training_data
from rcnn.data.manifest import require_manifest
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from rcnn.train.checkpoint import new_state
from rcnn.train.step import train_step
from tests.bench.common import Timing, arguments, machine, print_table, take_turns, write_json

SHARED = Path(__file__).parents[3] / "shared" / "data"
BATCH_SIZE = 64
IMAGES_PER_ROUND = 12_800
PADDING = 4
NUM_WORKERS = 2
TRAINING_STEPS = 40
CPU = torch.device("cpu")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, default=SHARED / "MNIST" / "raw", help="folder with the official files")
    parser.add_argument("--cifar10-jpeg", type=Path, default=SHARED / "cifar10-jpeg", help="folder with Parquet files")
    options = parser.parse_args()
    for flag, folder in (("--mnist", options.mnist), ("--cifar10-jpeg", options.cifar10_jpeg)):
        if not folder.is_dir():
            parser.error(f"{flag}: there is no folder {folder}; the benchmark needs both data sets")
    print(machine())
    results = [
        measure("MNIST", {"data.source": "mnist", "data.root": str(options.mnist)}, flip=False, rounds=options.rounds),
        measure(
            "CIFAR-10-JPEG",
            {"data.source": "parquet", "data.root": str(options.cifar10_jpeg)},
            flip=True,
            rounds=options.rounds,
        ),
    ]
    for result in results:
        report(result)
    write_json(options.json, results)


def measure(name: str, settings: dict[str, Any], *, flip: bool, rounds: int) -> dict[str, Any]:
    """All figures of one data set."""
    with tempfile.TemporaryDirectory() as root:
        config = PipelineConfig().with_settings(
            settings | {"storage": root, "model.k": 32, "augment.max_shift": PADDING}
        )
        started = time.perf_counter()
        ingested = run_ingest(config, StageFolder(Storage(root), "datasets/bench"), NoTracker())
        seconds = time.perf_counter() - started
        augmentation = Augmentation(max_shift=PADDING, flip=flip)
        loaders = {
            engine: load_training_data(Storage(root), ingested.folder, engine=engine).train.loader(
                Order(BATCH_SIZE, seed=0), augmentation, CPU
            )
            for engine in ("resident", "streaming")
        }
        resident = load_training_data(Storage(root), ingested.folder, engine="resident").train
        assert isinstance(resident, Rows)
        sides = {
            "torchvision": part_of_an_epoch(torchvision_loader(resident, flip=flip)),
            **{engine: epochs_of(loader) for engine, loader in loaders.items()},
        }
        timings = take_turns(sides, rounds=rounds)
        num_images = sum(ingested.rows.values())
        return {
            "data_set": name,
            "ingest": {"images": num_images, "seconds": seconds, "images_per_second": num_images / seconds},
            **{side: timing.as_json() for side, timing in timings.items()},
            **{f"{engine}_ratio": timings[engine].median / timings["torchvision"].median for engine in loaders},
            **{
                f"{engine}_waiting": share_of_waiting(config, loader, ingested.folder)
                for engine, loader in loaders.items()
            },
        }


class AsTorchvision(Dataset[tuple[torch.Tensor, int]]):
    """What torchvision's own data sets do for each image: the array as a PIL image, through the transforms."""

    def __init__(self, rows: Rows, *, flip: bool):
        from torchvision import transforms

        images_NHWC = rows.images.permute(0, 2, 3, 1).numpy()
        self.images = images_NHWC[..., 0] if images_NHWC.shape[3] == 1 else images_NHWC
        self.labels = rows.labels.tolist()
        steps: list[Any] = [transforms.RandomCrop(self.images.shape[1], padding=PADDING)]
        steps += [transforms.RandomHorizontalFlip()] if flip else []
        self.transform = transforms.Compose([*steps, transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[number])), self.labels[number]


def torchvision_loader(rows: Rows, *, flip: bool) -> DataLoader[Any]:
    """The baseline, its workers running."""
    loader = DataLoader(
        AsTorchvision(rows, flip=flip),
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=NUM_WORKERS,
        persistent_workers=True,
    )
    next(iter(loader))
    return loader


def part_of_an_epoch(loader: DataLoader[Any]) -> Callable[[], int]:
    """A round of the baseline: as many images as it delivers in a second or two."""
    endless = _repeat(lambda epoch: iter(loader))

    def take() -> int:
        taken = 0
        while taken < IMAGES_PER_ROUND:
            taken += len(next(endless)[0])
        return taken

    return take


def epochs_of(loader: Loader) -> Callable[[], int]:
    """A round of ours: a whole epoch, so that what is done once an epoch or a window counts."""
    numbers = itertools.count()
    return lambda: sum(len(images) for images, _ in loader.epoch(next(numbers)))


def _repeat(epoch: Callable[[int], Iterator[Batch]]) -> Iterator[Batch]:
    for number in itertools.count():
        yield from epoch(number)


def share_of_waiting(config: PipelineConfig, loader: Loader, folder: str) -> float:
    """The part of training steps (RCNN-32, T = 3, on the CPU) that passes before the batch is there."""
    streaming.GROUPS_PER_WINDOW = 1  # small windows, so that the steps timed cross some borders
    state = new_state(config, require_manifest(Storage(config.storage), folder), device=CPU, num_steps=TRAINING_STEPS)
    batches = _repeat(loader.epoch)
    waited, started = [], time.perf_counter()
    for step in range(TRAINING_STEPS + 1):
        if step == 1:  # what the first step makes ready is not every step's
            waited, started = [], time.perf_counter()
        asked = time.perf_counter()
        images_NCHW, labels_N = next(batches)
        waited.append(time.perf_counter() - asked)
        train_step(state.model, state.optimizer, images_NCHW, labels_N, clip_norm=1.0)
    return float(np.sum(waited) / (time.perf_counter() - started))


def report(result: dict[str, Any]) -> None:
    """Prints one data set's figures."""
    ingest = result["ingest"]
    print(
        f"\n{result['data_set']}: ingest of {ingest['images']:,} images in {ingest['seconds']:.1f} s, "
        f"{ingest['images_per_second']:,.0f} images/s"
    )
    rows = []
    for side in ("torchvision", "resident", "streaming"):
        timing = result[side]
        rows.append(
            {
                "loader": f"DataLoader({NUM_WORKERS} workers)" if side == "torchvision" else side,
                "images/s, median (low to high)": str(
                    Timing(timing["images_per_second"], timing["low"], timing["high"])
                ),
                "ratio": f"{result.get(f'{side}_ratio', 1.0):.1f}",
                "waiting, % of a step": f"{100 * result[f'{side}_waiting']:.2f}" if f"{side}_waiting" in result else "",
            }
        )
    print_table(result["data_set"], rows)


if __name__ == "__main__":
    main()
