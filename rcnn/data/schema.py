"""The Parquet schema of every data set, defined only here.

A row is one image: uint8 pixels of a fixed shape (H, W, C), a label, a coarse label if the source has one, and an id that
names the row in its source. `fixed_shape_tensor` is Arrow's canonical extension type: a reader that does not support it sees
a plain list of uint8.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Block:
    """Rows in memory: uint8 images (N, H, W, C), int64 labels (N), N ids, and coarse labels (N) or None."""

    images: np.ndarray
    labels: np.ndarray
    row_ids: list[str]
    coarse: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen_N: np.ndarray) -> "Block":
        """The rows with these indices, in this order."""
        return Block(
            self.images[chosen_N],
            self.labels[chosen_N],
            [self.row_ids[number] for number in chosen_N.tolist()],
            None if self.coarse is None else self.coarse[chosen_N],
        )


def table_schema(image_shape: Sequence[int], *, has_coarse: bool = False) -> pa.Schema:
    """The schema for images of shape (H, W, C)."""
    image = pa.fixed_shape_tensor(pa.uint8(), list(image_shape), dim_names=["H", "W", "C"])
    coarse = [("coarse_label", pa.int64())] if has_coarse else []
    return pa.schema([("image", image), ("label", pa.int64()), *coarse, ("row_id", pa.string())])


def build_table(block: Block) -> pa.Table:
    """The rows as an Arrow table."""
    schema = table_schema(block.images.shape[1:], has_coarse=block.coarse is not None)
    flat = pa.array(np.ascontiguousarray(block.images).reshape(-1))
    storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(block.images.shape[1:])))
    image = pa.ExtensionArray.from_storage(schema.field("image").type, storage)
    coarse = [] if block.coarse is None else [pa.array(block.coarse, pa.int64())]
    columns = [image, pa.array(block.labels, pa.int64()), *coarse, pa.array(block.row_ids, pa.string())]
    return pa.table(columns, schema=schema)


def read_block(table: pa.Table) -> Block:
    """The rows of a table that `build_table` made."""
    coarse = table.column("coarse_label").to_numpy() if "coarse_label" in table.column_names else None
    return Block(images_of(table), table.column("label").to_numpy(), table.column("row_id").to_pylist(), coarse)


def images_of(table: pa.Table) -> np.ndarray:
    """The images of a table as uint8 (N, H, W, C)."""
    shape = table.schema.field("image").type.shape
    chunks = [chunk.to_numpy_ndarray() for chunk in table.column("image").chunks if len(chunk)]
    if not chunks:
        return np.empty((0, *shape), np.uint8)
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def content_sum(block: Block) -> int:
    """Identity of rows, to be summed (modulo 2^256) over the parts of a split.

    It is the sum of a SHA-256 per row, so it does not depend on the order of the rows or on how they are divided into shards.
    """
    pixels = np.ascontiguousarray(block.images).reshape(len(block), int(np.prod(block.images.shape[1:])))
    coarse = np.full(len(block), -1) if block.coarse is None else block.coarse
    labels = np.stack([block.labels, coarse], 1).astype("<i8")
    total = 0
    for row_id, label, row in zip(block.row_ids, labels, pixels, strict=True):
        digest = hashlib.sha256(label.tobytes())
        digest.update(row.data)
        digest.update(row_id.encode())
        total += int.from_bytes(digest.digest(), "big")
    return total % 2**256
