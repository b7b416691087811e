"""Shows a data set: the number of rows per class, and contact sheets of training images and of near-duplicates."""

import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rcnn.data.duplicates import closest_pairs
from rcnn.data.fonts import readable
from rcnn.data.manifest import Manifest, require_whole
from rcnn.data.pictures import contact_sheet
from rcnn.data.streaming import stored_rows, stretch
from rcnn.errors import ConfigError
from rcnn.storage import Storage
from rcnn.text import file_stem

IMAGES_PER_CLASS = 40
IMAGES_PER_ROW = 10
ROWS_PER_READ = 1000
OVERVIEW = "all.png"
PAIRS = "near-duplicates.png"
MOST_PAIRS, PAIRS_PER_ROW, PIXELS_OF_A_PAIR = 24, 4, 96
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


def describe_near_duplicates(storage: Storage, folder: str) -> str:
    """How many rows of one split show the same picture as a row of another, in a line; empty where ingest did not look."""
    found = require_whole(storage, folder).near_duplicates
    if found is None:
        return ""
    counts = ", ".join(f"{found.rows[pair]:,} {pair.replace('-', ' rows in ')}" for pair in found.rows)
    labels = f"; {found.other_label:,} pairs have two labels" if found.other_label else ""
    return f"near-duplicates across splits: {counts}{labels} ({storage.uri(f'{folder}/{found.file}')})"


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
        _draw_pairs(storage, folder, manifest, Path(draft, PAIRS))
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


def _draw_pairs(storage: Storage, folder: str, manifest: Manifest, file: Path) -> None:
    """Draws the closest near-duplicates side by side; nothing where there are none."""
    pairs = closest_pairs(storage, folder, MOST_PAIRS) if manifest.near_duplicates else []
    if not pairs:
        return
    images, captions = [], []
    for pair in pairs:
        for split, row, label in (
            (pair["split"], pair["row"], pair["label"]),
            (pair["other_split"], pair["other_row"], pair["other_label"]),
        ):
            rows = stored_rows(storage, folder, manifest, split)
            images.append(rows.read(stretch(rows.segments, row, row + 1))[0][0])
            captions.append(f"{split}: {readable(manifest.classes[label], label)}")
    title = f"{manifest.name}: the closest near-duplicates across splits"
    sheet = contact_sheet(title, images, captions, num_columns=2 * PAIRS_PER_ROW, tile_pixels=PIXELS_OF_A_PAIR)
    sheet.save(file)


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
