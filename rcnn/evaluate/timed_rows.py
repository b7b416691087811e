"""Test rows that time themselves: the end of scoring, predicted from its first batches, and the fact."""

import math
from collections.abc import Callable, Iterator

import torch

from rcnn.data.augment import Augmentation
from rcnn.data.batches import Batch, Loader, Order, RowSource

NUM_TIMED_BATCHES = 3


class TimedRows:
    """Rows that predict from their first batches how long all of them take, and measure how long they took.

    Args:
        rows: the rows.
        clock: seconds; called a few times, between batches.
    """

    def __init__(self, rows: RowSource, clock: Callable[[], float]):
        self._rows, self._clock = rows, clock
        self.started, self.seconds, self.predicted_seconds = clock(), 0.0, 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def share(self, rank: int, num_ranks: int) -> RowSource:
        """As the rows do, untimed."""
        return self._rows.share(rank, num_ranks)

    def loader(self, order: Order, augmentation: Augmentation, device: torch.device) -> Loader:
        """As the rows do, untimed."""
        return self._rows.loader(order, augmentation, device)

    def batches(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """All rows in order. The first batch, which warms up, says how fast the rest is only where there are few."""
        num_batches = math.ceil(len(self) / batch_size)
        self.started, warm = self._clock(), 0.0
        for number, batch in enumerate(self._rows.batches(batch_size, device), start=1):
            yield batch
            if number == 1:
                warm = self._clock() - self.started
                self.predicted_seconds = warm * num_batches
            elif number == 1 + NUM_TIMED_BATCHES:
                per_batch = (self._clock() - self.started - warm) / NUM_TIMED_BATCHES
                self.predicted_seconds = warm + per_batch * (num_batches - 1)
        self.seconds = self._clock() - self.started
