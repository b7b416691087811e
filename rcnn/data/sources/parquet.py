"""Parquet files of images in the usual layouts: a local file or folder, a glob, or on S3.

    image (or img, or data.image_column)                     struct<bytes: binary, path: string>, binary, or paths as text
    label (or labels, fine_label, or data.label_column)      integers, booleans or text; or a folder `label=cat/`

`parquet_files` finds the files, `parquet_columns` their columns, `parquet_labels` the classes, `parquet_images` the images.
A word in a file's path names its part: train, val (valid, validation, dev) or test. A row's id is its file's path below the
root and its row number in the file.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from rcnn.config import DataConfig
from rcnn.data.manifest import Skipped, SourceRecord
from rcnn.data.schema import Block
from rcnn.data.sources.decode import BadImage, ImageRule, decode_image, find_rule, unwarned
from rcnn.data.sources.origin import NUM_FIRST_IMAGES, PARTS, BadRow, Origin, bad_row
from rcnn.data.sources.parquet_columns import ParquetFile, folder_labels, read_footer
from rcnn.data.sources.parquet_files import list_paths, read_each
from rcnn.data.sources.parquet_images import measure_external, read_images
from rcnn.data.sources.parquet_labels import read_labels
from rcnn.errors import SourceError

BLOCK_ROWS = 1024
BLOCKS_PER_SHARD = 32


@dataclass(frozen=True)
class ParquetChunk:
    """Rows of some files that become one shard: for each file, ascending row numbers and their labels."""

    root: str
    picks: list[tuple[ParquetFile, np.ndarray, np.ndarray]]
    rule: ImageRule

    @unwarned()
    def read(self) -> tuple[Block, list[Skipped]]:
        """Decodes the rows; returns those that cannot be decoded as skipped rows."""
        count = sum(len(rows) for _, rows, _ in self.picks)
        images = np.empty((count, *self.rule.image_shape), np.uint8)
        labels: list[int] = []
        row_ids: list[str] = []
        skipped: list[Skipped] = []
        decode = partial(decode_image, rule=self.rule)
        for file, rows, file_labels in self.picks:
            stored = read_images(self.root, file, rows)
            for row, label, image in zip(rows.tolist(), file_labels.tolist(), stored, strict=True):
                try:
                    images[len(labels)] = image.apply(decode)
                except BadImage as error:
                    skipped.append(BadRow(row_id=f"{file.name}#{row}", reason=str(error), remedy=error.remedy))
                    continue
                labels.append(label)
                row_ids.append(f"{file.name}#{row}")
        return Block(images[: len(labels)], np.array(labels, np.int64), row_ids), skipped


def open_parquet(data: DataConfig, downloads: Path) -> Origin:
    """Reads all footers and labels, and the first image."""
    files = read_each(lambda pair: read_footer(data, *pair), list_paths(data.root))
    found = read_labels(files, data)
    labels = found.of_file
    parts = {part: [file for file in files if _part_of(file) == part] for part in ("train", "val", "test")}
    if not parts["train"]:
        raise SourceError(
            "holds no training file", where=f"data.root = {data.root}", remedy="Name it train-....parquet"
        )
    num_bytes = sum(file.num_bytes for file in files) + measure_external(files, labels, data)
    rule = _rule_of_first(parts["train"], labels, data)
    # A part's row numbers count the good rows of its files, file after file.
    good = {file.name: np.flatnonzero(labels[file.name] >= 0) for file in files}
    first = {part: np.cumsum([0, *(len(good[file.name]) for file in of)]) for part, of in parts.items()}

    def cut(part: str, rows: np.ndarray) -> ParquetChunk:
        rows = np.sort(rows)
        picks = []
        for file, start, stop in zip(parts[part], first[part][:-1], first[part][1:], strict=True):
            chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
            if len(chosen):
                in_file = good[file.name][chosen]
                picks.append((file, in_file, labels[file.name][in_file]))
        return ParquetChunk(data.root, picks, rule)

    return Origin(
        labels={
            part: np.concatenate([labels[file.name][good[file.name]] for file in of])
            for part, of in parts.items()
            if of
        },
        classes=found.classes,
        image_shape=rule.image_shape,
        record=SourceRecord(
            name="parquet", url=data.root, files={file.name: f"bytes:{file.num_bytes}" for file in files}
        ),
        cut=cut,
        skipped=tuple(found.faults),
        encoded_bytes=num_bytes,
        block_rows=_block_rows(rule, data),
    )


def _block_rows(rule: ImageRule, data: DataConfig) -> int:
    """Rows per shuffled block: enough to read efficiently, but few enough that a shard mixes at least 32 blocks."""
    rows_per_shard = data.shard_megabytes * 1_000_000 // int(np.prod(rule.image_shape))
    return max(1, min(BLOCK_ROWS, rows_per_shard // BLOCKS_PER_SHARD))


def _part_of(file: ParquetFile) -> str:
    """The part that a file's path names, by the last such word. A folder such as `label=train/` names a class instead."""
    folders = [
        folder
        for folder in file.name.split("/")
        if file.label.folder_value is None or file.label.name not in folder_labels(f"{folder}/")
    ]
    for word in reversed(re.split(r"[^a-z]+", "/".join(folders).lower())):
        if word in PARTS:
            return PARTS[word]
    return "train"


def _rule_of_first(files: list[ParquetFile], labels: dict[str, np.ndarray], data: DataConfig) -> ImageRule:
    faults: list[Skipped] = []
    for file in files:
        rows = np.flatnonzero(labels[file.name] >= 0)[:NUM_FIRST_IMAGES]
        for row, image in zip(rows.tolist(), read_images(data.root, file, rows), strict=True):
            try:
                return image.apply(partial(find_rule, data))
            except BadImage as error:
                faults.append(BadRow(row_id=f"{file.name}#{row}", reason=str(error), remedy=error.remedy))
                if data.on_error == "fail":
                    raise bad_row(faults[0]) from error
    first = faults[0] if faults else None
    fault = f"no readable image among the first {len(faults)} ({first.row_id}: {first.reason})" if first else "no rows"
    raise SourceError(f"its training part has {fault}", where=f"data.root = {data.root}", remedy="Fix or delete them")
