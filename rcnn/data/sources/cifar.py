"""CIFAR-10 and CIFAR-100: an archive of Python pickles, read by an unpickler that admits only arrays and plain containers.

Nothing is extracted to disk: members are read from the archive, or from a folder with the extracted files.
"""

import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rcnn.config import DataConfig
from rcnn.data.manifest import SourceRecord
from rcnn.data.sources.download import fetch, md5_of
from rcnn.data.sources.origin import Arrays, Origin, expanded, origin_of_arrays
from rcnn.errors import SourceError

URL = "https://www.cs.toronto.edu/~kriz/"
BYTES_PER_IMAGE = 3 * 32 * 32


@dataclass(frozen=True)
class CifarFiles:
    """An official archive and its contents.

    Attributes:
        parts: the members of each part, with their MD5.
        meta: the member with the class names, and its MD5.
        labels, coarse: keys of a batch's label lists; `coarse` is empty if there are no coarse labels.
        label_names, coarse_names: keys of the lists of class names in `meta`.
    """

    name: str
    archive: str
    archive_md5: str
    folder: str
    parts: dict[str, dict[str, str]]
    meta: tuple[str, str]
    labels: str
    label_names: str
    coarse: str = ""
    coarse_names: str = ""


CIFAR10 = CifarFiles(
    "cifar10",
    "cifar-10-python.tar.gz",
    "c58f30108f718f92721af3b95e74349a",
    "cifar-10-batches-py",
    {
        "train": {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
    },
    ("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
    labels="labels",
    label_names="label_names",
)
CIFAR100 = CifarFiles(
    "cifar100",
    "cifar-100-python.tar.gz",
    "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-python",
    {
        "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
        "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    },
    ("meta", "7973b15100ade9c7d40fb424638fde48"),
    labels="fine_labels",
    label_names="fine_label_names",
    coarse="coarse_labels",
    coarse_names="coarse_label_names",
)


def open_cifar10(data: DataConfig, downloads: Path) -> Origin:
    """CIFAR-10 from `data.root`, or downloaded."""
    return _open(CIFAR10, data, downloads)


def open_cifar100(data: DataConfig, downloads: Path) -> Origin:
    """CIFAR-100 with fine and coarse labels, from `data.root`, or downloaded."""
    return _open(CIFAR100, data, downloads)


def _open(files: CifarFiles, data: DataConfig, downloads: Path) -> Origin:
    where = _find(files, expanded(data.root)) if data.root else _download(files, data.mirror, downloads)
    members = dict(_read_archive(files, where) if where.is_file() else _read_folder(files, where))
    meta = _unpickled(members, files.meta[0], where)
    record = SourceRecord(
        name=files.name,
        url=URL + files.archive,
        files={name: f"md5:{md5}" for names in files.parts.values() for name, md5 in names.items()},
    )
    return origin_of_arrays(
        {
            part: _joined([_batch(files, _unpickled(members, name, where), name, where) for name in names])
            for part, names in files.parts.items()
        },
        tuple(meta[files.label_names]),
        record,
        coarse_classes=tuple(meta[files.coarse_names]) if files.coarse else (),
    )


def _find(files: CifarFiles, root: Path) -> Path:
    """The folder with the batches, or the archive."""
    for place in (root / files.folder, root, root / files.archive):
        if (place / files.meta[0]).exists() or (place.is_file() and place.name.endswith((".tar.gz", ".tgz"))):
            return place
    raise SourceError(
        f"holds neither {files.folder}/ nor {files.archive}",
        where=f"data.root = {root}",
        remedy="Point it to the folder with one of them, or leave it empty to download the archive",
    )


def _download(files: CifarFiles, mirror: str, downloads: Path) -> Path:
    return fetch(files.archive, md5=files.archive_md5, mirrors=[mirror or URL], folder=downloads / files.name)


def _members(files: CifarFiles) -> dict[str, str]:
    return {name: md5 for names in [*files.parts.values(), dict([files.meta])] for name, md5 in names.items()}


def _read_folder(files: CifarFiles, folder: Path) -> Iterator[tuple[str, bytes]]:
    for name, md5 in _members(files).items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise SourceError(
                f"cannot be read ({error.strerror})", where=str(folder / name), remedy="Unpack the archive again"
            ) from error
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise SourceError(
                f"the MD5 of its content is {found}, the official file's is {md5}",
                where=str(folder / name),
                remedy="Unpack the archive again",
            )
        yield name, content


def _read_archive(files: CifarFiles, archive: Path) -> Iterator[tuple[str, bytes]]:
    found = md5_of(archive)
    if found != files.archive_md5:
        raise SourceError(
            f"the MD5 of its content is {found}, the official file's is {files.archive_md5}",
            where=str(archive),
            remedy="Point data.root to the official files, or leave it empty to download them",
        )
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                tarfile.data_filter(member, "/nowhere")  # refuses ../, links out of the folder, and devices
                folder, _, name = member.name.rpartition("/")
                if folder == files.folder and name in _members(files) and member.isreg():
                    stream = tar.extractfile(member)
                    assert stream is not None, f"{member.name} is a regular file"
                    yield name, stream.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise SourceError(f"cannot be unpacked ({error})", where=str(archive), remedy="Fetch it again") from error


def _unpickled(members: dict[str, bytes], name: str, where: Path) -> dict[str, Any]:
    if name not in members:
        raise SourceError(f"{name} is missing", where=str(where), remedy="Fetch the archive again")
    try:
        tree = PlainUnpickler(io.BytesIO(members[name]), encoding="latin1").load()
    except Exception as error:  # pickle raises almost any exception on damaged bytes
        raise SourceError(
            f"{name} is not a plain pickle ({error})", where=str(where), remedy="Do not use this file: fetch it again"
        ) from error
    if not isinstance(tree, dict):
        raise SourceError(f"{name} does not hold a dictionary", where=str(where), remedy="Fetch the archive again")
    return tree


def _batch(files: CifarFiles, tree: dict[str, Any], name: str, where: Path) -> Arrays:
    pixels, labels = tree.get("data"), tree.get(files.labels)
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape[1:] != (BYTES_PER_IMAGE,)
        or labels is None
        or len(labels) != len(pixels)
    ):
        raise SourceError(
            f"{name} does not hold images of 32x32x3 with {files.labels}", where=str(where), remedy="Fetch it again"
        )
    images_NHWC = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    coarse = np.asarray(tree[files.coarse], np.int64) if files.coarse else None
    return Arrays(images_NHWC, np.asarray(labels, np.int64), coarse)


def _joined(batches: list[Arrays]) -> Arrays:
    coarse = [batch.coarse for batch in batches if batch.coarse is not None]
    return Arrays(
        np.concatenate([batch.images for batch in batches]),
        np.concatenate([batch.labels for batch in batches]),
        np.concatenate(coarse) if coarse else None,
    )


class PlainUnpickler(pickle.Unpickler):
    """Reads numpy arrays and plain containers, and refuses everything else, such as functions to call."""

    ADMITTED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),  # how Python 3 writes bytes for Python 2 readers
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """The object that the pickle names, if it is admitted."""
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)
