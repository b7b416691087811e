"""A tree of image files: `train/<class>/*.png`, with or without `val/` and `test/`; or just `<class>/*.png`.

Classes are the folder names (in Unicode's composed form, NFC), in alphabetical order. A row's id is its path below
`data.root`. Every file in a class folder is a row, whatever its name: a file that cannot be read as an image is a bad row, and
`data.on_error` decides whether it is skipped. Only hidden files (.name) and `LEFTOVERS` are ignored.
"""

import os
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from rcnn.config import DataConfig
from rcnn.data.manifest import Skipped, SourceRecord
from rcnn.data.schema import Block
from rcnn.data.sources.decode import (
    ENDINGS,
    FORMATS,
    BadImage,
    ImageRule,
    decode_image,
    find_rule,
    require_header,
    unwarned,
)
from rcnn.data.sources.origin import LEFTOVERS, NUM_FIRST_IMAGES, PARTS, BadRow, Origin, bad_row, expanded
from rcnn.errors import SourceError
from rcnn.progress import say
from rcnn.text import counted, printable

NUM_SHOWN = 3  # names to list in a message

ClassFolders = dict[str, list[Path]]
"""The folders of each class: more than one if their names differ only in their Unicode normalisation."""


@dataclass(frozen=True)
class FileChunk:
    """Image files that become one shard."""

    root: str
    row_ids: list[str]
    labels: np.ndarray
    rule: ImageRule

    @unwarned()
    def read(self) -> tuple[Block, list[Skipped]]:
        """Decodes the files; returns those that cannot be decoded as skipped rows."""
        images = np.empty((len(self.row_ids), *self.rule.image_shape), np.uint8)
        kept: list[int] = []
        skipped: list[Skipped] = []
        for number, row_id in enumerate(self.row_ids):
            try:
                images[len(kept)] = decode_image(Path(self.root, row_id), self.rule)
                kept.append(number)
            except BadImage as error:
                skipped.append(BadRow(row_id=row_id, reason=str(error), remedy=error.remedy))
        row_ids = [self.row_ids[number] for number in kept]
        return Block(images[: len(kept)], self.labels[kept], row_ids), skipped


@dataclass(frozen=True)
class _Tree:
    """The root folder, and whether links are followed out of it."""

    root: Path
    follow_links: bool

    def row_id(self, entry: os.DirEntry[str]) -> str:
        """The path below the root, with links unresolved."""
        return entry.path.removeprefix(self._prefix)

    @cached_property
    def _prefix(self) -> str:
        return os.path.join(self.root, "")


class _Fault(NamedTuple):
    """What is wrong with a file or a folder, and what the user can do about it."""

    reason: str
    remedy: str = "Fix or delete it"


@dataclass
class _Listing:
    """The files of a tree, class by class, and the bad files."""

    tree: _Tree
    data: DataConfig
    bar: "tqdm[object]"
    row_ids: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, list[int]] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)
    encoded_bytes: int = 0


def open_folder(data: DataConfig, downloads: Path) -> Origin:
    """Lists the tree and decodes its first image."""
    tree = _Tree(_existing(data.root), data.follow_links)
    parts = _part_folders(tree)
    classes, class_folders = _classes(tree, parts)
    with tqdm(desc="listing", unit="file", leave=False, disable=not sys.stderr.isatty()) as bar:
        listing = _Listing(tree, data, bar)
        for part, folder in parts.items():
            _list_part(listing, part, folder, [class_folders[part].get(name, []) for name in classes])
    if listing.bad and data.on_error == "fail":
        raise bad_row(listing.bad[0], num_rows=len(listing.bad))
    rule = _rule_of_first(listing)
    row_ids = {part: np.array(names, dtype=object) for part, names in listing.row_ids.items()}
    labels = {part: np.array(numbers, np.int64) for part, numbers in listing.labels.items()}

    def cut(part: str, rows: np.ndarray) -> FileChunk:
        return FileChunk(str(tree.root), row_ids[part][rows].tolist(), labels[part][rows], rule)

    return Origin(
        labels=labels,
        classes=classes,
        image_shape=rule.image_shape,
        record=SourceRecord(name="folder", url=str(tree.root), files={}),
        cut=cut,
        skipped=tuple(listing.bad),
        encoded_bytes=listing.encoded_bytes,
    )


def _existing(text: str) -> Path:
    root = expanded(text) if "://" not in text else Path(text)
    if "://" in text or not os.path.isdir(root):
        fault = "is not a local folder" if "://" in text else "there is no such folder"
        raise SourceError(fault, where=f"data.root = {text}", remedy="Give the folder with train/<class>/*.png")
    return root.resolve()


def _part_folders(tree: _Tree) -> dict[str, Path]:
    """The folder of each part; a root that directly holds the class folders is the training part."""
    folders = {entry.name: entry for entry in _subfolders(tree.root)}
    found: dict[str, Path] = {}
    for name, entry in folders.items():
        part = PARTS.get(name.lower())
        if part in found:
            raise SourceError(
                f"{found[part].name}/ and {name}/ are the same part", where=str(tree.root), remedy="Keep one"
            )
        if part:
            found[part] = _sound_folder(tree, entry)
    if "train" not in found:
        if found or not folders:
            raise SourceError(
                "holds no train/ folder", where=str(tree.root), remedy="Lay it out as train/<class>/*.png"
            )
        return {"train": tree.root}
    if beside := [entry.name for entry in _entries(tree.root) if entry.name.lower() not in PARTS]:
        say(f"  ignoring files and folders beside train/: {_some(beside)}")
    return found


def _classes(tree: _Tree, parts: dict[str, Path]) -> tuple[tuple[str, ...], dict[str, ClassFolders]]:
    """The classes, defined by the training part, and their folders in each part."""
    folders = {part: _class_folders(tree, folder) for part, folder in parts.items()}
    classes = tuple(sorted(folders["train"]))
    if len(classes) < 2:
        raise SourceError(
            f"holds {counted(len(classes), 'class folder')}",
            where=str(parts["train"]),
            remedy="There must be two or more",
        )
    for of_class in folders.values():
        if odd := sorted(of_class.keys() - folders["train"].keys()):
            more = f", nor are {len(odd) - 1:,} other classes" if len(odd) > 1 else ""
            raise SourceError(
                f"the class is not in {parts['train']}{more}",
                where=str(of_class[odd[0]][0]),
                remedy="Add training images of it, or delete it",
            )
    return classes, folders


def _class_folders(tree: _Tree, part: Path) -> ClassFolders:
    """The folders of each class of a part. macOS writes ü as two code points (NFD), others as one (NFC): the same class."""
    folders: ClassFolders = {}
    for entry in _subfolders(part):
        folder = _sound_folder(tree, entry)
        folders.setdefault(unicodedata.normalize("NFC", entry.name), []).append(folder)
    if doubled := [name for name, of_class in folders.items() if len(of_class) > 1]:
        say(f"  merging folders of {part.name}/ that are the same class in NFC and NFD: {_some(doubled)}")
    return folders


def _subfolders(folder: Path) -> list[os.DirEntry[str]]:
    """Folders, links to folders, and broken links, which may have led to a folder."""
    return [entry for entry in _entries(folder) if not _is_file(entry)]


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """The entries of a folder, in alphabetical order, without hidden files and leftovers."""
    try:
        found = [entry for entry in os.scandir(folder) if entry.name[0] != "." and entry.name.lower() not in LEFTOVERS]
    except OSError as error:
        raise SourceError(
            f"cannot be listed ({error.strerror})", where=str(folder), remedy="Check its permissions"
        ) from error
    return sorted(found, key=lambda entry: entry.name)


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file or a link to one. `DirEntry.is_file` would raise on a circular link."""
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file(follow_symlinks=False)


def _sound_folder(tree: _Tree, entry: os.DirEntry[str]) -> Path:
    if fault := _fault_of(tree, entry, "folder"):
        raise SourceError(fault.reason, where=printable(entry.path), remedy=fault.remedy)
    return Path(entry.path)


def _fault_of(tree: _Tree, entry: os.DirEntry[str], kind: Literal["file", "folder"]) -> _Fault | None:
    """Why an entry cannot be used as a file, or a folder, of the tree."""
    if not _is_utf8(entry.path):
        return _Fault("its name is not UTF-8", "Rename it")
    if not entry.is_symlink():
        is_one = entry.is_file(follow_symlinks=False) if kind == "file" else entry.is_dir(follow_symlinks=False)
        return None if is_one else _Fault(f"is not a {kind}, and cannot be read")
    target = os.path.realpath(entry.path)
    leads_to = f"is a link to {printable(target)}"
    if not os.path.exists(target):
        return _Fault(f"{leads_to}, which does not exist")
    found = "folder" if os.path.isdir(target) else "file"
    if not tree.follow_links and not Path(target).is_relative_to(tree.root):
        return _Fault(f"{leads_to}, outside data.root", f"Copy the {found}, or set data.follow_links=true")
    if found == "folder" and Path(os.path.realpath(os.path.dirname(entry.path))).is_relative_to(target):
        return _Fault(f"{leads_to}, which contains the link: it is circular", "Delete it")
    if kind == "file" and found == "folder":
        return _Fault(f"{leads_to}, which is not a file", "Copy the folder, or set data.follow_links=true")
    is_one = os.path.isfile(target) if kind == "file" else found == "folder"
    return None if is_one else _Fault(f"{leads_to}, which is not a {kind}")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _list_part(listing: _Listing, part: str, folder: Path, class_folders: list[list[Path]]) -> None:
    """Lists the files of one part, class by class; refuses a part without images."""
    listing.row_ids[part], listing.labels[part] = [], []
    num_bad = len(listing.bad)
    _list_files_without_class(listing, folder)
    for label, folders in enumerate(class_folders):
        _list_class(listing, part, folders, label)
    if not listing.row_ids[part]:
        raise SourceError(
            f"holds no images{_first_of(listing.bad[num_bad:])}",
            where=str(folder),
            remedy=f"Add {folder.name}/<class>/*.png, or delete the folder",
        )


def _list_files_without_class(listing: _Listing, part: Path) -> None:
    """Files beside the class folders: images are bad rows, because they have no class; other files are ignored and named."""
    files = [entry for entry in _entries(part) if _is_file(entry)]
    for entry in files:
        if _looks_like_image(entry.name):
            _add_bad(listing, entry, _Fault("is not in a class folder", "Move it into one"))
    if others := [entry.name for entry in files if not _looks_like_image(entry.name)]:
        say(f"  ignoring files beside the class folders: {_some(others)}")


def _list_class(listing: _Listing, part: str, folders: list[Path], label: int) -> None:
    """Lists the files of one class in one part; refuses a class without training images."""
    num_rows, num_bad = len(listing.row_ids[part]), len(listing.bad)
    entered = {os.path.realpath(folder) for folder in folders}
    for folder in folders:
        for entry, fault in _files_below(listing.tree, str(folder), entered):
            listing.bar.update()
            fault = fault or _fault_of(listing.tree, entry, "file") or _fault_of_unnamed(entry, listing.data)
            if fault:
                _add_bad(listing, entry, fault)
            else:
                listing.row_ids[part].append(listing.tree.row_id(entry))
                listing.encoded_bytes += entry.stat().st_size
    found = len(listing.row_ids[part]) - num_rows
    if not found and part == "train":
        raise SourceError(
            f"the class has no images{_first_of(listing.bad[num_bad:])}",
            where=str(folders[0]),
            remedy=f"Add some ({', '.join(FORMATS)}), or delete it",
        )
    listing.labels[part] += [label] * found


def _files_below(tree: _Tree, folder: str, entered: set[str]) -> Iterator[tuple[os.DirEntry[str], _Fault | None]]:
    """Files below a folder, recursively, in alphabetical order; folders that cannot be entered, with the reason.

    Args:
        entered: real paths of the folders listed so far, to which this adds: a link can lead to the same folder again.
    """
    for entry in _entries(folder):
        if not _is_folder_to_enter(tree, entry):
            yield entry, None
        elif fault := _fault_of(tree, entry, "folder") if entry.is_symlink() else None:
            yield entry, fault
        elif tree.follow_links and (real := os.path.realpath(entry.path)) in entered:
            yield entry, _Fault(f"leads to {printable(real)}, which this class contains already", "Delete it")
        else:
            entered.update([real] if tree.follow_links else [])
            yield from _files_below(tree, entry.path, entered)


def _is_folder_to_enter(tree: _Tree, entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():
        return tree.follow_links and os.path.isdir(entry.path)
    return entry.is_dir(follow_symlinks=False)


def _fault_of_unnamed(entry: os.DirEntry[str], data: DataConfig) -> _Fault | None:
    """Why a file is not an image. Listing opens only files whose names do not have an image extension."""
    if _looks_like_image(entry.name):
        return None
    try:
        require_header(Path(entry.path), data)
    except BadImage as error:
        return _Fault(str(error), error.remedy)
    return None


def _looks_like_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _add_bad(listing: _Listing, entry: os.DirEntry[str], fault: _Fault) -> None:
    row_id = listing.tree.row_id(entry)
    storable = row_id if _is_utf8(row_id) else printable(row_id)  # the manifest is JSON, which is UTF-8
    listing.bad.append(BadRow(row_id=storable, reason=fault.reason, remedy=fault.remedy))


def _first_of(bad: list[BadRow]) -> str:
    return f" (unusable files: {len(bad):,}, the first {bad[0].row_id}: {bad[0].reason})" if bad else ""


def _some(names: list[str]) -> str:
    """The first names, printable, and the number of the others."""
    more = f" and {len(names) - NUM_SHOWN:,} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(printable(name) for name in names[:NUM_SHOWN]) + more


def _rule_of_first(listing: _Listing) -> ImageRule:
    """The rule, from the first image that can be read."""
    data, faults = listing.data, []
    for row_id in listing.row_ids["train"][:NUM_FIRST_IMAGES]:
        try:
            return find_rule(data, listing.tree.root / row_id)
        except BadImage as error:
            faults.append(BadRow(row_id=row_id, reason=str(error), remedy=error.remedy))
            if data.on_error == "fail":
                raise bad_row(faults[0]) from error
    raise SourceError(
        f"none of the first {len(faults)} images can be read ({faults[0].row_id}: {faults[0].reason})",
        where=f"data.root = {data.root}",
        remedy="Fix or delete them",
    )
