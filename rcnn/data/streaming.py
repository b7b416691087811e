"""The engine for data larger than memory: row groups read ahead from the shards, by a thread of its own.

Shuffling is in two steps. An epoch puts all row groups (some 1,000 rows each) in an order of its own and gives each rank a
stretch of it, so that a rank reads what it needs and little more; within a window of 32 groups, rows are shuffled. About
two windows are in memory at a time, some 200 MB.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch

from rcnn.data.augment import Augmentation, Draws
from rcnn.data.batches import Batch, Loader, Order
from rcnn.data.manifest import Manifest, Shard
from rcnn.data.schema import images_of
from rcnn.data.shards import changed_shard, open_shard, rows_per_group, unreadable_shard
from rcnn.storage import Storage

Item = TypeVar("Item")

GROUPS_PER_WINDOW = 32
WINDOWS_AHEAD = 1
NUM_READERS = 4


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows of one row group."""

    shard: int
    group: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class StoredRows:
    """Rows of a split that stay on disk until they are needed; the same contract as `Rows`."""

    storage: Storage
    folder: str
    shards: tuple[Shard, ...]
    segments: tuple[Segment, ...]
    image_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return sum(map(len, self.segments))

    def share(self, rank: int, num_ranks: int) -> "StoredRows":
        """A rank's stretch of the rows: the ranks' stretches differ by one row at the most."""
        count = len(self)
        return replace(
            self, segments=stretch(self.segments, rank * count // num_ranks, (rank + 1) * count // num_ranks)
        )

    def batches(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """All rows in order, the last batch as small as it comes."""
        for images_NHWC, labels_N in self.read_in_order(batch_size):
            images_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
            yield images_NCHW.to(device), torch.from_numpy(labels_N).to(device)

    def read_in_order(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same as numpy arrays: images (N, H, W, C) and labels (N)."""
        nothing = Augmentation()

        def read(window: tuple[Segment, ...]) -> _Window:
            images_NHWC, labels_N = self.read(window)
            rng = np.random.default_rng(0)
            draws = nothing.draw(rng, len(labels_N), self.image_shape[:2])
            return _Window(images_NHWC, labels_N, np.arange(len(labels_N)), draws)

        for piece in _rebatched(_read_ahead(read, _windows(self.segments)), batch_size):
            yield piece.images, piece.labels

    def loader(self, order: Order, augmentation: Augmentation, device: torch.device) -> "StreamingLoader":
        """Batches to learn from."""
        return StreamingLoader(self, order, augmentation, device)

    def read(self, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, H, W, C) and labels (N) of some segments.

        Raises:
            DataError: a shard is missing, or not what the manifest says.
        """
        first_rows = [0, *accumulate(map(len, segments))]
        images_NHWC = np.empty((first_rows[-1], *self.image_shape), np.uint8)
        labels_N = np.empty(first_rows[-1], np.int64)
        of_shard: dict[int, list[int]] = {}
        for number, segment in enumerate(segments):
            of_shard.setdefault(segment.shard, []).append(number)

        def read(numbers: list[int]) -> None:
            for number, table in zip(numbers, self._read_groups([segments[number] for number in numbers]), strict=True):
                here = slice(first_rows[number], first_rows[number + 1])
                images_NHWC[here], labels_N[here] = images_of(table), table.column("label").to_numpy()

        with ThreadPoolExecutor(NUM_READERS) as pool:
            deque(pool.map(read, of_shard.values()), maxlen=0)
        return images_NHWC, labels_N

    def row_ids(self) -> list[str]:
        """The ids of all rows, in order.

        Raises:
            DataError: a shard is missing, or not what the manifest says.
        """
        return [
            row_id
            for _, of_shard in groupby(self.segments, key=lambda segment: segment.shard)
            for table in self._read_groups(list(of_shard), ["row_id"])
            for row_id in table.column("row_id").to_pylist()
        ]

    def _read_groups(
        self, segments: Sequence[Segment], columns: Sequence[str] = ("image", "label")
    ) -> Iterator[pa.Table]:
        """Rows of one shard."""
        shard = self.shards[segments[0].shard]
        where = self.storage.uri(f"{self.folder}/{shard.file}")
        with open_shard(self.storage, self.folder, shard, self.image_shape) as file:
            for segment in segments:
                try:
                    table = file.read_row_group(segment.group, columns=list(columns), use_threads=False)
                except (OSError, pa.ArrowException) as error:
                    raise unreadable_shard(where, error) from error
                if len(table) < segment.stop:
                    raise changed_shard(where, f"its row group {segment.group} has {len(table)} rows")
                yield table.slice(segment.start, len(segment))


def stored_rows(
    storage: Storage, folder: str, manifest: Manifest, *splits: str, num_rows: int = 0, seed: int = 0
) -> StoredRows:
    """The rows of some splits; `num_rows` > 0 keeps that many, equally many of each row group, drawn by `seed`."""
    group = rows_per_group(manifest.image_bytes)
    shards = tuple(shard for split in splits for shard in manifest.splits[split].shards)
    segments = [
        Segment(number, first // group, 0, min(group, shard.rows - first))
        for number, shard in enumerate(shards)
        for first in range(0, shard.rows, group)
    ]
    if 0 < num_rows < sum(manifest.splits[split].rows for split in splits):
        segments = _thinned(segments, num_rows, np.random.default_rng(seed))
    return StoredRows(storage, folder, shards, tuple(segments), manifest.image_shape)


def _thinned(segments: Sequence[Segment], num_rows: int, rng: np.random.Generator) -> list[Segment]:
    """A piece of each segment, `num_rows` rows in all."""
    ends = np.cumsum([len(segment) for segment in segments])
    lengths = np.diff(ends * num_rows // ends[-1], prepend=0)
    starts = [rng.integers(len(segment) - length + 1) for segment, length in zip(segments, lengths, strict=True)]
    return [
        replace(segment, start=int(start), stop=int(start + length))
        for segment, start, length in zip(segments, starts, lengths, strict=True)
        if length
    ]


def stretch(segments: Sequence[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """What lies from row `start` to row `stop` of segments put one after the other."""
    ends = accumulate(map(len, segments))
    cut = (
        replace(
            segment,
            start=segment.start + max(0, start - (end - len(segment))),
            stop=segment.stop - max(0, end - stop),
        )
        for segment, end in zip(segments, ends, strict=True)
        if end > start and end - len(segment) < stop
    )
    return tuple(segment for segment in cut if len(segment) > 0)


class StreamingLoader(Loader):
    """Batches read ahead from the shards. Each rank reads its own stretch of the epoch's order of row groups."""

    def __init__(
        self,
        rows: StoredRows,
        order: Order,
        augmentation: Augmentation = Augmentation(),
        device: torch.device | None = None,
    ):
        super().__init__(len(rows), order, augmentation)
        self.rows, self.device = rows, device or torch.device("cpu")

    def epoch(self, epoch: int, *, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches; those before `first_step` are not read, but for what shares a window with it."""
        order, rank = self.order, self.order.rank
        permutation = np.random.default_rng((order.seed, epoch)).permutation(len(self.rows.segments))
        segments = [self.rows.segments[number] for number in permutation]
        num_mine = self.num_steps * order.share
        windows = _windows(stretch(segments, rank * num_mine, (rank + 1) * num_mine))
        first_rows = [0, *accumulate(sum(map(len, window)) for window in windows)]
        skipped = first_step * order.share
        first = int(np.searchsorted(first_rows, skipped, side="right")) - 1

        def read(number: int) -> _Window:
            images_NHWC, labels_N = self.rows.read(windows[number])
            rng = np.random.default_rng((order.seed, epoch, rank, order.num_ranks, number))
            shuffled = rng.permutation(len(labels_N))
            draws = self.augmentation.draw(rng, len(labels_N), self.rows.image_shape[:2])
            rows_N = _numbers_of(windows[number])[shuffled]
            draws = self.augmentation.alternated(draws, rows_N, seed=order.seed, epoch=epoch)
            window = _Window(images_NHWC, labels_N, shuffled, draws)
            return window.after(skipped - first_rows[number]) if number == first else window

        for piece in _rebatched(_read_ahead(read, range(first, len(windows))), order.share):
            images_NCHW = torch.from_numpy(piece.images).permute(0, 3, 1, 2).to(self.device, non_blocking=True)
            labels_N = torch.from_numpy(piece.labels).to(self.device, non_blocking=True)
            yield self.augmentation.apply(images_NCHW, piece.draws), labels_N


@dataclass(frozen=True)
class _Piece:
    """Rows in the order in which they are handed out."""

    images: np.ndarray
    labels: np.ndarray
    draws: Draws


@dataclass(frozen=True)
class _Window:
    """Rows as they were read, and the order in which they are handed out; `draws` belong to that order."""

    images: np.ndarray
    labels: np.ndarray
    order: np.ndarray
    draws: Draws

    def __len__(self) -> int:
        return len(self.order)

    def after(self, num_rows: int) -> "_Window":
        """Without the first rows."""
        return replace(self, order=self.order[num_rows:], draws=self.draws[num_rows:])

    def take(self, rows: slice) -> _Piece:
        """Some of the rows."""
        chosen = self.order[rows]
        return _Piece(self.images[chosen], self.labels[chosen], self.draws[rows])


def _numbers_of(segments: Sequence[Segment]) -> np.ndarray:
    """A number for each row, the same one in every epoch."""
    parts = [
        (segment.shard << 40) + (segment.group << 20) + np.arange(segment.start, segment.stop) for segment in segments
    ]
    return np.concatenate(parts)


def _windows(segments: Sequence[Segment]) -> list[tuple[Segment, ...]]:
    return [tuple(segments[first : first + GROUPS_PER_WINDOW]) for first in range(0, len(segments), GROUPS_PER_WINDOW)]


def _read_ahead(read: Callable[[Item], _Window], items: Sequence[Item]) -> Iterator[_Window]:
    """The windows in turn, the next one being read while one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        coming: deque[Future[_Window]] = deque()
        try:
            for item in items:
                coming.append(pool.submit(read, item))
                if len(coming) > WINDOWS_AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


def _rebatched(windows: Iterator[_Window], batch_size: int) -> Iterator[_Piece]:
    """The windows' rows in pieces of `batch_size`, across their borders; the last piece as small as it comes."""
    held: _Piece | None = None
    for window in windows:
        start = 0
        if held is not None:
            start = min(batch_size - len(held.labels), len(window))
            held = _joined(held, window.take(slice(0, start)))
            if len(held.labels) < batch_size:
                continue
            yield held
        while start + batch_size <= len(window):
            yield window.take(slice(start, start + batch_size))
            start += batch_size
        held = window.take(slice(start, len(window))) if start < len(window) else None
    if held is not None:
        yield held


def _joined(first: _Piece, second: _Piece) -> _Piece:
    return _Piece(
        np.concatenate([first.images, second.images]),
        np.concatenate([first.labels, second.labels]),
        Draws.joined([first.draws, second.draws]),
    )
