"""The manifest: what a data set holds, written last, so that a data set without one does not exist.

Its digest is the data set's identity everywhere: cache keys, MLflow inputs, registry tags.
"""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rcnn.data.schema import SCHEMA_VERSION
from rcnn.errors import DataError
from rcnn.storage import Storage

MANIFEST = "manifest.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Part):
    """One Parquet file."""

    file: str
    rows: int
    sha256: str


class Split(_Part):
    """The rows of train, validation or test, and how many each class has."""

    rows: int
    rows_per_class: tuple[int, ...]
    shards: tuple[Shard, ...]
    digest: str
    """SHA-256 over pixels, labels and row ids: the same rows have the same one, however they are packed."""


class SourceRecord(_Part):
    """Where the images came from: an address, and a checksum per file that was read."""

    name: str
    url: str
    files: dict[str, str]


class Manifest(_Part):
    """A whole data set. Images are uint8 of `image_shape` (H, W, C)."""

    schema_version: int
    source: SourceRecord
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    splits: dict[str, Split]
    pixel_mean: tuple[float, ...]
    """Mean of each pixel over the training rows, in (H, W, C) order, 0 to 255."""
    pixel_std: float
    """Standard deviation of all pixels about that mean."""
    digest: str = ""

    def with_digest(self) -> "Manifest":
        """A copy that carries the digest of everything in it."""
        content = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True)
        return self.model_copy(update={"digest": hashlib.sha256(content.encode()).hexdigest()})


def read_manifest(storage: Storage, folder: str) -> Manifest | None:
    """The manifest of the data set in `folder`, or None where the data set is not there, or not whole.

    Raises:
        DataError: the manifest is of a newer schema, or damaged.
    """
    name = f"{folder}/{MANIFEST}"
    try:
        tree: Any = storage.read_json(name)
    except ValueError as error:
        raise _damaged(storage.uri(name), f"no JSON ({error})") from error
    if tree is None:
        return None
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise DataError(
            f"schema_version is {version}, and this rcnn reads up to {SCHEMA_VERSION}",
            where=storage.uri(name),
            remedy="Upgrade rcnn, or ingest the data set again with --fresh",
        )
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(storage.uri(name), f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if manifest.with_digest().digest != manifest.digest:
        raise _damaged(storage.uri(name), "its content does not match its digest")
    return manifest


def _damaged(where: str, fault: str) -> DataError:
    return DataError(f"the manifest is damaged: {fault}", where=where, remedy="Ingest again with --fresh")
