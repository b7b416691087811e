"""The images of a Parquet file's rows: encoded bytes in the file, or paths of image files beside it.

A path is resolved relative to the Parquet file's folder, then to `data.root`. The file must be inside `data.root` after
resolving links, so that a data set from an untrusted source cannot read the user's other files.
"""

import errno
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rcnn.config import DataConfig
from rcnn.data.sources.decode import BadImage
from rcnn.data.sources.origin import NUM_FIRST_IMAGES
from rcnn.data.sources.parquet_columns import ImageColumn, ParquetFile, read_footer, shortened
from rcnn.data.sources.parquet_files import list_paths, local_folder, open_file, unreadable
from rcnn.errors import SourceError
from rcnn.progress import say

ROWS_PER_READ = 64  # of encoded images
PATHS_PER_READ = 8192
BYTES_OF_PATHS = 1000  # per row: larger files hold images or other large columns, not just paths
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

Made = TypeVar("Made")


class StoredImage(NamedTuple):
    """An encoded image: its bytes, or the file that the row names, or the reason that there is neither.

    Attributes:
        content: the bytes.
        file: the image file.
        path: the file's path as in the row.
        fault: the reason that there is neither.
    """

    content: bytes | None = None
    file: Path | None = None
    path: str = ""
    fault: BadImage | None = None

    def apply(self, function: Callable[[IO[bytes] | Path], Made]) -> Made:
        """The result of `function` on the image.

        Raises:
            BadImage: there is no image, or the function refuses it; for an external image, the message names its file.
        """
        if self.content is not None:
            return function(io.BytesIO(self.content))
        if self.file is None:
            assert self.fault, "an image without bytes and file has a fault"
            raise self.fault
        try:
            return function(self.file)
        except BadImage as error:
            # Not the absolute path: the reason goes into the manifest, whose digest must not depend on the machine.
            raise BadImage(f"its file {shortened(self.path)!r} {error}", remedy=error.remedy) from error


def read_images(root: str, file: ParquetFile, rows: np.ndarray) -> Iterator[StoredImage]:
    """Yields the images of the given rows, ascending; holds the wanted images of one row group at a time.

    Raises:
        SourceError: the file cannot be read, or is damaged.
    """
    find = _Finder(root, file).find
    with open_file(root, file.path, file.name) as opened:
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        groups = np.unique(np.searchsorted(starts, rows, side="right") - 1).tolist()
        for group in groups:
            wanted = rows[np.searchsorted(rows, starts[group]) : np.searchsorted(rows, starts[group + 1])]
            images = list(_read_group(root, file, opened, group, wanted - starts[group], find))
            if len(images) != len(wanted):
                counts = ValueError(f"{len(images)} of {len(wanted)} images could be read")
                raise unreadable(f"{file.name}, row group {group}", root, counts)
            yield from images


def measure_external(files: Iterable[ParquetFile], labels: dict[str, np.ndarray], data: DataConfig) -> int:
    """The total bytes of all external images, estimated from the first images of each file.

    A file with none of its first images embedded or found is refused, or reported once with `on_error = skip`.

    Raises:
        SourceError: there is such a file, and `on_error` is fail.
    """
    num_bytes = 0
    lost: list[tuple[ParquetFile, int, str]] = []
    for file in files:
        rows = np.flatnonzero(labels[file.name] >= 0)[:NUM_FIRST_IMAGES]
        # By size, not by the footer's null counts: reading damaged ones aborts the process (pyarrow 25 does not catch a C++
        # exception). And reading the first images of each of a thousand large files takes minutes on S3.
        if not file.image.path or len(rows) == 0 or file.num_bytes > BYTES_OF_PATHS * file.num_rows:
            continue
        images = list(read_images(data.root, file, rows))
        sizes = [_size_of(image.file) for image in images if image.file is not None]
        if any(image.content is not None for image in images):
            continue
        if sizes:
            num_bytes += file.num_rows * sum(sizes) // len(sizes)
        else:
            lost.append((file, len(images), f"{file.name}#{rows[0]}: {images[0].fault}"))
    if lost:
        _report_lost(lost, data)
    return num_bytes


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # decoding reports the reason
        return 0


def entries(data: DataConfig) -> Iterator[str]:
    """The Parquet files, and the image files that their rows name, with sizes and times; on S3 there are none of these.

    Raises:
        SourceError: there are none, or the root cannot be opened.
    """
    paths = list_paths(data.root)
    for name, info in paths:
        yield f"{name} {info.size} {info.mtime_ns}"
    yield from external_entries(data, paths)


def external_entries(data: DataConfig, paths: Iterable[tuple[str, fs.FileInfo]]) -> Iterator[str]:
    """The image files that Parquet files name, with sizes and times; none for a remote root.

    A Parquet file that cannot be read is ignored here: ingest reports it.
    """
    if local_folder(data.root) is None:
        return
    for name, info in paths:
        with suppress(SourceError, OSError, pa.ArrowException):
            file = read_footer(data, name, info)
            if file.image.path:
                yield from _entries_of(data.root, file)


def _entries_of(root: str, file: ParquetFile) -> Iterator[str]:
    """The entries of one Parquet file; none if images are embedded and the first paths lead nowhere, as is usual then."""
    finder = _Finder(root, file)
    texts = _all_paths(root, file)
    first = list(islice(texts, NUM_FIRST_IMAGES))
    if file.image.content and not any(map(finder.state_of, first)):
        return
    for text in chain(first, texts):
        yield f"{text} {finder.state_of(text)}"


def _all_paths(root: str, file: ParquetFile) -> Iterator[str]:
    with open_file(root, file.path, file.name) as opened:
        for batch in opened.iter_batches(PATHS_PER_READ, columns=[file.image.path]):
            # As bytes: a text column can hold invalid UTF-8.
            for text in _values(batch, file.image, file.image.path).cast(pa.large_binary()).to_pylist():
                if text:
                    yield os.fsdecode(text)


def _report_lost(lost: list[tuple[ParquetFile, int, str]], data: DataConfig) -> None:
    """Reports all files without images in one line, or refuses them."""
    (file, num_seen, fault), *others = lost
    more = f", nor of {len(others)} more files" if others else ""
    what = f"none of its first {num_seen} images is embedded or found{more} ({fault})"
    if data.on_error == "skip":
        say(f"  {file.name}: {what}")
        return
    raise SourceError(
        what,
        where=f"{file.name} in data.root = {data.root}",
        remedy="Put the image files into data.root, or write Parquet files that hold the images' bytes",
    )


def _read_group(
    root: str,
    file: ParquetFile,
    opened: pq.ParquetFile,
    group: int,
    rows: np.ndarray,
    find: Callable[[pa.Scalar], StoredImage],
) -> Iterator[StoredImage]:
    start = 0
    leaves = [leaf for leaf in (file.image.content, file.image.path) if leaf]
    try:
        for batch in opened.iter_batches(ROWS_PER_READ, row_groups=[group], columns=leaves):
            chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + len(batch))] - start
            contents, paths = (_values(batch, file.image, leaf) for leaf in (file.image.content, file.image.path))
            for row in chosen.tolist():
                content = contents[row].as_py()
                yield find(paths[row]) if content is None else StoredImage(content)
            start += len(batch)
            if start > rows[-1]:
                return
    except (OSError, pa.ArrowException) as error:
        raise unreadable(f"{file.name}, row group {group}", root, error) from error


def _values(batch: pa.RecordBatch, image: ImageColumn, leaf: str) -> pa.Array:
    """The image column's bytes or paths in a batch; nulls if it has none.

    Looked up by name, because a column that is itself named `image.bytes` is read along with the field `bytes` of `image`.
    """
    if not leaf:
        return pa.nulls(len(batch))
    column = batch.column(batch.schema.get_field_index(image.name))
    return column if leaf == image.name else column.field(leaf.removeprefix(f"{image.name}."))


class _Finder:
    """Resolves the paths in the rows of one Parquet file."""

    def __init__(self, root: str, file: ParquetFile):
        self._image = file.image
        folder = local_folder(root)
        self._folders = () if folder is None else (os.path.dirname(file.path), str(folder))
        self._inside = f"{folder}".rstrip("/") + "/"

    def find(self, path: pa.Scalar) -> StoredImage:
        """The image file that a row without bytes names, or the reason that there is none."""
        name = self._image.name
        in_struct = self._image.path != name
        try:
            text = path.as_py()
        except UnicodeDecodeError:
            return StoredImage(fault=BadImage(f"{name} is not embedded, and its path is not UTF-8"))
        if not text:
            is_plain = name in (self._image.content, self._image.path)
            return StoredImage(fault=BadImage(f"{name} is null" if is_plain else f"{name}.bytes is null"))
        file, why = self._look_up(text)
        its_path = "its bytes are null and its path" if in_struct else "the path"
        fault = f"{name} is not embedded: {its_path} {shortened(text)!r} {why}"
        if file is None:
            return StoredImage(fault=BadImage(fault, remedy="Put the file into data.root"))
        return StoredImage(file=file, path=text)

    def state_of(self, text: str) -> str:
        """Size and time of the file that a path leads to, inside the root or not; empty if it does not exist."""
        for folder in self._folders:
            with suppress(OSError, ValueError):
                state = os.stat(os.path.join(folder, text))
                return f"{state.st_size} {state.st_mtime_ns}"
        return ""

    def _look_up(self, text: str) -> tuple[Path | None, str]:
        if not self._folders:
            return None, "cannot be followed, because data.root is remote"
        if "://" in text:
            return None, "is a URL"
        why = "does not exist"
        for folder in self._folders:
            try:
                real = os.path.realpath(os.path.join(folder, text))
                if not f"{real}/".startswith(self._inside):
                    why = "leads outside data.root"
                elif stat.S_ISREG(os.stat(real).st_mode):
                    return Path(real), ""
                else:
                    why = "is not a file"
            except ValueError:  # it contains a NUL
                return None, "cannot be a path"
            except OSError as error:
                if error.errno not in NOT_THERE:
                    return Path(real), ""  # opening it finds out whether a retry can succeed
        return None, why
