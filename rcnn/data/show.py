"""What is in a data set, for the eye: rows of each class, and contact sheets."""

import tempfile
from pathlib import Path

import numpy as np

from rcnn.data.manifest import Manifest, require_manifest
from rcnn.data.pictures import contact_sheet, file_name
from rcnn.data.streaming import stored_rows
from rcnn.storage import Storage

IMAGES_PER_CLASS = 40
IMAGES_PER_ROW = 10
ROWS_PER_READ = 1000
OVERVIEW = "all.png"
CLASSES_IN_OVERVIEW = 100


def count_rows(storage: Storage, folder: str) -> list[dict[str, str]]:
    """For each class its rows in each split."""
    manifest = require_manifest(storage, folder)
    return [
        {"label": str(label), "class": name}
        | {split: f"{part.rows_per_class[label]:,}" for split, part in manifest.splits.items()}
        for label, name in enumerate(manifest.classes)
    ]


def write_sheets(storage: Storage, folder: str, target: str) -> list[str]:
    """Draws training images: a sheet of each class, and one with a row of each of the first hundred.

    Returns:
        The names of the files.
    """
    manifest = require_manifest(storage, folder)
    found = _first_of_each_class(storage, folder, manifest)
    with tempfile.TemporaryDirectory() as draft:
        names = [f"{label:03d}-{file_name(name)}.png" for label, name in enumerate(manifest.classes)]
        for label, images in enumerate(found):
            if images:
                title = f"{manifest.name}: {manifest.classes[label]}"
                sheet = contact_sheet(title, images, [""] * len(images), num_columns=IMAGES_PER_ROW)
                sheet.save(Path(draft, names[label]))
        rows = [
            (name, image)
            for name, images in list(zip(manifest.classes, found, strict=True))[:CLASSES_IN_OVERVIEW]
            for image in _row_of(images)
        ]
        sheet = contact_sheet(
            manifest.name, [image for _, image in rows], [name for name, _ in rows], num_columns=IMAGES_PER_ROW
        )
        sheet.save(Path(draft, OVERVIEW))
        storage.upload(Path(draft), target)
        return [f"{target}/{file.name}" for file in sorted(Path(draft).iterdir())]


def _row_of(images: list[np.ndarray]) -> list[np.ndarray]:
    """One row's images; a class with fewer is filled up with blanks, so that each class has a row of its own."""
    if not images:
        return []
    blanks = [np.full_like(images[0], 255)] * IMAGES_PER_ROW
    return [*images, *blanks][:IMAGES_PER_ROW]


def _first_of_each_class(storage: Storage, folder: str, manifest: Manifest) -> list[list[np.ndarray]]:
    found: list[list[np.ndarray]] = [[] for _ in manifest.classes]
    wanted = [min(IMAGES_PER_CLASS, rows) for rows in manifest.splits["train"].rows_per_class]
    for images_NHWC, labels_N in stored_rows(storage, folder, manifest, "train").read_in_order(ROWS_PER_READ):
        for image_HWC, label in zip(images_NHWC, labels_N.tolist(), strict=True):
            if len(found[label]) < wanted[label]:
                found[label].append(image_HWC.copy())
        if [len(images) for images in found] == wanted:
            break
    return found
