"""The data sets in a storage: lists them, finds one by name, and verifies one against its manifest."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from pyarrow import fs
from tqdm import tqdm

from rcnn.data.ingest import DRAFT_PREFIX
from rcnn.data.manifest import MANIFEST, OLD_MANIFEST, Manifest, Shard, read_manifest, require_manifest, require_whole
from rcnn.data.schema import content_sum, read_block, table_schema
from rcnn.data.shards import read_shard
from rcnn.errors import ConfigError, DataError
from rcnn.storage import MADE_OF, OLD_RESULT, RESULT, Storage
from rcnn.text import counted

FOLDER = "datasets"
MIN_DIGEST_PREFIX = 4


def list_data_sets(storage: Storage) -> list[dict[str, str]]:
    """A row for each data set, including unfinished and damaged ones."""
    return [_row(storage, name) for name in _names(storage)]


def find_data_set(storage: Storage, wanted: str) -> str:
    """The folder of the data set with this folder name, data set name or digest prefix.

    Raises:
        ConfigError: there is none, or more than one.
    """
    found = [name for name in _names(storage) if not name.startswith(DRAFT_PREFIX) and _is_meant(storage, name, wanted)]
    if len(found) == 1:
        return f"{FOLDER}/{found[0]}"
    if found:
        raise ConfigError(f"{wanted!r} matches {' and '.join(found)}", where="NAME", remedy="Give the folder's name")
    raise ConfigError(
        f"there is no data set {wanted!r}", where=storage.uri(FOLDER), remedy="`rcnn data list` lists them"
    )


def _is_meant(storage: Storage, name: str, wanted: str) -> bool:
    try:
        manifest = read_manifest(storage, f"{FOLDER}/{name}")
    except DataError:  # its manifest is damaged: match the folder's name, with or without the key
        return wanted in (name, name.rpartition("-")[0])
    is_digest = manifest and len(wanted) >= MIN_DIGEST_PREFIX and manifest.digest.startswith(wanted)
    return bool(name == wanted or (manifest and manifest.name == wanted) or is_digest)


def find_faults(storage: Storage, folder: str) -> Iterator[str]:
    """Reads a data set completely and reports each difference from its manifest, as "file: fault"."""
    manifest = require_manifest(storage, folder)
    num_shards = sum(len(split.shards) for split in manifest.splits.values())
    with tqdm(total=num_shards, unit="shard", leave=False, disable=not sys.stderr.isatty()) as bar:
        for name, split in manifest.splits.items():
            content, counts, is_whole = 0, np.zeros(len(manifest.classes), np.int64), True
            for shard in split.shards:
                try:
                    more, of_shard = _check_shard(storage, folder, manifest, shard)
                    content, counts = content + more, counts + of_shard
                except DataError as error:
                    is_whole = False
                    yield f"{error.where}: {error.what}"
                bar.update()
            if is_whole and (f"{content % 2**256:064x}" != split.digest or tuple(counts) != split.rows_per_class):
                yield f"{storage.uri(folder)}: the {name} rows differ from the manifest"
    known = {
        MANIFEST,
        OLD_MANIFEST,
        RESULT,
        OLD_RESULT,
        MADE_OF,
        *([manifest.near_duplicates.file] if manifest.near_duplicates else []),
        *(shard.file for split in manifest.splits.values() for shard in split.shards),
    }
    for file in sorted(set(storage.list_sizes(folder)) - known):
        yield f"{storage.uri(folder)}/{file}: is not in the manifest"


def _check_shard(storage: Storage, folder: str, manifest: Manifest, shard: Shard) -> tuple[int, np.ndarray]:
    """The content sum and the rows of each class, from a shard that matches its manifest.

    Raises:
        DataError: it does not.
    """
    where = storage.uri(f"{folder}/{shard.file}")
    table = read_shard(storage, folder, shard)
    expected = table_schema(manifest.image_shape, has_coarse=bool(manifest.coarse_classes))
    if not table.schema.equals(expected) or len(table) != shard.rows:
        raise DataError(
            f"holds {counted(len(table), 'row')} of {table.schema.names}",
            where=where,
            remedy="Ingest again with --fresh",
        )
    block = read_block(table)
    if block.labels.min(initial=0) < 0 or block.labels.max(initial=0) >= len(manifest.classes):
        raise DataError("has a label that is not a class", where=where, remedy="Ingest again with --fresh")
    return content_sum(block), np.bincount(block.labels, minlength=len(manifest.classes))


def _names(storage: Storage) -> list[str]:
    selector = fs.FileSelector(storage.path(FOLDER), allow_not_found=True)
    with storage.reading(FOLDER):
        infos = storage.filesystem.get_file_info(selector)
    return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)


def _row(storage: Storage, name: str) -> dict[str, str]:
    row: dict[str, Any] = dict.fromkeys(["rows", "classes", "image", "MB", "digest"], "")
    folder = f"{FOLDER}/{name}"
    try:
        manifest = read_manifest(storage, folder)
    except DataError as error:
        return {"folder": name, "data set": "", **row, "state": error.what}
    if manifest is None:
        is_draft = name.startswith(DRAFT_PREFIX) or not storage.is_local  # an object store has no draft folders
        state = "unfinished: the next ingest resumes it" if is_draft else f"damaged: {MANIFEST} is missing"
        return {"folder": name, "data set": "", **row, "state": state}
    state = f"complete; {len(manifest.skipped):,} rows skipped" if manifest.skipped else "complete"
    try:
        require_whole(storage, folder)
    except DataError as error:
        state = f"damaged: {error.where.rpartition('/')[2]}: {error.what}"
    num_bytes = sum(shard.num_bytes for split in manifest.splits.values() for shard in split.shards)
    height, width, channels = manifest.image_shape
    row = {
        "rows": " + ".join(f"{split.rows:,}" for split in manifest.splits.values()),
        "classes": str(len(manifest.classes)),
        "image": f"{height}x{width}x{channels}",
        "MB": f"{num_bytes / 1e6:,.1f}",
        "digest": manifest.digest[:12],
    }
    return {"folder": name, "data set": manifest.name, **row, "state": state}
