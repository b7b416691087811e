"""The Parquet schema of every data set, written here once.

A row is one image: uint8 pixels of one fixed shape (H, W, C), a label, and an id that names the row in its source.
`fixed_shape_tensor` is Arrow's own extension type: a reader that does not know it sees a plain list of uint8.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 1


def table_schema(image_shape: Sequence[int]) -> pa.Schema:
    """The schema for images of shape (H, W, C)."""
    image = pa.fixed_shape_tensor(pa.uint8(), list(image_shape), dim_names=["H", "W", "C"])
    return pa.schema([("image", image), ("label", pa.int64()), ("row_id", pa.string())])


def build_table(images_NHWC: np.ndarray, labels_N: np.ndarray, row_ids: Sequence[str]) -> pa.Table:
    """A table of uint8 images (N, H, W, C), int64 labels (N) and N row ids."""
    schema = table_schema(images_NHWC.shape[1:])
    flat = pa.array(np.ascontiguousarray(images_NHWC).reshape(-1))
    storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(images_NHWC.shape[1:])))
    image = pa.ExtensionArray.from_storage(schema.field("image").type, storage)
    return pa.table([image, pa.array(labels_N, pa.int64()), pa.array(row_ids, pa.string())], schema=schema)


def images_of(table: pa.Table) -> np.ndarray:
    """The images of a table as uint8 (N, H, W, C)."""
    shape = table.schema.field("image").type.shape
    if len(table) == 0:
        return np.empty((0, *shape), np.uint8)
    return np.concatenate([chunk.to_numpy_ndarray() for chunk in table.column("image").chunks])
