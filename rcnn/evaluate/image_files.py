"""The image files that a person names: files, folders or globs in, paths out. Imports no torch: listing needs none."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rcnn.errors import ConfigError


def find_images(arguments: Sequence[str]) -> list[Path]:
    """The files that arguments name: files as they are, folders with all below them, globs. Hidden files are ignored.

    A folder that cannot be searched is included, so that it is reported like an unreadable file.

    Raises:
        ConfigError: a folder or a glob holds no file.
    """
    found: list[Path] = []
    for argument in arguments:
        files = _files_of(argument)
        if not files:
            raise ConfigError(
                "no image files found", where=argument or "''", remedy="Give image files, folders or globs"
            )
        found += files
    return found


def _files_of(argument: str) -> list[Path]:
    if not argument:
        return []
    if os.path.isdir(argument):
        return sorted(_files_below(argument))
    if glob.has_magic(argument) and not os.path.lexists(argument):
        return [file for name in sorted(glob.iglob(argument, recursive=True)) for file in _matched(argument, name)]
    return [Path(argument)]


def _matched(pattern: str, name: str) -> list[Path]:
    """The files of a glob's match: a folder gives all files below it, unless `**` has matched them already."""
    if os.path.isdir(name):
        return [] if "**" in pattern else sorted(_files_below(name))
    return [Path(name)]


def _files_below(folder: str) -> Iterator[Path]:
    unsearched: list[str] = []
    for below, folders, files in os.walk(folder, onerror=lambda error: unsearched.append(error.filename)):
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (Path(below, name) for name in files if name[0] != ".")
        yield from (
            Path(below, name) for name in folders if os.path.islink(Path(below, name))
        )  # it may lead in circles
    yield from map(Path, unsearched)
