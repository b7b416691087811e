"""Exports a data set in the Hugging Face image layout, which `datasets.load_dataset` reads.

Images are PNG, so pixels are exact. The splits are named train, validation and test.
"""

import io
import json
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from rcnn.data.manifest import Manifest, require_manifest
from rcnn.data.pictures import as_picture
from rcnn.data.schema import Block, read_block
from rcnn.data.shards import read_shard
from rcnn.errors import ConfigError
from rcnn.storage import Storage

SPLITS = {"train": "train", "val": "validation", "test": "test"}
PNG_EFFORT = 1  # zlib's fastest level: small images gain little from higher ones
ROWS_PER_GROUP = 1000


def export_huggingface(storage: Storage, folder: str, target: Path) -> list[str]:
    """Writes `<target>/data/<split>-00000-of-00001.parquet` and so on; returns the file names. The export is atomic.

    Raises:
        ConfigError: the target exists already, or cannot be written.
        DataError: the data set is incomplete or damaged.
    """
    manifest = require_manifest(storage, folder)
    if target.exists():
        raise ConfigError("exists already", where=str(target), remedy="Give a folder that does not exist yet")
    draft = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}.part")
    try:
        (draft / "data").mkdir(parents=True)
        names = _write_splits(storage, folder, manifest, draft / "data")
        draft.rename(target)
    except OSError as error:
        raise ConfigError(
            f"cannot be written ({error.strerror})", where=str(target), remedy="Check permissions and free space"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return [str(target / "data" / name) for name in names]


def _write_splits(storage: Storage, folder: str, manifest: Manifest, target: Path) -> list[str]:
    schema = _schema(manifest)
    names = []
    num_shards = sum(len(split.shards) for split in manifest.splits.values())
    with tqdm(total=num_shards, unit="shard", leave=False, disable=not sys.stderr.isatty()) as bar:
        for split, part in manifest.splits.items():
            for number, shard in enumerate(part.shards):
                block = read_block(read_shard(storage, folder, shard))
                names.append(f"{SPLITS[split]}-{number:05d}-of-{len(part.shards):05d}.parquet")
                pq.write_table(_table(block, schema), target / names[-1], row_group_size=ROWS_PER_GROUP)
                bar.update()
    return names


def _schema(manifest: Manifest) -> pa.Schema:
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(manifest.classes), "_type": "ClassLabel"},
    }
    columns = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    if manifest.coarse_classes:
        features["coarse_label"] = {"names": list(manifest.coarse_classes), "_type": "ClassLabel"}
        columns.append(("coarse_label", pa.int64()))
    features["row_id"] = {"dtype": "string", "_type": "Value"}
    columns.append(("row_id", pa.string()))
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _table(block: Block, schema: pa.Schema) -> pa.Table:
    images = [{"bytes": _png(image), "path": None} for image in block.images]
    columns: list[Any] = [images, block.labels, *([] if block.coarse is None else [block.coarse]), block.row_ids]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def _png(image_HWC: Any) -> bytes:
    stream = io.BytesIO()
    as_picture(image_HWC).save(stream, "PNG", compress_level=PNG_EFFORT)
    return stream.getvalue()
