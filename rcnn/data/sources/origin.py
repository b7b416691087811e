"""What every source returns to ingest: an `Origin`, which knows the labels before any pixel is read and cuts out `Chunk`s.

A chunk is small enough to be sent to another process, where it reads its own pixels.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from rcnn.data.manifest import Skipped, SourceRecord
from rcnn.data.schema import Block
from rcnn.errors import DataError, SourceError


class BadRow(Skipped):
    """A row that cannot be used, and what the user can do about it. A manifest lists it as a plain `Skipped`."""

    remedy: str = "Fix or delete it"


def bad_row(skipped: Skipped, *, num_rows: int = 1) -> DataError:
    """The error for the first of `num_rows` bad rows."""
    remedy = skipped.remedy if isinstance(skipped, BadRow) else BadRow.model_fields["remedy"].default
    return DataError(
        skipped.reason + (f" (the first of {num_rows:,} bad rows)" if num_rows > 1 else ""),
        where=skipped.row_id,
        remedy=f"{remedy}, or set data.on_error=skip to skip such rows",
    )


def expanded(root: str) -> Path:
    """`data.root` as an absolute path, with ~ expanded.

    Raises:
        SourceError: the user after ~ does not exist, or the text cannot be a path.
    """
    try:
        path = Path(root).expanduser().absolute()
        path.as_posix().encode()
        os.path.lexists(path)
    except (RuntimeError, ValueError) as error:
        raise SourceError(f"is not a path ({error})", where=f"data.root = {root}", remedy="Give another") from error
    return path


def without_pattern(root: str) -> Path:
    """The folder of a local `data.root` that may be a glob: the path before the first part with a * or ?."""
    plain = re.split(r"[*?]", root)[0]
    return expanded(plain if plain == root else plain.rpartition("/")[0] or ("/" if plain.startswith("/") else "."))


NUM_FIRST_IMAGES = 100  # tried in order, until one can be read, to find out size and colour

# Words in folder or file names that name a part.
PARTS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip

# Files that Windows adds to folders of pictures; never images. In lower case.
LEFTOVERS = frozenset({"thumbs.db", "desktop.ini"})


class Chunk(Protocol):
    """Rows of a source that become one shard."""

    def read(self) -> tuple[Block, list[Skipped]]:
        """Reads the rows, in order; returns rows that could not be read separately, with the reason.

        Raises:
            SourceError: the origin cannot be reached, or a file of many rows is damaged.
        """


@dataclass(frozen=True)
class Origin:
    """A source whose rows are listed but not yet read.

    Attributes:
        labels: int64 labels (N) of each part: "train", and "val" and "test" if the source has them.
        classes: names of the labels.
        image_shape: (H, W, C) of every image that ingest gets.
        record: where the images came from.
        cut: returns the chunk with the given row numbers of a part.
        coarse_classes: names of the coarse labels; empty if there are none.
        skipped: rows that were found to be bad during listing; with data.on_error=fail the source raises `bad_row` instead.
        encoded_bytes: total size of the encoded images; 0 for arrays in memory.
        block_rows: number of consecutive rows that are best read together; training rows are shuffled in such blocks.
    """

    labels: dict[str, np.ndarray]
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    record: SourceRecord
    cut: Callable[[str, np.ndarray], Chunk]
    coarse_classes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    encoded_bytes: int = 0
    block_rows: int = 1


@dataclass(frozen=True)
class Arrays:
    """A part in memory: uint8 images (N, H, W, C), int64 labels (N), coarse labels (N) or None."""

    images: np.ndarray
    labels: np.ndarray
    coarse: np.ndarray | None = field(default=None)


@dataclass(frozen=True)
class ArrayChunk:
    """Some rows of a part in memory; copied only when read, so that the chunks do not all hold pixels at once."""

    part: str
    arrays: Arrays
    rows: np.ndarray

    def read(self) -> tuple[Block, list[Skipped]]:
        """The rows; none is bad, because arrays were checked when the source was opened."""
        arrays, rows = self.arrays, self.rows
        coarse = None if arrays.coarse is None else arrays.coarse[rows]
        row_ids = [f"{self.part}/{row}" for row in rows.tolist()]
        return Block(np.ascontiguousarray(arrays.images[rows]), arrays.labels[rows], row_ids, coarse), []


def origin_of_arrays(
    parts: dict[str, Arrays],
    classes: tuple[str, ...],
    record: SourceRecord,
    *,
    coarse_classes: tuple[str, ...] = (),
) -> Origin:
    """The origin of a source that is in memory; a row's id is its part and number."""

    def cut(part: str, rows: np.ndarray) -> ArrayChunk:
        return ArrayChunk(part, parts[part], rows)

    height, width, channels = parts["train"].images.shape[1:]
    return Origin(
        labels={part: arrays.labels for part, arrays in parts.items()},
        classes=classes,
        image_shape=(height, width, channels),
        record=record,
        cut=cut,
        coarse_classes=coarse_classes,
    )
