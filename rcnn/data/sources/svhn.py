"""SVHN, cropped house-number digits, 32x32 colour: MATLAB files, in which label 10 is the digit 0."""

from pathlib import Path

import numpy as np

from rcnn.config import DataConfig
from rcnn.data.manifest import SourceRecord
from rcnn.data.sources.digits import DIGITS
from rcnn.data.sources.download import fetch, md5_of
from rcnn.data.sources.origin import Arrays, Origin, expanded, origin_of_arrays
from rcnn.errors import SourceError

URL = "http://ufldl.stanford.edu/housenumbers/"
MD5 = {
    "train": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test": "eb5a983be6a315427106f1b164d9cef3",
    "extra": "a93ce644f1a588dc4d68dda5feec44a7",
}


def open_svhn(data: DataConfig, downloads: Path) -> Origin:
    """SVHN from `data.root`, or downloaded; `data.svhn_extra` appends the extra part to the training rows."""
    names = ("train", "test", *(["extra"] if data.svhn_extra else []))
    files = {name: _locate(name, data, downloads) for name in names}
    parts = {name: _read(file) for name, file in files.items()}
    if "extra" in parts:
        train, extra = parts["train"], parts.pop("extra")
        images = np.concatenate([train.images, extra.images])
        parts["train"] = Arrays(images, np.concatenate([train.labels, extra.labels]))
    record = SourceRecord(name="svhn", url=URL, files={file.name: f"md5:{MD5[name]}" for name, file in files.items()})
    return origin_of_arrays(parts, DIGITS, record)


def _locate(name: str, data: DataConfig, downloads: Path) -> Path:
    """The file of a part, with its MD5 verified."""
    if not data.root:
        return fetch(f"{name}_32x32.mat", md5=MD5[name], mirrors=[data.mirror or URL], folder=downloads / "svhn")
    file = expanded(data.root) / f"{name}_32x32.mat"
    if not file.exists():
        raise SourceError(
            "is missing",
            where=str(file),
            remedy="Point data.root to the folder with SVHN's .mat files, or leave it empty to download them",
        )
    if (found := md5_of(file)) != MD5[name]:
        raise SourceError(
            f"the MD5 of its content is {found}, the official file's is {MD5[name]}",
            where=str(file),
            remedy="Point data.root to the official files, or leave it empty to download them",
        )
    return file


def _read(file: Path) -> Arrays:
    from scipy.io import loadmat

    try:
        tree = loadmat(file, variable_names=["X", "y"])
        pixels_HWCN, labels = tree["X"], tree["y"].ravel().astype(np.int64)
    except Exception as error:  # loadmat raises almost any exception on damaged bytes
        raise SourceError(
            f"is not a MATLAB file with X and y ({error})", where=str(file), remedy="Fetch it again"
        ) from error
    if fault := _fault(pixels_HWCN, labels):
        raise SourceError(fault, where=str(file), remedy="Fetch it again")
    return Arrays(np.moveaxis(pixels_HWCN, 3, 0), labels % len(DIGITS))


def _fault(pixels_HWCN: np.ndarray, labels: np.ndarray) -> str:
    if pixels_HWCN.dtype != np.uint8 or pixels_HWCN.shape != (32, 32, 3, len(labels)):
        return f"X is {pixels_HWCN.dtype} {pixels_HWCN.shape}, but y has {len(labels)} labels"
    if not ((labels >= 0) & (labels <= len(DIGITS))).all():
        return f"its labels are {labels.min()} to {labels.max()}, but must be 0 to {len(DIGITS)}"
    return ""
