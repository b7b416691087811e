"""The ingest stage: a source in, a folder of Parquet shards with a manifest out.

Which row is for training, validation or testing is decided here, by seed, and never changes later. Everything is
written to a draft folder that is renamed when whole: a data set is there with its manifest, or not at all.
"""

import hashlib
import shutil
import uuid
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from rcnn.config import PipelineConfig
from rcnn.data.manifest import MANIFEST, Manifest, Shard, Split
from rcnn.data.schema import SCHEMA_VERSION, build_table
from rcnn.data.sources import Images, read_source
from rcnn.errors import DataError
from rcnn.progress import say
from rcnn.results import IngestResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import Tracker

ROWS_PER_GROUP = 1024  # readers fetch row groups whole: small ones let them take up anywhere


def run_ingest(config: PipelineConfig, target: StageFolder, tracker: Tracker) -> IngestResult:
    """Writes the data set that `config.data` names.

    Raises:
        SourceError: the origin is missing, unreachable or altered.
        DataError: the origin cannot be split as asked.
        ClusterError: the storage cannot be written.
    """
    images = read_source(config.data, _downloads(target.storage))
    splits = split_rows(images, config)
    manifest = _publish(target, images, splits, config.data.shard_megabytes)
    tracker.log_params({"source": config.data.source, "digest": manifest.digest})
    tracker.log_metrics({f"rows/{name}": split.rows for name, split in manifest.splits.items()})
    return IngestResult(
        folder=target.name,
        digest=manifest.digest,
        test_digest=manifest.splits["test"].digest,
        source=config.data.source,
        rows={name: split.rows for name, split in manifest.splits.items()},
    )


def _downloads(storage: Storage) -> Path:
    """Where fetched files stay: in the storage, or where that is no folder, in the user's cache."""
    return storage.local_path("downloads") if storage.is_local else Path.home() / ".cache" / "rcnn" / "downloads"


def split_rows(images: Images, config: PipelineConfig) -> dict[str, tuple[str, np.ndarray]]:
    """For each split its part of the source and the row numbers in it, ascending; each class keeps its share.

    Raises:
        DataError: a split would have no rows.
    """
    data = config.data
    labels_N = images.arrays["train"][1]
    rng = np.random.default_rng(data.split_seed)
    rows = np.arange(len(labels_N))
    splits: dict[str, tuple[str, np.ndarray]] = {}
    if "test" in images.arrays:
        splits["test"] = ("test", np.arange(len(images.arrays["test"][1])))
    else:
        rows, held_out = _hold_out(rows, labels_N, data.test_fraction, rng)
        splits["test"] = ("train", held_out)
    rows, held_out = _hold_out(rows, labels_N, data.val_fraction, rng)
    splits = {"train": ("train", rows), "val": ("train", held_out), **splits}
    for name, (_, chosen) in splits.items():
        if len(chosen) == 0:
            raise DataError(
                f"the {name} split of {data.source} would have no rows (of {len(labels_N)})",
                where=f"data.val_fraction = {data.val_fraction}, data.test_fraction = {data.test_fraction}",
                remedy="Raise the fraction, or bring more images",
            )
    return splits


def _hold_out(
    rows: np.ndarray, labels_N: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Parts `rows` in two, the second with `fraction` of each class, drawn at random; both ascending."""
    held_out = []
    for label in np.unique(labels_N[rows]):
        of_class = rows[labels_N[rows] == label]
        held_out.append(rng.permutation(of_class)[: round(fraction * len(of_class))])
    second = np.sort(np.concatenate(held_out))
    return np.setdiff1d(rows, second), second


def _publish(
    target: StageFolder, images: Images, splits: dict[str, tuple[str, np.ndarray]], shard_megabytes: int
) -> Manifest:
    """Writes shards and manifest to a draft folder, then moves it to its place."""
    storage = target.storage
    draft = f"datasets/.draft-{uuid.uuid4().hex[:12]}" if storage.is_local else target.name
    try:
        written = {
            name: _write_split(storage, draft, name, *_select(images, part, rows), len(images.classes), shard_megabytes)
            for name, (part, rows) in splits.items()
        }
        manifest = _describe(images, splits["train"][1], written)
        storage.write_json(f"{draft}/{MANIFEST}", manifest.model_dump(mode="json"))
    except BaseException:
        storage.delete(draft)
        raise
    if storage.is_local:
        _move_into_place(target, draft)
    return manifest


def _move_into_place(target: StageFolder, draft: str) -> None:
    whole, place = target.storage.local_path(draft), target.storage.local_path(target.name)
    if not target.replaces and (place / MANIFEST).exists():
        shutil.rmtree(whole)  # another ingest of the same data set was faster, and its content is the same
        return
    with target.storage.writing(target.name):
        if place.exists():
            shutil.rmtree(place)
        whole.rename(place)


def _select(images: Images, part: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    pixels, labels = images.arrays[part]
    return pixels[rows], labels[rows], [f"{part}/{row}" for row in rows]


def _write_split(
    storage: Storage,
    folder: str,
    name: str,
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    row_ids: list[str],
    num_classes: int,
    shard_megabytes: int,
) -> Split:
    rows_per_shard = max(ROWS_PER_GROUP, shard_megabytes * 1_000_000 // images_NHWC[0].nbytes)
    shards: list[Shard] = []
    storage.make_folder(f"{folder}/{name}")
    for start in range(0, len(labels_N), rows_per_shard):
        part = slice(start, start + rows_per_shard)
        file = f"{name}/{name}-{len(shards):05d}.parquet"
        table = build_table(images_NHWC[part], labels_N[part], row_ids[part])
        path = storage.path(f"{folder}/{file}")
        with storage.writing(f"{folder}/{file}"), storage.filesystem.open_output_stream(path) as stream:
            pq.write_table(table, stream, compression="zstd", row_group_size=ROWS_PER_GROUP)
        shards.append(Shard(file=file, rows=len(table), sha256=_sha256(storage, f"{folder}/{file}")))
        say(f"  {name}: {start + len(table):,} of {len(labels_N):,} rows in {file}")
    counts = np.bincount(labels_N, minlength=num_classes)
    return Split(
        rows=len(labels_N),
        rows_per_class=tuple(int(count) for count in counts),
        shards=tuple(shards),
        digest=_digest_of_rows(images_NHWC, labels_N, row_ids),
    )


def _digest_of_rows(images_NHWC: np.ndarray, labels_N: np.ndarray, row_ids: list[str]) -> str:
    """Identity of a split: of its content, not of how Parquet packed it."""
    digest = hashlib.sha256(np.ascontiguousarray(images_NHWC).tobytes())
    digest.update(np.ascontiguousarray(labels_N, np.int64).tobytes())
    digest.update("\n".join(row_ids).encode())
    return digest.hexdigest()


def _sha256(storage: Storage, name: str) -> str:
    with storage.filesystem.open_input_file(storage.path(name)) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _describe(images: Images, train_rows: np.ndarray, splits: dict[str, Split]) -> Manifest:
    train_NHWC = images.arrays["train"][0][train_rows]
    mean_HWC = train_NHWC.mean(axis=0, dtype=np.float64)
    mean_of_squares_HWC = np.mean(np.square(train_NHWC, dtype=np.float32), axis=0, dtype=np.float64)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        source=images.record,
        classes=images.classes,
        image_shape=train_NHWC.shape[1:],
        splits=splits,
        pixel_mean=tuple(np.round(mean_HWC.ravel(), 4).tolist()),
        pixel_std=round(float(np.sqrt((mean_of_squares_HWC - mean_HWC**2).mean())), 4),
    ).with_digest()
