"""A tree of image files: `train/<class>/*.png`, with or without `val/` and `test/`; or just `<class>/*.png`.

Classes are the folders' names, in alphabetical order. A row's id is its path below `data.root`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from rcnn.config import DataConfig
from rcnn.data.manifest import Skipped, SourceRecord
from rcnn.data.schema import Block
from rcnn.data.sources.decode import ENDINGS, BadImage, ImageRule, decode_image, find_rule, unwarned
from rcnn.data.sources.origin import NUM_FIRST_IMAGES, PARTS, Origin, bad_row, expanded
from rcnn.errors import SourceError
from rcnn.progress import say


@dataclass(frozen=True)
class FileChunk:
    """Image files that become one shard."""

    root: str
    row_ids: list[str]
    labels: np.ndarray
    rule: ImageRule

    @unwarned()
    def read(self) -> tuple[Block, list[Skipped]]:
        """Decodes the files; those that cannot be are left out and named."""
        images = np.empty((len(self.row_ids), *self.rule.image_shape), np.uint8)
        kept: list[int] = []
        skipped: list[Skipped] = []
        for number, row_id in enumerate(self.row_ids):
            try:
                images[len(kept)] = decode_image(Path(self.root, row_id), self.rule)
                kept.append(number)
            except BadImage as error:
                skipped.append(Skipped(row_id=row_id, reason=str(error)))
        row_ids = [self.row_ids[number] for number in kept]
        return Block(images[: len(kept)], self.labels[kept], row_ids), skipped


@dataclass
class _Listing:
    """The files of a tree, class by class, and what was found wrong with some."""

    root: Path
    row_ids: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, list[int]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    encoded_bytes: int = 0
    others: list[str] = field(default_factory=list)
    """Files that do not look like images."""


def open_folder(data: DataConfig, downloads: Path) -> Origin:
    """Lists the tree and reads the header of its first image."""
    root = _existing(data.root)
    folders = _part_folders(root)
    classes = _classes(root, folders)
    listing = _Listing(root)
    for part, folder in folders.items():
        listing.row_ids[part], listing.labels[part] = [], []
        listing.others += [os.path.relpath(entry.path, root) for entry in _entries(folder) if entry.is_file()]
        for label, name in enumerate(classes):
            _list_class(listing, part, folder / name, label)
    if listing.others:
        first = _printable(listing.others[0])
        say(f"  {len(listing.others):,} files stay out, since they are no images or in no class: {first}, ...")
    rule = _rule_of_first(data, listing)
    row_ids = {part: np.array(names, dtype=object) for part, names in listing.row_ids.items()}
    labels = {part: np.array(numbers, np.int64) for part, numbers in listing.labels.items()}

    def cut(part: str, rows: np.ndarray) -> FileChunk:
        return FileChunk(str(root), row_ids[part][rows].tolist(), labels[part][rows], rule)

    return Origin(
        labels=labels,
        classes=classes,
        image_shape=rule.image_shape,
        record=SourceRecord(name="folder", url=str(root), files={}),
        cut=cut,
        skipped=tuple(listing.skipped),
        encoded_bytes=listing.encoded_bytes,
    )


def _existing(text: str) -> Path:
    root = expanded(text) if "://" not in text else Path(text)
    if "://" in text or not os.path.isdir(root):
        fault = "is no local folder" if "://" in text else "there is no such folder"
        raise SourceError(fault, where=f"data.root = {text}", remedy="Give the folder with train/<class>/*.png")
    return root.resolve()


def _part_folders(root: Path) -> dict[str, Path]:
    """The folder of each part; a root that holds the classes itself is all training rows."""
    folders = {entry.name: entry for entry in _subfolders(root)}
    found: dict[str, Path] = {}
    for name, entry in folders.items():
        part = PARTS.get(name.lower())
        if part in found:
            raise SourceError(f"{found[part].name}/ and {name}/ are one part", where=str(root), remedy="Keep one")
        if part:
            found[part] = _folder_within(root, entry)
    if "train" not in found:
        if found or not folders:
            raise SourceError("holds no train/ folder", where=str(root), remedy="Lay it out as train/<class>/*.png")
        return {"train": root}
    if ignored := [name for name in folders if name.lower() not in PARTS]:
        say(f"  {len(ignored)} folders beside train/ stay out: {ignored[0]}/, ...")
    return found


def _classes(root: Path, folders: dict[str, Path]) -> tuple[str, ...]:
    """The classes, which are the same in every part."""
    of_part = {
        part: {_folder_within(root, entry).name for entry in _subfolders(folder)} for part, folder in folders.items()
    }
    classes = of_part["train"]
    if len(classes) < 2:
        raise SourceError(
            f"holds {len(classes)} class folder(s)", where=str(folders["train"]), remedy="There must be two or more"
        )
    for part, names in of_part.items():
        if names != classes:
            odd = min(names ^ classes)
            where = folders[part if odd in names else "train"] / odd
            missing = folders["train" if odd in names else part]
            raise SourceError(
                f"the class is not in {missing}", where=str(where), remedy="Give every part the same class folders"
            )
    return tuple(sorted(classes))


def _subfolders(folder: Path) -> list[os.DirEntry[str]]:
    """Folders, links to folders, and links to nothing: a folder may have been there."""
    return [entry for entry in _entries(folder) if not os.path.isfile(entry.path)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, in alphabetical order; hidden files are left out."""
    try:
        return sorted((entry for entry in os.scandir(folder) if entry.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise SourceError(
            f"cannot be listed ({error.strerror})", where=str(folder), remedy="Check its permissions"
        ) from error


def _folder_within(root: Path, entry: os.DirEntry[str]) -> Path:
    if fault := _fault_of_entry(root, entry, "folder"):
        raise SourceError(fault, where=_printable(entry.path), remedy="Mend or delete it")
    return Path(entry.path)


def _list_class(listing: _Listing, part: str, folder: Path, label: int) -> None:
    before, skipped_before = len(listing.row_ids[part]), len(listing.skipped)
    for entry in _files_below(folder):
        row_id = os.path.relpath(entry.path, listing.root)
        if Path(entry.name).suffix.lower() not in ENDINGS and not os.path.isdir(entry.path):
            listing.others.append(_printable(row_id))
        elif fault := _fault_of_entry(listing.root, entry, "file"):
            listing.skipped.append(Skipped(row_id=_printable(row_id), reason=fault))
        else:
            listing.row_ids[part].append(row_id)
            listing.encoded_bytes += entry.stat().st_size
    found = len(listing.row_ids[part]) - before
    if not found and len(listing.skipped) == skipped_before:
        raise SourceError(
            "the class has no images",
            where=str(folder),
            remedy=f"Add some ({', '.join(sorted(ENDINGS))}), or delete it",
        )
    listing.labels[part] += [label] * found


def _files_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Files in alphabetical order, those of folders below included; links to folders are not followed."""
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry.path))
        else:
            yield entry


def _fault_of_entry(root: Path, entry: os.DirEntry[str], kind: Literal["file", "folder"]) -> str:
    """Why an entry cannot be taken for a file, or a folder, of the root."""
    if entry.path != _printable(entry.path):
        return "its name is not UTF-8: rename it"
    is_one = os.path.isfile(entry.path) if kind == "file" else os.path.isdir(entry.path)
    if not entry.is_symlink():
        return "" if is_one else f"is no {kind}, and cannot be read"
    target = os.path.realpath(entry.path)
    if not Path(target).is_relative_to(root):
        return f"is a link to {_printable(target)}, out of data.root: copy the {kind}"
    return "" if is_one else f"is a link to {_printable(target)}, which is no {kind}"


def _printable(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _rule_of_first(data: DataConfig, listing: _Listing) -> ImageRule:
    faults = list(listing.skipped)
    for row_id in listing.row_ids["train"][:NUM_FIRST_IMAGES]:
        try:
            return find_rule(data, listing.root / row_id)
        except BadImage as error:
            faults.append(Skipped(row_id=row_id, reason=str(error)))
            if data.on_error == "fail":
                break
    if data.on_error == "fail":
        raise bad_row(faults[0])
    raise SourceError(
        f"none of the first {len(faults)} images can be read ({faults[0].row_id}: {faults[0].reason})",
        where=f"data.root = {data.root}",
        remedy="Mend or delete them",
    )
