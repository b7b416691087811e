"""Shards: Parquet files of about 64 MB, each written atomically, with a record of its contents.

Row groups are small (about 3 MB), so that readers can read them in any order, and their pages have checksums, so that reading
detects altered bytes.
"""

import base64
import hashlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rcnn.data.hashes import grey_copies, hash_copies
from rcnn.data.manifest import Part, Shard, Skipped
from rcnn.data.schema import Block, build_table, content_sum, table_schema
from rcnn.data.sources.origin import Chunk, bad_row
from rcnn.errors import ClusterError, DataError, RcnnError
from rcnn.storage import Storage

MAX_ROWS_PER_GROUP = 1024
MIN_ROWS_PER_GROUP = 16
BYTES_PER_GROUP = 3 * 2**20
ROWS_PER_SUM = 1024
SECONDS_BEFORE_RETRIES = (
    1.0,
    5.0,
)  # of a shard that the storage did not take: object stores refuse what comes too fast


class ShardRecord(Part):
    """A shard, and the sums over its rows from which the manifest is computed.

    Attributes:
        plan: hash of the requested rows; a shard with another plan is not reused.
        content: see `content_sum`; hexadecimal, since not every JSON reader keeps 256-bit integers.
        pixel_sums, square_sums: over the rows, for each pixel in (H, W, C) order.
        hashes: perceptual hashes of the rows, in order, see `hashes.py`: little-endian uint64 as base64.
    """

    shard: Shard
    plan: str
    rows_per_class: tuple[int, ...]
    content: str
    pixel_sums: tuple[int, ...]
    square_sums: tuple[int, ...]
    hashes: str
    skipped: tuple[Skipped, ...]

    def read_hashes(self) -> np.ndarray:
        """The hashes (N, V) of the rows in V views."""
        found = np.frombuffer(base64.b64decode(self.hashes), "<u8").astype(np.uint64)
        return found.reshape(self.shard.rows, -1) if self.shard.rows else found.reshape(0, 1)


@dataclass(frozen=True)
class ShardJob:
    """Everything that a process needs to write one shard.

    Attributes:
        storage: root of the storage.
        folder: the data set's folder.
        file: the shard's name in that folder.
        record: name of the record's file; written after the shard.
        plan: see `ShardRecord`.
        chunk: the rows.
        num_classes: length of `rows_per_class`.
        skips_bad_rows: whether bad rows are skipped; otherwise the first one is an error.
        shuffle_seed: shuffles the rows; None: keeps the chunk's order.
    """

    storage: str
    folder: str
    file: str
    record: str
    plan: str
    chunk: Chunk
    num_classes: int
    skips_bad_rows: bool
    shuffle_seed: tuple[int, int] | None = None


def write_shard(job: ShardJob) -> ShardRecord | RcnnError:
    """Reads the rows and writes the shard; a storage that fails gets two more chances.

    Errors are returned, so that Ray does not wrap them in its own exceptions.
    """
    for seconds in SECONDS_BEFORE_RETRIES:
        outcome = _write_once(job)
        if not isinstance(outcome, ClusterError):
            return outcome
        time.sleep(seconds)
    return _write_once(job)


def _write_once(job: ShardJob) -> ShardRecord | RcnnError:
    try:
        block, skipped = job.chunk.read()
        if skipped and not job.skips_bad_rows:
            raise bad_row(skipped[0])
        if job.shuffle_seed is not None:
            block = block.take(np.random.default_rng(job.shuffle_seed).permutation(len(block)))
        storage = Storage(job.storage)
        shard = _write(storage, job, block)
        sums, squares = _sums(block)
        record = ShardRecord(
            shard=shard,
            plan=job.plan,
            rows_per_class=tuple(np.bincount(block.labels, minlength=job.num_classes).tolist()),
            content=f"{content_sum(block):064x}",
            pixel_sums=tuple(sums.tolist()),
            square_sums=tuple(squares.tolist()),
            hashes=_look_at(storage, job, block),
            skipped=tuple(skipped),
        )
        storage.write_text(job.record, record.model_dump_json())
        return record
    except RcnnError as error:
        return error


def _look_at(storage: Storage, job: ShardJob, block: Block) -> str:
    """Writes small grey copies of the rows beside the record; returns their hashes as text.

    Held-out rows are hashed in all views: they are looked up among the training rows.
    """
    grey_Nhw = grey_copies(block.images)
    storage.write_bytes(copies_of(job), grey_Nhw.tobytes())
    hashes = hash_copies(grey_Nhw, is_shifted=not job.file.startswith("train/"))
    return base64.b64encode(hashes.astype("<u8").tobytes()).decode()


def copies_of(job: ShardJob) -> str:
    """The file with the grey copies of a shard's rows, uint8 (N, h, w), until the data set is published."""
    return f"{job.record.removesuffix('.json')}.grey"


def written_shard(job: ShardJob) -> ShardRecord | None:
    """The record of a shard that an earlier run finished; None if the shard is missing or has changed."""
    storage = Storage(job.storage)
    try:
        record = ShardRecord.model_validate(storage.read_json(job.record))
        is_sound = (
            record.plan == job.plan
            and storage.exists(copies_of(job))
            and sha256_of(storage, f"{job.folder}/{job.file}") == record.shard.sha256
        )
    except (OSError, ValueError):
        return None
    return record if is_sound else None


def rows_per_group(image_bytes: int) -> int:
    """Rows per row group, for images of `image_bytes` bytes."""
    return int(np.clip(BYTES_PER_GROUP // image_bytes, MIN_ROWS_PER_GROUP, MAX_ROWS_PER_GROUP))


def sha256_of(storage: Storage, name: str) -> str:
    """The SHA-256 of a file's content."""
    with storage.filesystem.open_input_file(storage.path(name)) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(storage: Storage, job: ShardJob, block: Block) -> Shard:
    packed = io.BytesIO()
    pq.write_table(
        build_table(block),
        packed,
        compression="snappy",  # every reader supports it; zstd takes 3 times as long and saves little
        row_group_size=rows_per_group(block.images[:1].nbytes or 1),
        write_page_checksum=True,
    )
    content = packed.getbuffer()
    storage.write_bytes(f"{job.folder}/{job.file}", content)
    return Shard(file=job.file, rows=len(block), num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _sums(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Sum and sum of squares of each pixel over the rows: integers, so the order of addition does not matter."""
    flat = block.images.reshape(len(block), int(np.prod(block.images.shape[1:])))
    sums = np.zeros((2, flat.shape[1]), np.int64)
    for start in range(0, len(flat), ROWS_PER_SUM):
        part = flat[start : start + ROWS_PER_SUM]
        sums[0] += part.sum(0, dtype=np.int64)
        sums[1] += np.square(part, dtype=np.uint16).sum(0, dtype=np.int64)
    return sums[0], sums[1]


def open_shard(storage: Storage, folder: str, shard: Shard, image_shape: Sequence[int]) -> pq.ParquetFile:
    """Opens a shard for reading row groups; page checksums are verified as pages are read.

    Its SHA-256 is not checked, because that means reading all of it; `rcnn data verify` does that.

    Raises:
        DataError: it is missing, or differs from the manifest.
    """
    where = storage.uri(f"{folder}/{shard.file}")
    try:
        stream = storage.filesystem.open_input_file(storage.path(f"{folder}/{shard.file}"))
        if stream.size() != shard.num_bytes:
            raise changed_shard(where, f"it has {stream.size():,} bytes, the manifest says {shard.num_bytes:,}")
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        found = [field for field in file.schema_arrow if field.name in ("image", "label")]
    except (OSError, pa.ArrowException) as error:
        raise unreadable_shard(where, error) from error
    if found != list(table_schema(image_shape))[:2]:
        raise changed_shard(where, f"its columns are {', '.join(map(str, file.schema_arrow.names))}, or of other types")
    if file.metadata.num_rows != shard.rows:
        raise changed_shard(where, f"it has {file.metadata.num_rows:,} rows, the manifest says {shard.rows:,}")
    return file


def read_shard(storage: Storage, folder: str, shard: Shard) -> pa.Table:
    """All rows of a shard, after checking its SHA-256 against the manifest.

    Raises:
        DataError: it is missing, or its checksum differs.
    """
    where = storage.uri(f"{folder}/{shard.file}")
    try:
        with storage.filesystem.open_input_stream(storage.path(f"{folder}/{shard.file}")) as stream:
            content = stream.read()
        found = hashlib.sha256(content).hexdigest()
        if found != shard.sha256:
            raise changed_shard(where, f"its SHA-256 begins {found[:12]}, the manifest says {shard.sha256[:12]}")
        # One thread: `pq.read_table` aborted the process in 3 to 6 of 60 to 80 runs of `rcnn data verify` on a busy machine
        # (pyarrow 25: "terminate called without an active exception"); this aborted in none of 220.
        return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise unreadable_shard(where, error) from error


def changed_shard(where: str, fault: str) -> DataError:
    """The error for a shard that differs from what ingest wrote."""
    return DataError(f"the shard was changed: {fault}", where=where, remedy="Ingest again with --fresh")


def unreadable_shard(where: str, error: Exception) -> DataError:
    """The error for a shard that cannot be read."""
    fault = " ".join(str(error).split())
    return DataError(f"the shard cannot be read ({fault})", where=where, remedy="Ingest again with --fresh")
