"""Batches: the contract that both engines keep, the one for data in memory (`loader.py`) and the one for data on disk
(`streaming.py`).

A batch is uint8 images (N, C, H, W) and int64 labels (N), on the training device. Normalisation belongs to the model, so that
training, evaluation and serving cannot differ in it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rcnn.data.augment import Augmentation
from rcnn.errors import DataError

Batch = tuple[Tensor, Tensor]
"""uint8 images (N, C, H, W) and int64 labels (N)."""


@dataclass(frozen=True)
class Order:
    """How an epoch is cut into batches.

    Attributes:
        batch_size: images per step, all ranks together; divides by `num_ranks`.
        seed: seed of the shuffling and of the augmentation.
        rank, num_ranks: whose batches.
    """

    batch_size: int
    seed: int
    rank: int = 0
    num_ranks: int = 1

    @property
    def share(self) -> int:
        """Images per step of one rank."""
        return self.batch_size // self.num_ranks


class Loader(ABC):
    """Shuffled and augmented batches of one rank.

    An epoch has equally many steps on every rank, shows no row twice, and depends only on (seed, epoch, rank, number of
    ranks). The rows that do not fill the last batch are left out of it.

    Raises:
        DataError: there are fewer rows than one batch.
    """

    def __init__(self, num_rows: int, order: Order, augmentation: Augmentation):
        if num_rows < order.batch_size:
            raise DataError(
                f"the training split has {num_rows} rows, fewer than one batch of {order.batch_size}",
                where="train.batch_size",
                remedy=f"Set it to {num_rows} or less",
            )
        self.num_rows, self.order, self.augmentation = num_rows, order, augmentation

    @property
    def num_steps(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self.num_rows // self.order.batch_size

    @abstractmethod
    def epoch(self, epoch: int, *, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches, step by step; from `first_step` on, they are those of the whole epoch."""


class RowSource(Protocol):
    """Rows of a split, wherever they lie."""

    def __len__(self) -> int:
        """How many there are."""

    def share(self, rank: int, num_ranks: int) -> "RowSource":
        """A rank's part: the parts of all ranks hold each row once, without padding."""

    def batches(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """All rows in order, the last batch as small as it comes."""

    def loader(self, order: Order, augmentation: Augmentation, device: torch.device) -> Loader:
        """Batches to learn from."""
