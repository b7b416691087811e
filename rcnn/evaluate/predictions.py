"""`predictions.parquet`: what the model answered on each test row. All figures are computed from this file.

In: tables of parts of the test rows, scored by any process in any order. Out: one file with the rows in the data set's order.
It is one file, not a folder of parts: every reader opens it by its name, and a copy of it is complete. Logits are a list of
fixed size, which polars, DuckDB and pandas read without knowing Arrow's extension types.

A part is a fixed range of rows that depends on the data set and on `evaluate.batch_size` only. Its file appears whole, and its
record, with the SHA-256, after it: an interrupted evaluation resumes with the parts that have one.
"""

import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rcnn.data.manifest import Shard
from rcnn.data.shards import sha256_of
from rcnn.errors import ClusterError, DataError
from rcnn.evaluate.paired import Paired
from rcnn.progress import say
from rcnn.storage import StageFolder

PREDICTIONS = "predictions.parquet"
PARTS = "_parts"  # readers of Parquet folders skip names that begin with _
BATCHES_PER_PART = 4  # at the least: 10 parts of 1,024 rows for the 10,000 test rows of CIFAR or MNIST
MOST_PARTS = 256  # with more rows, parts are larger: each costs two files and a request to a worker
ROWS_PER_READ = 65_536
ANSWERS = ("row_id", "label", "predicted", "correct", "loss")
"""The columns that comparing two models needs: some 40 bytes a row, however many classes there are."""
HOW_WRITTEN = {"write_page_checksum": True, "use_dictionary": False}  # nearly every number is there once


@dataclass(frozen=True)
class Part:
    """Neighbouring test rows that are scored by one process: whole batches, except the last batch of the last part."""

    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def file(self) -> str:
        """Its rows of the predictions, in the stage's folder."""
        return f"{PARTS}/part-{self.number:05d}.parquet"

    @property
    def record(self) -> str:
        """Marks the file as complete; written after it."""
        return f"{PARTS}/part-{self.number:05d}.json"


def parts_of(num_rows: int, batch_size: int) -> list[Part]:
    """The parts of a split, the same for any number of workers."""
    length = batch_size * max(BATCHES_PER_PART, math.ceil(num_rows / batch_size / MOST_PARTS))
    starts = range(0, num_rows, length)
    return [Part(number, start, min(start + length, num_rows)) for number, start in enumerate(starts)]


def build_table(row_ids: Sequence[str], labels_N: np.ndarray, logits_NC: np.ndarray, losses_N: np.ndarray) -> pa.Table:
    """Predictions as an Arrow table: the answer is the class with the largest logit, the first one of equals."""
    num_classes = logits_NC.shape[1]
    predicted_N = logits_NC.argmax(1).astype(np.int64)
    columns = {
        "row_id": pa.array(row_ids, pa.string()),
        "label": pa.array(labels_N, pa.int64()),
        "predicted": pa.array(predicted_N),
        "correct": pa.array(predicted_N == labels_N),
        "loss": pa.array(losses_N, pa.float64()),
        "logits": pa.FixedSizeListArray.from_arrays(pa.array(logits_NC.reshape(-1), pa.float32()), num_classes),
    }
    return pa.table(columns)


def write_part(target: StageFolder, part: Part, table: pa.Table) -> None:
    """Writes the predictions of a part, then its record."""
    target.require_held()
    assert len(table) == len(part), f"part {part.number} has {len(part)} rows, and {len(table)} were scored"
    packed = io.BytesIO()
    pq.write_table(table, packed, **HOW_WRITTEN)
    content = packed.getbuffer()
    target.storage.write_bytes(target.path(part.file), content)
    digest = hashlib.sha256(content).hexdigest()
    record = Shard(file=part.file, rows=len(part), num_bytes=len(content), sha256=digest)
    target.storage.write_text(target.path(part.record), record.model_dump_json())


def has_part(target: StageFolder, part: Part) -> bool:
    """Whether an earlier attempt scored this part; a damaged one is named, and does not count."""
    try:
        tree = target.storage.read_json(target.path(part.record))
        if tree is None:
            return False
        record = Shard.model_validate(tree)
        if record.rows == len(part) and sha256_of(target.storage, target.path(part.file)) == record.sha256:
            return True
        fault = "was changed"
    except FileNotFoundError:
        fault = "is missing"
    except (OSError, ValueError):
        fault = "or its record cannot be read"
    say(f"  {target.storage.uri(target.path(part.file))} {fault}: its rows are scored again")
    return False


def merge_parts(target: StageFolder, parts: Iterable[Part]) -> str:
    """Writes `predictions.parquet` from its parts, one of which is in memory at a time; returns its SHA-256.

    Raises:
        ClusterError: a part was changed after it was written.
    """
    target.require_held()
    tables = (_read_part(target, part) for part in parts)
    first = next(tables)
    with (
        target.storage.writing_file(target.path(PREDICTIONS)) as stream,
        pq.ParquetWriter(stream, first.schema, **HOW_WRITTEN) as writer,
    ):
        for table in chain([first], tables):
            writer.write_table(table, row_group_size=len(table))
    return sha256_of(target.storage, target.path(PREDICTIONS))


def _read_part(target: StageFolder, part: Part) -> pa.Table:
    """The table of a part, whose bytes are compared with its record."""
    try:
        record = Shard.model_validate(target.storage.read_json(target.path(part.record)))
        content = target.storage.read_bytes(target.path(part.file))
        if hashlib.sha256(content).hexdigest() == record.sha256:
            return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        fault = "its SHA-256 is not that of its record"
    except (OSError, ValueError) as error:
        fault = " ".join(str(error).split())[:200]
    raise ClusterError(
        f"these predictions were changed after they were written ({fault})",
        where=target.storage.uri(target.path(part.file)),
        remedy="Run the same command again: their rows are scored again, the others are kept",
        retryable=True,
    )


def delete_parts(target: StageFolder) -> None:
    """Deletes what `predictions.parquet` holds as well."""
    target.storage.delete(target.path(PARTS))


def read_predictions(target: StageFolder, columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Some of the columns, as numpy arrays, a few rows at a time.

    Raises:
        DataError: the file is missing or damaged.
    """
    name = target.path(PREDICTIONS)
    with (
        _readable(target.storage.uri(name)),
        target.storage.filesystem.open_input_file(target.storage.path(name)) as stream,
    ):
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        for batch in file.iter_batches(ROWS_PER_READ, columns=list(columns), use_threads=False):
            yield {column: _as_array(batch.column(column)) for column in columns}


def _as_array(column: pa.Array) -> np.ndarray:
    """A column (N), or (N, C) for lists of a fixed size."""
    if pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.flatten().to_numpy().reshape(len(column), -1))
    return np.asarray(column.to_numpy(zero_copy_only=False))


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turns a file that is missing or damaged into an error that the user can fix."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"the predictions cannot be read ({' '.join(str(error).split())[:200]})",
            where=where,
            remedy="Evaluate again with --fresh",
        ) from error


def write_answers(target: StageFolder, file: Path) -> None:
    """Copies the columns `ANSWERS` of the predictions in a stage's folder to a local file.

    Raises:
        DataError: the predictions are missing or damaged.
    """
    place = target.path(PREDICTIONS)
    with _readable(target.storage.uri(place)):
        with target.storage.filesystem.open_input_file(target.storage.path(place)) as stream:
            table = pq.ParquetFile(stream, page_checksum_verification=True).read(list(ANSWERS), use_threads=False)
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def compare(first: Path, second: Path) -> Paired:
    """Counts over the rows of two files of predictions or answers; the order of the rows does not matter.

    Raises:
        DataError: a file is damaged, or they are about different rows.
    """
    ours, theirs = _right_rows(first), _right_rows(second)
    if not ours["row_id"].equals(theirs["row_id"]):
        raise DataError(
            f"these {len(theirs):,} predictions are not about the {len(ours):,} rows of the other model",
            where=str(second),
            remedy="Evaluate both models on the same data set",
        )
    first_N, second_N = (table["correct"].to_numpy() for table in (ours, theirs))
    return Paired(len(ours), int((first_N & ~second_N).sum()), int((second_N & ~first_N).sum()))


def _right_rows(file: Path) -> pa.Table:
    """Ids and whether the answer was right, sorted by id."""
    with _readable(str(file)):
        table = pq.ParquetFile(file, page_checksum_verification=True).read(["row_id", "correct"], use_threads=False)
        return table.sort_by("row_id").combine_chunks()


def first_rows(target: StageFolder, labels: Iterable[int]) -> dict[int, int]:
    """The number of the first row of each of these labels; labels without a row are left out."""
    missing, found, start = set(labels), {}, 0
    for rows in read_predictions(target, ("label",)):
        for label in [label for label in missing if (rows["label"] == label).any()]:
            found[label] = start + int((rows["label"] == label).argmax())
            missing.remove(label)
        if not missing:
            break
        start += len(rows["label"])
    return found
