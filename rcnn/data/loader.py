"""Opens the splits of a data set, and serves those that fit in memory (`streaming.py` serves the others).

In: Parquet shards. Out: batches, as `batches.py` describes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rcnn.data.augment import Augmentation
from rcnn.data.batches import Batch, Loader, Order, RowSource
from rcnn.data.manifest import Manifest, require_manifest
from rcnn.data.schema import images_of
from rcnn.data.shards import read_shard
from rcnn.data.streaming import stored_rows
from rcnn.storage import Storage


@dataclass(frozen=True)
class Rows:
    """All rows of a split in memory: uint8 images (N, C, H, W), channels last in memory, and labels (N)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def share(self, rank: int, num_ranks: int) -> "Rows":
        """Every `num_ranks`-th row."""
        return Rows(self.images[rank::num_ranks], self.labels[rank::num_ranks])

    def to(self, device: torch.device) -> "Rows":
        """The same rows on another device."""
        return Rows(self.images.to(device), self.labels.to(device))

    def followed_by(self, others: "Rows") -> "Rows":
        """These rows, and then the others."""
        images = torch.cat([self.images, others.images]).contiguous(memory_format=torch.channels_last)
        return Rows(images, torch.cat([self.labels, others.labels]))

    def take(self, chosen_N: np.ndarray) -> "Rows":
        """The rows of these numbers, in this order."""
        if self.images.device.type == "cpu":  # numpy copies an image at a time, torch a byte at a time
            images_NHWC = self.images.permute(0, 2, 3, 1).numpy()[chosen_N]
            return Rows(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2), self.labels[torch.from_numpy(chosen_N)])
        index = torch.from_numpy(chosen_N).to(self.labels.device, non_blocking=True)
        return Rows(self.images[index], self.labels[index])

    def batches(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """All rows in order, the last batch as small as it comes."""
        here = self.to(device)
        for start in range(0, len(self), batch_size):
            yield here.images[start : start + batch_size], here.labels[start : start + batch_size]

    def loader(self, order: Order, augmentation: Augmentation, device: torch.device) -> "ResidentLoader":
        """Batches to learn from."""
        return ResidentLoader(self.to(device), order, augmentation)


class ResidentLoader(Loader):
    """Batches of rows that lie on the training device: picked by index, augmented there; no worker process, no loop over
    images.

    An epoch is a permutation by (seed, epoch), cut into global batches of which each rank takes its slice: any number of
    ranks sees the same global batches, and each image is augmented alike.
    """

    def __init__(self, rows: Rows, order: Order, augmentation: Augmentation = Augmentation()):
        super().__init__(len(rows), order, augmentation)
        self.rows = rows

    def epoch(self, epoch: int, *, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches."""
        rng = np.random.default_rng((self.order.seed, epoch))
        order_N = rng.permutation(self.num_rows)
        height, width = self.rows.images.shape[2:]
        draws = self.augmentation.draw(rng, self.num_rows, (height, width))
        draws = self.augmentation.alternated(draws, order_N, seed=self.order.seed, epoch=epoch)
        for step in range(first_step, self.num_steps):
            start = step * self.order.batch_size + self.order.rank * self.order.share
            mine = slice(start, start + self.order.share)
            batch = self.rows.take(order_N[mine])
            yield self.augmentation.apply(batch.images, draws[mine]), batch.labels


@dataclass(frozen=True)
class TrainingData:
    """What `fit` needs: rows to learn from, rows to choose by, and the manifest that describes both."""

    manifest: Manifest
    train: RowSource
    val: RowSource


def load_training_data(
    storage: Storage,
    folder: str,
    *,
    num_rows: int = 0,
    with_validation: bool = False,
    seed: int = 0,
    engine: str = "auto",
    resident_megabytes: int = 4096,
) -> TrainingData:
    """Opens the train and validation splits.

    Args:
        storage: where the data set is.
        folder: its folder.
        num_rows: keeps that many training rows, drawn by `seed`; 0: all of them.
        with_validation: whether the validation rows are among those to learn from, behind the training rows.
        seed: see `num_rows`.
        engine: "resident", "streaming", or "auto": resident where the training rows take no more than
            `resident_megabytes`.

    Raises:
        DataError: the data set is missing or not what its manifest says.
    """
    manifest = require_manifest(storage, folder)
    splits = ("train", "val") if with_validation else ("train",)
    wanted = num_rows or sum(manifest.splits[split].rows for split in splits)
    fits = wanted * manifest.image_bytes <= resident_megabytes * 1_000_000
    if engine == "resident" or (engine == "auto" and fits):
        learned = _load_some(storage, folder, manifest, num_rows, seed)
        train: RowSource = (
            learned.followed_by(load_rows(storage, folder, manifest, "val")) if with_validation else learned
        )
    else:
        train = stored_rows(storage, folder, manifest, *splits, num_rows=num_rows, seed=seed)
    val = open_rows(storage, folder, manifest, "val", resident_megabytes=resident_megabytes)
    return TrainingData(manifest, train, val)


def open_rows(storage: Storage, folder: str, manifest: Manifest, split: str, *, resident_megabytes: int) -> RowSource:
    """The rows of a split, in memory where they fit.

    Raises:
        DataError: a shard is missing, or not what the manifest says.
    """
    if manifest.splits[split].rows * manifest.image_bytes <= resident_megabytes * 1_000_000:
        return load_rows(storage, folder, manifest, split)
    return stored_rows(storage, folder, manifest, split)


def _load_some(storage: Storage, folder: str, manifest: Manifest, num_rows: int, seed: int) -> Rows:
    """All training rows, or `num_rows` of them drawn by `seed`; the others are read and let go."""
    count = manifest.splits["train"].rows
    if not 0 < num_rows < count:
        return load_rows(storage, folder, manifest, "train")
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:num_rows])
    return load_rows(storage, folder, manifest, "train", chosen=chosen)


def load_rows(
    storage: Storage, folder: str, manifest: Manifest, split: str, *, chosen: np.ndarray | None = None
) -> Rows:
    """The rows of one split, in memory: all of them, or those of the numbers `chosen`, ascending.

    Raises:
        DataError: a shard is missing, or its checksum is not the manifest's.
    """
    count = manifest.splits[split].rows if chosen is None else len(chosen)
    images_NHWC, labels_N = np.empty((count, *manifest.image_shape), np.uint8), np.empty(count, np.int64)
    first, start = 0, 0
    for shard in manifest.splits[split].shards:
        table = read_shard(storage, folder, shard)
        if chosen is not None:
            of_shard = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, first + shard.rows)] - first
            table = table.take(of_shard)
        here = slice(start, start + len(table))
        images_NHWC[here], labels_N[here] = images_of(table), table.column("label").to_numpy()
        first, start = first + shard.rows, start + len(table)
    return Rows(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2), torch.from_numpy(labels_N))
