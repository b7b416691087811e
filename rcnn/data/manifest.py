"""The manifest: what a data set holds. It is written last, so a folder without a manifest is not a data set.

Its digest is the data set's identity everywhere: cache keys, MLflow inputs, registry tags.
"""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rcnn.config import PipelineConfig
from rcnn.data.schema import SCHEMA_VERSION
from rcnn.errors import DataError
from rcnn.results import IngestResult
from rcnn.storage import StageFolder, Storage

MANIFEST = "_manifest.json"
"""Its name begins with _, so that readers of a folder of Parquet files skip it."""
OLD_MANIFEST = "manifest.json"  # until version 0.1; still read


class Part(BaseModel):
    """Base of all parts of a manifest: frozen, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(Part):
    """One Parquet file."""

    file: str
    rows: int
    num_bytes: int
    sha256: str


class Split(Part):
    """The training, validation or test rows, and how many of them each class has."""

    rows: int
    rows_per_class: tuple[int, ...]
    shards: tuple[Shard, ...]
    digest: str
    """Identity of pixels, labels and row ids: equal rows have equal digests, however they are divided into shards."""


class SourceRecord(Part):
    """Where the images came from: an address, and a checksum for each file that was read."""

    name: str
    url: str
    files: dict[str, str]


class Skipped(Part):
    """A row of the source that is not in the data set, and why."""

    row_id: str
    reason: str


class NearDuplicate(Part):
    """Two rows of different splits that show the same picture, see `duplicates.py`."""

    split: str
    row_id: str
    label: int
    other_split: str
    other_row_id: str
    other_label: int
    difference: float
    """Mean absolute difference of the pixels in grey levels, after shift, mirroring and brightness are taken out."""
    correlation: float


class NearDuplicates(Part):
    """How many rows of one split show the same picture as a row of another. Counts by pair of splits, e.g. `test-train`."""

    file: str
    """In the data set's folder: all pairs, the most alike first."""
    pairs: dict[str, int]
    rows: dict[str, int]
    """Rows of the first split that are in such a pair."""
    other_label: int
    """Pairs whose labels differ."""
    first: tuple[NearDuplicate, ...]


class Manifest(Part):
    """A complete data set. Images are uint8 of `image_shape` (H, W, C)."""

    schema_version: int
    name: str
    source: SourceRecord
    classes: tuple[str, ...]
    coarse_classes: tuple[str, ...]
    """Names of the coarse labels; empty if there are none."""
    image_shape: tuple[int, int, int]
    splits: dict[str, Split]
    skipped: tuple[Skipped, ...]
    pixel_mean: tuple[float, ...]
    """Mean of each pixel over the training rows, in (H, W, C) order, 0 to 255."""
    pixel_std: float
    """Standard deviation of all pixels about that mean."""
    channel_std: tuple[float, ...]
    """Standard deviation of each channel about the channel's own mean."""
    near_duplicates: NearDuplicates | None = None
    """None: ingested before rcnn looked for them. It follows from the rows, so the digest, their identity, leaves it out."""
    digest: str = ""

    @property
    def image_bytes(self) -> int:
        """Bytes of one image in memory."""
        height, width, channels = self.image_shape
        return height * width * channels

    def summary(self) -> dict[str, Any]:
        """A short description for trackers, without the long lists."""
        return {
            "name": self.name,
            "digest": self.digest,
            "source": self.source.model_dump(exclude={"files"}),
            "image_shape": list(self.image_shape),
            "classes": len(self.classes),
            "skipped": len(self.skipped),
            "rows": {name: split.rows for name, split in self.splits.items()},
            "split_digests": {name: split.digest for name, split in self.splits.items()},
        }

    def with_digest(self) -> "Manifest":
        """A copy with `digest` set to the hash of all other fields but `near_duplicates`."""
        content = json.dumps(self.model_dump(mode="json", exclude={"digest", "near_duplicates"}), sort_keys=True)
        return self.model_copy(update={"digest": hashlib.sha256(content.encode()).hexdigest()})


def read_manifest(storage: Storage, folder: str) -> Manifest | None:
    """The manifest of the data set in `folder`, or None if the data set is missing or incomplete.

    Raises:
        DataError: the manifest is of another schema, or damaged.
    """
    for name in (f"{folder}/{MANIFEST}", f"{folder}/{OLD_MANIFEST}"):
        if (tree := _read_tree(storage, name)) is not None:
            return _parse(tree, storage.uri(name))
    return None


def _read_tree(storage: Storage, name: str) -> Any:
    try:
        return storage.read_json(name)
    except ValueError as error:
        raise _damaged(storage.uri(name), f"not JSON ({error})") from error
    except OSError as error:
        raise _damaged(storage.uri(name), f"cannot be read ({' '.join(str(error).split())})") from error


def _parse(tree: Any, where: str) -> Manifest:
    if not isinstance(tree, dict):
        raise _damaged(where, f"holds a {type(tree).__name__}, not a table")
    version = tree.get("schema_version")
    if isinstance(version, int) and version != SCHEMA_VERSION:
        remedy = "Upgrade rcnn, or ingest" if version > SCHEMA_VERSION else "Ingest"
        raise DataError(
            f"schema_version is {version}, and this rcnn reads {SCHEMA_VERSION}",
            where=where,
            remedy=f"{remedy} the data set again with --fresh",
        )
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(where, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if manifest.with_digest().digest != manifest.digest:
        raise _damaged(where, "its content does not match its digest")
    return manifest


def require_manifest(storage: Storage, folder: str) -> Manifest:
    """The manifest of a data set that must exist.

    Raises:
        DataError: it does not.
    """
    manifest = read_manifest(storage, folder)
    if manifest is None:
        raise DataError(
            "the data set is missing or incomplete", where=storage.uri(folder), remedy="Run `rcnn ingest` first"
        )
    return manifest


def require_whole(storage: Storage, folder: str, *, digest: str = "") -> Manifest:
    """The manifest of a data set, after checking that every shard exists with its size: one listing, no shard is read.

    Args:
        storage: where the data set is.
        folder: its folder.
        digest: digest of the data set that earlier stages read; empty: any.

    Raises:
        DataError: it is missing, damaged, or not the data set that earlier stages read.
    """
    manifest = require_manifest(storage, folder)
    if digest and manifest.digest != digest:
        raise DataError(
            f"the data set was replaced: its digest is {manifest.digest[:12]}, and ingest wrote {digest[:12]}",
            where=storage.uri(folder),
            remedy="Ingest again with --fresh",
        )
    sizes = storage.list_sizes(folder)
    for split in manifest.splits.values():
        for shard in split.shards:
            if (found := sizes.get(shard.file)) != shard.num_bytes:
                fault = "is missing" if found is None else f"has {found:,} bytes, the manifest says {shard.num_bytes:,}"
                where = storage.uri(f"{folder}/{shard.file}")
                raise DataError(f"the shard {fault}", where=where, remedy="Ingest again with --fresh")
    return manifest


def is_as_ingested(config: PipelineConfig, data: IngestResult, target: StageFolder) -> bool:
    """Always True: a data set that differs from what ingest wrote is an error, since a rerun of ingest would not fix it.

    Raises:
        DataError: it is damaged, or was replaced.
    """
    require_whole(target.storage, data.folder, digest=data.digest)
    return True


def _damaged(where: str, fault: str) -> DataError:
    return DataError(f"the manifest is damaged: {fault}", where=where, remedy="Ingest again with --fresh")
