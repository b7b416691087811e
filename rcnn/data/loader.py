"""Batches from a data set that fits in memory.

In: Parquet shards. Out: uint8 images (N, C, H, W) and int64 labels (N), on the training device. Normalisation belongs to
the model, so that training, evaluation and serving cannot differ in it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rcnn.data.augment import shift
from rcnn.data.manifest import Manifest, read_manifest
from rcnn.data.schema import images_of
from rcnn.errors import DataError
from rcnn.storage import Storage


@dataclass(frozen=True)
class Rows:
    """All rows of a split: uint8 images (N, C, H, W), channels last in memory, and labels (N)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def share(self, rank: int, num_ranks: int) -> "Rows":
        """Every `num_ranks`-th row: the shares of all ranks hold each row once, without padding."""
        return Rows(self.images[rank::num_ranks], self.labels[rank::num_ranks])

    def to(self, device: torch.device) -> "Rows":
        """The same rows on another device."""
        return Rows(self.images.to(device), self.labels.to(device))

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows in order, the last batch as small as it comes."""
        for start in range(0, len(self), batch_size):
            yield self.images[start : start + batch_size], self.labels[start : start + batch_size]


@dataclass(frozen=True)
class TrainingData:
    """What `fit` needs: rows to learn from, rows to choose by, and the manifest that describes both."""

    manifest: Manifest
    train: Rows
    val: Rows


def load_training_data(storage: Storage, folder: str, *, num_rows: int = 0, seed: int = 0) -> TrainingData:
    """Reads the train and validation splits; `num_rows` > 0 keeps that many training rows, drawn by `seed`.

    Raises:
        DataError: the data set is missing or not what its manifest says.
    """
    manifest = require_manifest(storage, folder)
    train = load_rows(storage, folder, manifest, "train")
    if 0 < num_rows < len(train):
        chosen = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(train))[:num_rows]))
        train = Rows(train.images[chosen], train.labels[chosen])
    return TrainingData(manifest, train, load_rows(storage, folder, manifest, "val"))


def require_manifest(storage: Storage, folder: str) -> Manifest:
    """The manifest of a data set that must be there.

    Raises:
        DataError: it is not.
    """
    manifest = read_manifest(storage, folder)
    if manifest is None:
        raise DataError("there is no whole data set", where=storage.uri(folder), remedy="Run `rcnn ingest` first")
    return manifest


def load_rows(storage: Storage, folder: str, manifest: Manifest, split: str) -> Rows:
    """All rows of one split.

    Raises:
        DataError: a shard is missing, or its checksum is not the manifest's.
    """
    images, labels = [], []
    for shard in manifest.splits[split].shards:
        where = storage.uri(f"{folder}/{shard.file}")
        remedy = "Ingest again with --fresh"
        try:
            with storage.filesystem.open_input_stream(storage.path(f"{folder}/{shard.file}")) as stream:
                content = stream.read()
        except OSError as error:
            raise DataError(f"the shard cannot be read ({error})", where=where, remedy=remedy) from error
        found = hashlib.sha256(content).hexdigest()
        if found != shard.sha256:
            raise DataError(
                f"the shard was changed: its SHA-256 begins {found[:12]}, the manifest says {shard.sha256[:12]}",
                where=where,
                remedy=remedy,
            )
        table = pq.read_table(pa.BufferReader(content), columns=["image", "label"])
        images.append(images_of(table))
        labels.append(table.column("label").to_numpy())
    images_NHWC = torch.from_numpy(np.concatenate(images))
    return Rows(images_NHWC.permute(0, 3, 1, 2), torch.from_numpy(np.concatenate(labels)))


class ResidentLoader:
    """Shuffled batches of rows that lie on the training device; no worker process, no loop over images.

    Each epoch is a permutation by (seed, epoch), cut into global batches, and each rank takes its slice of every one:
    all ranks make the same number of steps, and any number of ranks sees the same global batches. The rows that do not
    fill the last batch wait for another epoch's permutation.

    Args:
        rows: the whole training split.
        batch_size: images per step, all ranks together; divides by `num_ranks`.
        seed: seed of the shuffling.
        max_shift: pixels by which images are moved at random; 0 leaves them as they are. Drawn by (seed, epoch) for
            all rows, so that any number of ranks moves each image alike.
        rank, num_ranks: which slice is ours.

    Raises:
        DataError: the split has fewer rows than one batch.
    """

    def __init__(
        self, rows: Rows, *, batch_size: int, seed: int, max_shift: int = 0, rank: int = 0, num_ranks: int = 1
    ):
        if len(rows) < batch_size:
            raise DataError(
                f"the training split has {len(rows)} rows, fewer than one batch of {batch_size}",
                where="train.batch_size",
                remedy=f"Set it to {len(rows)} or less",
            )
        self.rows, self.seed, self.max_shift = rows, seed, max_shift
        self.batch_size, self.rank, self.num_ranks = batch_size, rank, num_ranks

    @property
    def num_steps(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return len(self.rows) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's uint8 images (N / ranks, C, H, W) and labels, step by step."""
        rng = np.random.default_rng((self.seed, epoch))
        device = self.rows.labels.device
        order_N = torch.from_numpy(rng.permutation(len(self.rows))).to(device)
        offsets_N2 = torch.from_numpy(rng.integers(0, 2 * self.max_shift + 1, (len(self.rows), 2))).to(device)
        share = self.batch_size // self.num_ranks
        for step in range(self.num_steps):
            start = step * self.batch_size + self.rank * share
            chosen = order_N[start : start + share]
            images_NCHW = self.rows.images[chosen]
            if self.max_shift:
                images_NCHW = shift(images_NCHW, offsets_N2[start : start + share], max_shift=self.max_shift)
            yield images_NCHW, self.rows.labels[chosen]
