"""Parquet files in the layout that Hugging Face gives image data sets, local, a glob, or on S3.

    image (or img): struct<bytes: binary, path: string>      label (or labels, fine_label): integer
    schema metadata "huggingface": {"info": {"features": {"label": {"names": [...]}}}}

Which part a file belongs to is said by a word in its path: train, val (valid, validation, dev) or test. A row's id is its
file's path below the root, and its number in it.
"""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rcnn.config import DataConfig
from rcnn.data.manifest import Skipped, SourceRecord
from rcnn.data.schema import Block
from rcnn.data.sources.decode import BadImage, ImageRule, decode_image, find_rule, unwarned
from rcnn.data.sources.origin import NUM_FIRST_IMAGES, PARTS, Origin, bad_row, expanded
from rcnn.errors import SourceError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
ROWS_PER_READ = 64
BLOCK_ROWS = 1024
BLOCKS_PER_SHARD = 32


@dataclass(frozen=True)
class ParquetFile:
    """One file, from its footer."""

    path: str
    name: str
    """The path below the root."""
    num_bytes: int
    image_column: str
    label_column: str
    classes: tuple[str, ...]
    """Names in the schema's metadata, or empty."""


@dataclass(frozen=True)
class ParquetChunk:
    """Rows of some files that become one shard: for each file the row numbers, ascending, and their labels."""

    root: str
    picks: list[tuple[ParquetFile, np.ndarray, np.ndarray]]
    rule: ImageRule

    @unwarned()
    def read(self) -> tuple[Block, list[Skipped]]:
        """Decodes the rows; those that cannot be are left out and named."""
        count = sum(len(rows) for _, rows, _ in self.picks)
        images = np.empty((count, *self.rule.image_shape), np.uint8)
        labels: list[int] = []
        row_ids: list[str] = []
        skipped: list[Skipped] = []
        for file, rows, file_labels in self.picks:
            encoded = _read_rows(self.root, file, rows)
            for row, label, content in zip(rows.tolist(), file_labels.tolist(), encoded, strict=True):
                try:
                    images[len(labels)] = decode_image(_stream(content), self.rule)
                except BadImage as error:
                    skipped.append(Skipped(row_id=f"{file.name}#{row}", reason=str(error)))
                    continue
                labels.append(label)
                row_ids.append(f"{file.name}#{row}")
        return Block(images[: len(labels)], np.array(labels, np.int64), row_ids), skipped


def open_parquet(data: DataConfig, downloads: Path) -> Origin:
    """Reads footers and labels, and the first image."""
    files = _list_files(data.root)
    classes = next((file.classes for file in files if file.classes), ())
    _require_same_classes(files, classes, data.root)
    labels, faults = _read_labels(files, data, classes)
    num_classes = len(classes) or 1 + max(int(numbers.max(initial=-1)) for numbers in labels.values())
    parts = {part: [file for file in files if _part_of(file.name) == part] for part in ("train", "val", "test")}
    if not parts["train"]:
        raise SourceError(
            "holds no training file", where=f"data.root = {data.root}", remedy="Name it train-....parquet"
        )
    rule = _rule_of_first(parts["train"], labels, data)
    # A part's row numbers count the good rows of its files, one after the other.
    good = {file.name: np.flatnonzero(labels[file.name] >= 0) for file in files}
    first = {part: np.cumsum([0, *(len(good[file.name]) for file in of)]) for part, of in parts.items()}

    def cut(part: str, rows: np.ndarray) -> ParquetChunk:
        rows = np.sort(rows)
        picks = []
        for file, start, stop in zip(parts[part], first[part][:-1], first[part][1:], strict=True):
            chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
            if len(chosen):
                in_file = good[file.name][chosen]
                picks.append((file, in_file, labels[file.name][in_file]))
        return ParquetChunk(data.root, picks, rule)

    return Origin(
        labels={
            part: np.concatenate([labels[file.name][good[file.name]] for file in of])
            for part, of in parts.items()
            if of
        },
        classes=classes or tuple(str(label) for label in range(num_classes)),
        image_shape=rule.image_shape,
        record=SourceRecord(
            name="parquet", url=data.root, files={file.name: f"bytes:{file.num_bytes}" for file in files}
        ),
        cut=cut,
        skipped=tuple(faults),
        encoded_bytes=sum(file.num_bytes for file in files),
        block_rows=_block_rows(rule, data),
    )


def _block_rows(rule: ImageRule, data: DataConfig) -> int:
    """Neighbours that stay together: as many as are well read at once, and few enough that a shard mixes 32 places."""
    rows_per_shard = data.shard_megabytes * 1_000_000 // int(np.prod(rule.image_shape))
    return max(1, min(BLOCK_ROWS, rows_per_shard // BLOCKS_PER_SHARD))


def list_paths(root: str) -> list[tuple[str, fs.FileInfo]]:
    """The Parquet files that a file, folder, glob or URI names: their names below it, in order.

    Raises:
        SourceError: there are none, or the root cannot be opened.
    """
    filesystem, base, pattern = _resolved(root)
    try:
        info = filesystem.get_file_info(base)
        if info.type == fs.FileType.File:
            return [(info.base_name, info)]
        below = filesystem.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
        names = [info.path.removeprefix(base.rstrip("/") + "/") for info in below]
    except UnicodeError as error:
        raise SourceError(
            "the name of a file in it is not UTF-8", where=f"data.root = {root}", remedy="Rename it"
        ) from error
    except (OSError, pa.ArrowInvalid) as error:
        raise SourceError(
            f"cannot be listed ({' '.join(str(error).split())})",
            where=f"data.root = {root}",
            remedy="Check address and credentials",
            retryable="://" in root,
        ) from error
    found = [(name, info) for name, info in zip(names, below, strict=True) if info.type == fs.FileType.File]
    chosen = sorted(
        (pair for pair in found if _matches(pair[0], pattern or "**/*.parquet") and not _is_hidden(pair[0])),
        key=lambda pair: pair[0],
    )
    if not chosen:
        raise SourceError(
            "there is no Parquet file", where=f"data.root = {root}", remedy="Give a .parquet file, a folder or a glob"
        )
    return chosen


def _matches(name: str, pattern: str) -> bool:
    """Whether a path below the root is meant: * and ? stay within a folder, ** goes through any number of them."""
    parts = [
        r"(?:[^/]+/)*" if part == "**" else re.escape(part).replace(r"\*", "[^/]*").replace(r"\?", "[^/]") + "/"
        for part in pattern.split("/")
    ]
    return re.fullmatch("".join(parts).removesuffix("/"), name) is not None


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _resolved(root: str) -> tuple[Any, str, str]:
    """(filesystem, folder or file in it, pattern below that; empty for none)."""
    plain, mark, query = root.partition("?") if "://" in root else (root, "", "")
    pattern = ""
    if wild := re.search(r"[*?]", plain):
        before, slash, _ = plain[: wild.start()].rpartition("/")
        pattern = plain[len(before + slash) :]
        plain = before or ("/" if slash else ".")
    filesystem, base = _filesystem(plain + mark + query)
    return filesystem, base, pattern


@cache
def _filesystem(plain: str) -> tuple[Any, str]:
    if "://" not in plain:
        return fs.LocalFileSystem(), str(expanded(plain))
    try:
        filesystem, base = fs.FileSystem.from_uri(plain)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"cannot be opened ({' '.join(str(error).split())})",
            where=f"data.root = {plain}",
            remedy="Give a folder, or a URI that pyarrow.fs knows, such as s3://bucket/prefix",
        ) from error
    return filesystem, base


def _list_files(root: str) -> list[ParquetFile]:
    return [_read_footer(root, name, info) for name, info in list_paths(root)]


def _open(root: str, path: str, name: str) -> pq.ParquetFile:
    filesystem = _resolved(root)[0]
    try:
        # Column by column in small reads: a row group may be larger than the memory.
        return pq.ParquetFile(
            filesystem.open_input_file(path), buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        )
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(name, root, error) from error


def _unreadable(name: str, root: str, error: Exception) -> SourceError:
    if "://" in root and isinstance(error, OSError):
        return SourceError(
            f"cannot be read ({' '.join(str(error).split())})",
            where=f"{name} in data.root = {root}",
            remedy="Check the network, and run the same command again: what is finished is kept",
            retryable=True,
        )
    return SourceError(
        f"is no sound Parquet file ({' '.join(str(error).split())})",
        where=f"{name} in data.root = {root}",
        remedy="Write or fetch it again",
    )


def _read_footer(root: str, name: str, info: fs.FileInfo) -> ParquetFile:
    with _open(root, info.path, name) as file:
        schema = file.schema_arrow
    image, label = (_column(schema, names, name) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
    kind = schema.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0 or not _is_binary(kind.field("bytes").type):
        raise SourceError(
            f"column {image!r} is {kind}", where=name, remedy="It must be struct<bytes: binary, path: string>"
        )
    if not pa.types.is_integer(schema.field(label).type):
        raise SourceError(f"column {label!r} is {schema.field(label).type}", where=name, remedy="It must be int64")
    return ParquetFile(info.path, name, info.size, image, label, _class_names(schema, label, name))


def _is_binary(kind: pa.DataType) -> bool:
    return any(of(kind) for of in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _column(schema: pa.Schema, names: tuple[str, ...], file: str) -> str:
    for name in names:
        if schema.names.count(name) > 1:
            raise SourceError(f"has the column {name!r} twice", where=file, remedy="Rename one of them")
        if name in schema.names:
            return name
    raise SourceError(
        f"has no column {' or '.join(map(repr, names))}, only {', '.join(schema.names)}",
        where=file,
        remedy="Rename the column that holds it",
    )


def _class_names(schema: pa.Schema, label: str, file: str) -> tuple[str, ...]:
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return ()
    try:
        names = json.loads(text)["info"]["features"][label].get("names", [])
        if not isinstance(names, list) or len({str(name) for name in names}) < len(names):
            raise ValueError(f"names are {names!r}, no list of different names")
        return tuple(str(name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"its metadata 'huggingface' does not tell what {label!r} is ({type(error).__name__}: {error})",
            where=file,
            remedy="Remove the metadata, or write it as the datasets library does",
        ) from error


def _require_same_classes(files: list[ParquetFile], classes: tuple[str, ...], root: str) -> None:
    named = [file for file in files if file.classes]
    for file in named:
        if file.classes != classes:
            number, ours, theirs = next(
                (number, ours, theirs)
                for number, (ours, theirs) in enumerate(zip_longest(file.classes, classes))
                if ours != theirs
            )
            raise SourceError(
                f"its class {number} is {ours!r}, and {theirs!r} in {named[0].name}",
                where=f"{file.name} in data.root = {root}",
                remedy="Give all files the same names in the same order",
            )
    if len(classes) == 1:
        raise SourceError("names one class", where=f"data.root = {root}", remedy="There must be two or more")


def _part_of(name: str) -> str:
    """The part that a file's path names; the last word that does decides."""
    for word in reversed(re.split(r"[^a-z]+", name.lower())):
        if word in PARTS:
            return PARTS[word]
    return "train"


def _read_labels(
    files: list[ParquetFile], data: DataConfig, classes: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], list[Skipped]]:
    """Each file's labels, -1 where a row has none that can be, and these rows."""
    labels, faults = {}, []
    for file in files:
        with _open(data.root, file.path, file.name) as opened:
            try:
                column = opened.read(columns=[file.label_column]).column(0)
            except (OSError, pa.ArrowException) as error:
                raise _unreadable(file.name, data.root, error) from error
            _require_whole(opened, column, file, data.root)
        is_null = column.is_null().to_numpy()
        numbers = column.fill_null(0).to_numpy()
        is_wrong = is_null | (numbers < 0) | (numbers >= (len(classes) or 2**63))
        for row in np.flatnonzero(is_wrong).tolist():
            found = "null" if is_null[row] else str(numbers[row])
            bound = f"0 to {len(classes) - 1}" if classes else "0 or above"
            faults.append(
                Skipped(row_id=f"{file.name}#{row}", reason=f"{file.label_column} is {found}, and must be {bound}")
            )
        labels[file.name] = np.where(is_wrong, -1, numbers.astype(np.int64))
    if faults and data.on_error == "fail":
        raise bad_row(faults[0])
    if not any((numbers >= 0).any() for numbers in labels.values()):
        fault = f"no row has a label that can be ({faults[0].row_id}: {faults[0].reason})" if faults else "has no rows"
        raise SourceError(fault, where=f"data.root = {data.root}", remedy="Give files with labelled images")
    if not classes:
        _require_dense(labels, data.root)
    return labels, faults


def _require_whole(opened: pq.ParquetFile, column: pa.ChunkedArray, file: ParquetFile, root: str) -> None:
    """A damaged footer may count its rows in several ways."""
    footer = opened.metadata
    in_groups = sum(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    if not len(column) == footer.num_rows == in_groups:
        counts = f"its footer counts {footer.num_rows} rows, {in_groups} in row groups, {len(column)} labels"
        raise _unreadable(file.name, root, ValueError(counts))


def _require_dense(labels: dict[str, np.ndarray], root: str) -> None:
    """Labels without names count from 0: a gap means that they are something else."""
    found = np.unique(np.concatenate(list(labels.values())))
    found = found[found >= 0]
    if len(found) < 2 or found[-1] != len(found) - 1:
        missing = np.setdiff1d(np.arange(len(found) + 1), found)[0]
        raise SourceError(
            f"no row has the label {missing}, and the largest is {int(found[-1]) if len(found) else 'none'}",
            where=f"data.root = {root}",
            remedy="Number the classes from 0, or name them in the schema's metadata",
        )


def _rule_of_first(files: list[ParquetFile], labels: dict[str, np.ndarray], data: DataConfig) -> ImageRule:
    faults: list[Skipped] = []
    for file in files:
        rows = np.flatnonzero(labels[file.name] >= 0)[:NUM_FIRST_IMAGES]
        for row, content in zip(rows.tolist(), _read_rows(data.root, file, rows), strict=True):
            try:
                return find_rule(data, _stream(content))
            except BadImage as error:
                faults.append(Skipped(row_id=f"{file.name}#{row}", reason=str(error)))
                if data.on_error == "fail":
                    raise bad_row(faults[0]) from error
    fault = (
        f"none of {len(faults)} images can be read ({faults[0].row_id}: {faults[0].reason})" if faults else "no rows"
    )
    raise SourceError(f"its training part: {fault}", where=f"data.root = {data.root}", remedy="Mend or delete them")


def _read_rows(root: str, file: ParquetFile, rows: np.ndarray) -> Iterator[bytes | None]:
    """The encoded images of some rows, ascending; not more than a few are in memory at a time."""
    with _open(root, file.path, file.name) as opened:
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        groups = np.unique(np.searchsorted(starts, rows, side="right") - 1).tolist()
        for group in groups:
            wanted = rows[np.searchsorted(rows, starts[group]) : np.searchsorted(rows, starts[group + 1])]
            contents = list(_read_group(root, file, opened, group, wanted - starts[group]))
            if len(contents) != len(wanted):
                counts = ValueError(f"{len(contents)} of {len(wanted)} images could be read")
                raise _unreadable(f"{file.name}, row group {group}", root, counts)
            yield from contents


def _read_group(
    root: str, file: ParquetFile, opened: pq.ParquetFile, group: int, rows: np.ndarray
) -> Iterator[bytes | None]:
    start = 0
    try:
        for batch in opened.iter_batches(ROWS_PER_READ, row_groups=[group], columns=[f"{file.image_column}.bytes"]):
            chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + len(batch))] - start
            contents = batch.column(0).field("bytes")
            yield from (contents[row].as_py() for row in chosen.tolist())
            start += len(batch)
            if start > rows[-1]:
                return
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(f"{file.name}, row group {group}", root, error) from error


def _stream(content: bytes | None) -> io.BytesIO:
    if content is None:
        raise BadImage("image.bytes is null")
    return io.BytesIO(content)
