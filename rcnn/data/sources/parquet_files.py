"""Finds and opens Parquet files: a file, a folder, a glob or a URI in; the files' names, sorted, out."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rcnn.data.sources.origin import expanded
from rcnn.errors import SourceError

ENDINGS = (".parquet", ".pq")  # in any case: some tools export TRAIN.PARQUET
MAX_ENDINGS_IN_MESSAGE = 3
NUM_READERS = 16

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def read_each(read: Callable[[Item], Outcome], items: Iterable[Item]) -> list[Outcome]:
    """What `read` returns for each item, several at a time: on S3, a footer takes 50 ms, nearly all of them spent waiting.

    Raises:
        Exception: the first one that `read` raises, in the order of the items.
    """
    with ThreadPoolExecutor(NUM_READERS, "reader") as pool:
        try:
            return list(pool.map(read, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else all the other files would be read first
            raise


def list_paths(root: str) -> list[tuple[str, fs.FileInfo]]:
    """The Parquet files that a file, folder, glob or URI names: their names below it, sorted, with their file infos.

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
            f"cannot be listed ({_line(error)})",
            where=f"data.root = {root}",
            remedy="Check address and credentials",
            retryable="://" in root,
        ) from error
    found = [(name, info) for name, info in zip(names, below, strict=True) if info.type == fs.FileType.File]
    chosen = sorted(
        (pair for pair in found if _matches(pair[0], pattern) and not _is_hidden(pair[0])), key=lambda pair: pair[0]
    )
    if not chosen:
        raise _nothing_found(root, pattern, [name for name, _ in found])
    return chosen


def local_folder(root: str) -> Path | None:
    """The folder in which external images are looked up, with links resolved; None for a remote root."""
    filesystem, base, _ = _resolved(root)
    if not isinstance(filesystem, fs.LocalFileSystem):
        return None
    path = Path(os.path.realpath(base))
    return path.parent if path.is_file() else path


def open_file(root: str, path: str, name: str) -> pq.ParquetFile:
    """Opens a Parquet file for reading in small pieces.

    Raises:
        SourceError: it cannot be read, or is damaged.
    """
    filesystem = _resolved(root)[0]
    try:
        # Small reads, column by column: a row group can be larger than memory.
        return pq.ParquetFile(
            filesystem.open_input_file(path), buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        )
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last: damaged column names
        raise unreadable(name, root, error) from error


def unreadable(name: str, root: str, error: Exception) -> SourceError:
    """The error for a Parquet file that cannot be read, because of the network or because it is damaged."""
    if "://" in root and isinstance(error, OSError):
        return SourceError(
            f"cannot be read ({_line(error)})",
            where=f"{name} in data.root = {root}",
            remedy="Check the network, and run the same command again: finished work is kept",
            retryable=True,
        )
    return SourceError(
        f"is not a valid Parquet file ({_line(error)})",
        where=f"{name} in data.root = {root}",
        remedy="Write or fetch it again",
    )


def _matches(name: str, pattern: str) -> bool:
    """Whether a path below the root matches the pattern: * and ? match within a folder, ** any number of folders."""
    if not pattern:
        return name.lower().endswith(ENDINGS)
    parts = [
        r"(?:[^/]+/)*" if part == "**" else re.escape(part).replace(r"\*", "[^/]*").replace(r"\?", "[^/]") + "/"
        for part in pattern.split("/")
    ]
    return re.fullmatch("".join(parts).removesuffix("/"), name) is not None


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _nothing_found(root: str, pattern: str, names: list[str]) -> SourceError:
    """The error for a root without Parquet files. Names what it holds instead, often a wrong folder or CSV files."""
    fault = f"there is no Parquet file that matches {pattern!r}" if pattern else "there is no Parquet file"
    return SourceError(
        f"{fault}{_holdings(names)}", where=f"data.root = {root}", remedy="Give a .parquet file, a folder or a glob"
    )


def _holdings(names: list[str]) -> str:
    visible = sorted(name for name in names if not _is_hidden(name))
    endings = Counter(PurePosixPath(name).suffix for name in visible)
    common = endings.most_common(MAX_ENDINGS_IN_MESSAGE)
    counts = [_count(number, f"{ending} file" if ending else "file without an ending") for ending, number in common]
    if others := len(visible) - sum(number for _, number in common):
        counts.append(_count(others, "other"))
    if hidden := sum(_is_hidden(name) and name.lower().endswith(ENDINGS) for name in names):
        counts.append(f"{_count(hidden, 'hidden Parquet file')} (. or _ begins a name)")
    return f", only {', '.join(counts)}" if counts else ""


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun.replace('file', 'files', 1) if 'file' in noun else noun + 's'}"


def _resolved(root: str) -> tuple[Any, str, str]:
    """(filesystem, folder or file in it, glob pattern below that, empty if none)."""
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
            f"cannot be opened ({_line(error)})",
            where=f"data.root = {plain}",
            remedy="Give a folder, or a URI that pyarrow.fs knows, such as s3://bucket/prefix",
        ) from error
    return filesystem, base


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
