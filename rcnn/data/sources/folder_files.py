"""The files of a tree of images, with sizes and times, which show whether the user changed them."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from rcnn.config import DataConfig
from rcnn.data.sources.origin import LEFTOVERS, PARTS, expanded
from rcnn.errors import SourceError


def entries(data: DataConfig) -> Iterator[str]:
    """Files and links below the parts' folders, or where there are none, below all folders: what ingest looks at."""
    if "://" in data.root or not os.path.isdir(expanded(data.root)):
        fault = "is not a local folder" if "://" in data.root else "there is no such folder"
        raise SourceError(fault, where=f"data.root = {data.root}", remedy="Give the folder with train/<class>/*.png")
    root = expanded(data.root)
    within = Path("/") if data.follow_links else root.resolve()
    try:
        yield from _entries_below(root, within, set(), only=PARTS if _has_parts(root) else None)
    except OSError as error:
        raise SourceError(
            f"cannot be listed ({error.strerror})",
            where=str(error.filename or data.root),
            remedy="Check its permissions, and that nothing changes it meanwhile",
        ) from error


def _has_parts(root: Path) -> bool:
    return any(PARTS.get(name.lower()) == "train" for name in os.listdir(root))


def _entries_below(
    folder: Path, within: Path, entered: set[str], *, only: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Each file with its size and time, each link with its target and what is there.

    Args:
        within: links are followed to targets in this folder.
        entered: real paths of the folders that links led to, to which this adds: each is listed once.
        only: names of the folders to list at this level.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = entry.name.lower()
        if entry.name.startswith(".") or name in LEFTOVERS or (only is not None and name not in only):
            continue
        if entry.is_symlink():
            yield from _link_entries(entry, within, entered)
        elif entry.is_dir(follow_symlinks=False):
            yield from _entries_below(Path(entry.path), within, entered)
        elif only is None:
            yield _entry(entry.path, entry.stat(follow_symlinks=False))


def _link_entries(link: "os.DirEntry[str]", within: Path, entered: set[str]) -> Iterator[str]:
    target = os.path.realpath(link.path)
    yield f"{link.path} -> {target}"
    if not Path(target).is_relative_to(within) or target in entered:
        return
    if os.path.isdir(target):
        entered.add(target)
        yield from _entries_below(Path(target), within, entered)
    elif os.path.isfile(target):
        yield _entry(link.path, os.stat(target))


def _entry(path: str, found: os.stat_result) -> str:
    return f"{path} {found.st_size} {found.st_mtime_ns}"
