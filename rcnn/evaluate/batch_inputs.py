"""What batch prediction reads: Parquet files or image files in, parts of some thousand rows out.

    pixels     fixed_shape_tensor or fixed_size_list of uint8 (H, W, C), as `rcnn ingest` writes them
    encoded    struct<bytes: binary, path: string>, as Hugging Face stores images, binary, or paths as text
    files      image files below a folder, of a glob, or one

A row's id is its `row_id`, if its file has such a column, or else the file's path below the input and the row's number in it
(`a/b.parquet#17`); of an image file it is the path below the input. A part has whole row groups, unless a group is large: a
Parquet reader has to read a group from its start, so a group is cut into at most `MOST_SLICES`.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa

from rcnn.data.sources.decode import ENDINGS, BadImage, ImageRule, decode_image, unwarned
from rcnn.data.sources.parquet_columns import IMAGE_COLUMNS, ImageColumn, LabelColumn, ParquetFile
from rcnn.data.sources.parquet_files import list_paths, open_file, read_each, unreadable
from rcnn.data.sources.parquet_images import read_images
from rcnn.errors import ConfigError, DataError, SourceError
from rcnn.evaluate.image_files import find_images

ROWS_PER_PART = 8192
MOST_SLICES = 16
ROWS_PER_READ = 128
ID_COLUMN = "row_id"
NO_LABEL = LabelColumn("", "nothing", "")

Kind = Literal["parquet", "images"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Rows:
    """Some rows: ids and uint8 pixels (N, H, W, C) of the good ones; the id and the fault of each bad one."""

    ids: Sequence[str]
    images: np.ndarray
    bad: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class ParquetRows:
    """Neighbouring rows of a Parquet file.

    Attributes:
        root: the input.
        file: the file, with its column of encoded images; of a file with pixels, that column has no leaves.
        has_ids: whether it has the column `row_id`.
        start, stop: row numbers in the file.
    """

    root: str
    file: ParquetFile
    has_ids: bool
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ImageFiles:
    """Image files, by path; `root` is what their ids are relative to, if they are below it."""

    root: str
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)


Piece = ParquetRows | ImageFiles


@dataclass(frozen=True)
class BatchPart:
    """The rows of one output file."""

    number: int
    pieces: tuple[Piece, ...]

    def __len__(self) -> int:
        return sum(map(len, self.pieces))


@dataclass(frozen=True)
class Inputs:
    """The files of an input.

    Attributes:
        source: the input as the user gave it, a local one as an absolute path.
        kind: what its files are.
        digest: changes if a file is added, removed, renamed or written.
        files: of Parquet: name below the source and pyarrow's file info.
    """

    source: str
    kind: Kind
    digest: str
    files: Sequence[Any] = field(repr=False)


def find_inputs(source: str) -> Inputs:
    """Lists the files of an input, without opening one.

    Raises:
        ConfigError: it does not exist, or holds neither Parquet nor other files.
        SourceError: it cannot be listed.
    """
    is_remote = "://" in source
    if not is_remote:
        source = os.path.abspath(os.path.expanduser(source))
    try:
        with _of_input():
            found = list_paths(source)
    except SourceError:
        if is_remote:
            raise
        return _image_inputs(source)
    if not is_remote and any(name.lower().endswith(ENDINGS) for name, _ in found):  # of a glob
        return _image_inputs(source)
    return Inputs(source, "parquet", _digest(f"{name} {info.size} {info.mtime_ns}" for name, info in found), found)


def _image_inputs(source: str) -> Inputs:
    try:
        files = find_images([source])
    except ConfigError as error:
        fault = "no Parquet file and no image file found"
        raise ConfigError(fault, where=source, remedy="Give Parquet files or images: a file, folder or glob") from error
    if files == [Path(source)] and not os.path.lexists(source):
        raise ConfigError("does not exist", where=source, remedy="Give Parquet files or images: a file, folder or glob")
    return Inputs(source, "images", _digest(f"{file} {_state(file)}" for file in files), files)


def _state(file: Path) -> str:
    try:
        found = file.stat()
    except OSError:  # decoding reports the reason
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def _digest(entries: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(os.fsencode(entry) + b"\n")
    return digest.hexdigest()


@contextmanager
def _of_input() -> Iterator[None]:
    """The readers of Parquet sources call their root `data.root`; here it is the input."""
    try:
        yield
    except SourceError as error:
        where = error.where.replace("data.root = ", "")
        raise SourceError(error.what, where=where, remedy=error.remedy, retryable=error.retryable) from error


def plan_parts(inputs: Inputs, image_shape: tuple[int, int, int], *, image_column: str = "") -> list[BatchPart]:
    """The parts of an input, the same each time.

    Args:
        inputs: see `find_inputs`.
        image_shape: (H, W, C) that the model takes; pixels must have it, other images are resized.
        image_column: the column of images; empty: `image` or `img`.

    Raises:
        DataError: a Parquet file has no such column, or pixels of another shape.
        SourceError: a file cannot be read, or is damaged.
    """
    if inputs.kind == "images":
        pieces: Iterable[Piece] = (
            ImageFiles(inputs.source, tuple(map(str, files))) for files in _tuples(inputs.files, ROWS_PER_PART)
        )
    else:

        def read(pair: tuple[str, Any]) -> list[ParquetRows]:
            return _pieces_of(inputs.source, *pair, image_shape, image_column)

        with _of_input():
            pieces = [piece for of_file in read_each(read, inputs.files) for piece in of_file]
    return [BatchPart(number, tuple(part)) for number, part in enumerate(_grouped(pieces))]


def _grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists with as few as possible, but at least `ROWS_PER_PART` rows; the last one may have fewer."""
    group: list[Piece] = []
    for piece in pieces:
        if len(piece):
            group.append(piece)
        if sum(map(len, group)) >= ROWS_PER_PART:
            yield group
            group = []
    if group:
        yield group


def _pieces_of(
    root: str, name: str, info: Any, image_shape: tuple[int, int, int], image_column: str
) -> list[ParquetRows]:
    """The row groups of a file, the large ones in slices."""
    with open_file(root, info.path, name) as opened:
        schema, footer = opened.schema_arrow, opened.metadata
        column = _image_column(schema, image_column, image_shape, f"{name} in {root}")
        file = ParquetFile(info.path, name, info.size, footer.num_rows, column, NO_LABEL)
        sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    has_ids = ID_COLUMN in schema.names and _is_text(schema.field(ID_COLUMN).type)
    pieces: list[ParquetRows] = []
    first = 0
    for size in sizes:
        length = max(ROWS_PER_PART, -(-size // MOST_SLICES))
        for start in range(0, size, length):
            stop = min(start + length, size)
            if pieces and len(pieces[-1]) + stop - start <= ROWS_PER_PART:
                pieces[-1] = replace(pieces[-1], stop=first + stop)
            else:
                pieces.append(ParquetRows(root, file, has_ids, first + start, first + stop))
        first += size
    return pieces


def _image_column(schema: pa.Schema, chosen: str, image_shape: tuple[int, int, int], place: str) -> ImageColumn:
    """The column of images, with the Parquet paths of its encoded bytes and of its paths; of pixels, with neither."""
    name = next((name for name in ([chosen] if chosen else IMAGE_COLUMNS) if name in schema.names), None)
    if name is None:
        wanted = repr(chosen) if chosen else " or ".join(map(repr, IMAGE_COLUMNS))
        raise DataError(
            f"has no column {wanted}, only {', '.join(schema.names[:10]) or 'none'}",
            where=place,
            remedy="Name the column of images with --set data.image_column=NAME",
        )
    kind = schema.field(name).type
    if isinstance(kind, pa.FixedShapeTensorType) or pa.types.is_fixed_size_list(kind):
        _require_shape(kind, name, image_shape, place)
        return ImageColumn(name, "", "")
    leaves = _leaves(name, kind)
    if leaves is None:
        raise DataError(
            f"column {name!r} is {str(kind)[:100]}",
            where=place,
            remedy="Images are pixels (uint8 of a fixed shape), struct<bytes: binary, path: string>, binary, or paths as text",
        )
    return ImageColumn(name, *leaves)


def _require_shape(kind: pa.DataType, name: str, image_shape: tuple[int, int, int], place: str) -> None:
    is_tensor = isinstance(kind, pa.FixedShapeTensorType)
    found = tuple(kind.shape) if is_tensor else (kind.list_size,)
    wanted = image_shape if is_tensor else (int(np.prod(image_shape)),)
    if found != wanted or kind.value_type != pa.uint8():
        raise DataError(
            f"column {name!r} has {kind.value_type} of the shape {found}, and the model takes uint8 of {image_shape}",
            where=place,
            remedy="Choose a model that was trained on such images, or give encoded images, which are resized",
        )


def _leaves(name: str, kind: pa.DataType) -> tuple[str, str] | None:
    """The Parquet paths of bytes and of paths, empty if absent; None if the column cannot hold images."""
    if not pa.types.is_struct(kind):
        return (name, "") if _is_binary(kind) else ("", name) if _is_text(kind) else None
    kinds = {child.name: child.type for child in kind}
    content, path = (kinds.get(key, pa.null()) for key in ("bytes", "path"))
    if not _is_binary(content) and not _is_text(path):
        return None
    return f"{name}.bytes" if _is_binary(content) else "", f"{name}.path" if _is_text(path) else ""


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def read_rows(piece: ParquetRows, rule: ImageRule) -> Iterator[Rows]:
    """The rows of a piece, `ROWS_PER_READ` at a time at the most.

    Raises:
        SourceError: the file was changed or removed since the parts were planned, or is damaged.
    """
    is_encoded = piece.file.image.content or piece.file.image.path
    with _of_input():
        yield from _encoded_rows(piece, rule) if is_encoded else _pixel_rows(piece, rule)


def _pixel_rows(piece: ParquetRows, rule: ImageRule) -> Iterator[Rows]:
    name = piece.file.image.name
    columns = [name, ID_COLUMN] if piece.has_ids else [name]
    for first, batch in _batches(piece, columns):
        column = batch.column(batch.schema.get_field_index(name))
        pixels = column.storage if isinstance(column, pa.ExtensionArray) else column
        # None is null: pyarrow refuses to read lists of a fixed size with a null among them.
        images = (
            pixels.flatten().to_numpy().reshape(len(batch), *rule.image_shape).copy()
        )  # torch takes no read-only memory
        yield Rows(_ids(piece, batch, first), images)


@unwarned()
def _encoded_rows(piece: ParquetRows, rule: ImageRule) -> Iterator[Rows]:
    numbers = np.arange(piece.start, piece.stop)
    stored = zip(_all_ids(piece), read_images(piece.root, piece.file, numbers), strict=True)
    decode = partial(decode_image, rule=rule)
    for some in _tuples(stored, ROWS_PER_READ):
        ids, images, bad = [], [], []
        for row_id, image in some:
            try:
                images.append(image.apply(decode))
                ids.append(row_id)
            except BadImage as error:
                bad.append((row_id, str(error)))
        yield Rows(ids, np.stack(images) if images else np.empty((0, *rule.image_shape), np.uint8), bad)


def _all_ids(piece: ParquetRows) -> Iterator[str]:
    if not piece.has_ids:
        yield from (f"{piece.file.name}#{row}" for row in range(piece.start, piece.stop))
        return
    for first, batch in _batches(piece, [ID_COLUMN]):
        yield from _ids(piece, batch, first)


def _ids(piece: ParquetRows, batch: pa.RecordBatch, first: int) -> list[str]:
    """The ids of rows of which the first has the number `first` in the file; a row whose id is null is named by its place."""
    places = [f"{piece.file.name}#{first + row}" for row in range(len(batch))]
    if not piece.has_ids:
        return places
    found = batch.column(batch.schema.get_field_index(ID_COLUMN)).to_pylist()
    return [place if row_id is None else row_id for row_id, place in zip(found, places, strict=True)]


def _batches(piece: ParquetRows, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The piece's rows in small batches, each with the number of its first row in the file."""
    file = piece.file
    with open_file(piece.root, file.path, file.name) as opened:
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        if starts[-1] < piece.stop:
            raise unreadable(
                file.name, piece.root, ValueError(f"it has {starts[-1]:,} rows now, and had {file.num_rows:,}")
            )
        groups = [
            group
            for group, size in enumerate(sizes)
            if starts[group] < piece.stop and starts[group] + size > piece.start
        ]
        first = int(starts[groups[0]])
        try:
            for batch in opened.iter_batches(
                ROWS_PER_READ, row_groups=groups, columns=list(columns), use_threads=False
            ):
                start, stop = max(piece.start - first, 0), min(piece.stop - first, len(batch))
                if start < stop:
                    yield first + start, batch.slice(start, stop - start)
                first += len(batch)
                if first >= piece.stop:
                    return
        except (OSError, pa.ArrowException) as error:
            raise unreadable(file.name, piece.root, error) from error


def _tuples(items: Iterable[Item], length: int) -> Iterator[tuple[Item, ...]]:
    """`itertools.batched`, which Python 3.11 lacks."""
    rest = iter(items)
    while some := tuple(islice(rest, length)):
        yield some
