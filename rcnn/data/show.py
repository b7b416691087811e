"""Shows a data set: the number of rows per class, and contact sheets of training images."""

import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rcnn.data.fonts import readable
from rcnn.data.manifest import Manifest, require_whole
from rcnn.data.pictures import contact_sheet
from rcnn.data.streaming import stored_rows
from rcnn.errors import ConfigError
from rcnn.storage import Storage
from rcnn.text import file_stem

IMAGES_PER_CLASS = 40
IMAGES_PER_ROW = 10
ROWS_PER_READ = 1000
OVERVIEW = "all.png"
MAX_CLASSES = 100
"""Classes to draw by default: 10,000 sheets are too many to look at."""


def count_rows(storage: Storage, folder: str) -> list[dict[str, str]]:
    """The number of rows of each class in each split."""
    manifest = require_whole(storage, folder)
    return [
        {"label": str(label), "class": name}
        | {split: f"{part.rows_per_class[label]:,}" for split, part in manifest.splits.items()}
        for label, name in enumerate(manifest.classes)
    ]


def write_sheets(storage: Storage, folder: str, target: str, *, classes: Sequence[str] = ()) -> list[str]:
    """Draws training images: one sheet per class, and one sheet with a row per class.

    Args:
        storage: where the data set is.
        folder: its folder.
        target: folder for the pictures; its previous contents are replaced.
        classes: names of the classes to draw; empty: the first hundred.

    Returns:
        The names of the files.

    Raises:
        ConfigError: there is no such class.
        DataError: the data set is damaged.
    """
    manifest = require_whole(storage, folder)
    found = _first_of_each_class(storage, folder, manifest, _labels_of(manifest, classes))
    with tempfile.TemporaryDirectory() as draft:
        _draw(manifest, {label: images for label, images in found.items() if images}, Path(draft))
        storage.delete(target)
        storage.upload(Path(draft), target)
        return [f"{target}/{file.name}" for file in sorted(Path(draft).iterdir())]


def _labels_of(manifest: Manifest, classes: Sequence[str]) -> list[int]:
    classes = [unicodedata.normalize("NFC", name) for name in classes]  # as in the manifest
    for name in classes:
        if name not in manifest.classes:
            raise ConfigError(
                f"{manifest.name} has no class {name!r}", where="--class", remedy="`rcnn data show` lists them"
            )
    return [manifest.classes.index(name) for name in classes] or list(range(len(manifest.classes)))[:MAX_CLASSES]


def _draw(manifest: Manifest, found: dict[int, list[np.ndarray]], draft: Path) -> None:
    rows: list[np.ndarray] = []
    captions: list[str] = []
    for label, images in found.items():
        name = readable(manifest.classes[label], label)
        sheet = contact_sheet(f"{manifest.name}: {name}", images, [""] * len(images), num_columns=IMAGES_PER_ROW)
        sheet.save(draft / f"{file_stem(label, manifest.classes[label])}.png")
        rows += _row_of(images)
        captions += [name] + [""] * (IMAGES_PER_ROW - 1)
    contact_sheet(manifest.name, rows, captions, num_columns=IMAGES_PER_ROW).save(draft / OVERVIEW)


def _row_of(images: list[np.ndarray]) -> list[np.ndarray]:
    """The images of one row, filled up with blanks, so that each class starts a new row."""
    blanks = [np.full_like(images[0], 255)] * IMAGES_PER_ROW
    return [*images, *blanks][:IMAGES_PER_ROW]


def _first_of_each_class(
    storage: Storage, folder: str, manifest: Manifest, labels: list[int]
) -> dict[int, list[np.ndarray]]:
    found: dict[int, list[np.ndarray]] = {label: [] for label in labels}
    wanted = {label: min(IMAGES_PER_CLASS, manifest.splits["train"].rows_per_class[label]) for label in labels}
    num_missing = sum(wanted.values())
    for images_NHWC, labels_N in stored_rows(storage, folder, manifest, "train").read_in_order(ROWS_PER_READ):
        for image_HWC, label in zip(images_NHWC, labels_N.tolist(), strict=True):
            if label in wanted and len(found[label]) < wanted[label]:
                found[label].append(image_HWC.copy())
                num_missing -= 1
        if not num_missing:
            break
    return found
