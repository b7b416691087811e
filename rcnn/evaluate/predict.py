"""A finished model on image files: their classes, and how sure the model is.

Files are decoded by threads, a batch ahead of the model; one that cannot be read is reported, and the rest are classified.
"""

import glob
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcnn.config import MAX_MEGAPIXELS
from rcnn.data.sources.decode import BadImage, ImageRule, decode_image, unwarned
from rcnn.errors import ConfigError, SourceError
from rcnn.model.classifier import Classifier
from rcnn.text import printable
from rcnn.train.checkpoint import load_model
from rcnn.train.execution import choose_device

BATCH_SIZE = 128
NUM_DECODERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Prediction:
    """The most probable class of a file."""

    file: Path
    label: str
    probability: float

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.label} ({100 * self.probability:.1f} %)")


@dataclass(frozen=True)
class Unreadable:
    """A file that is not an image, and why."""

    file: Path
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.reason}")


def find_images(arguments: Sequence[str]) -> list[Path]:
    """The files that arguments name: files as they are, folders with all below them, globs. Hidden files are ignored.

    A folder that cannot be searched is included, so that it is reported like an unreadable file.

    Raises:
        ConfigError: a folder or a glob holds no file.
    """
    found: list[Path] = []
    for argument in arguments:
        files = _files_of(argument)
        if not files:
            raise ConfigError(
                "no image files found", where=argument or "''", remedy="Give image files, folders or globs"
            )
        found += files
    return found


def _files_of(argument: str) -> list[Path]:
    if not argument:
        return []
    if os.path.isdir(argument):
        return sorted(_files_below(argument))
    if glob.has_magic(argument) and not os.path.lexists(argument):
        return [file for name in sorted(glob.iglob(argument, recursive=True)) for file in _matched(argument, name)]
    return [Path(argument)]


def _matched(pattern: str, name: str) -> list[Path]:
    """The files of a glob's match: a folder gives all files below it, unless `**` has matched them already."""
    if os.path.isdir(name):
        return [] if "**" in pattern else sorted(_files_below(name))
    return [Path(name)]


def _files_below(folder: str) -> Iterator[Path]:
    unsearched: list[str] = []
    for below, folders, files in os.walk(folder, onerror=lambda error: unsearched.append(error.filename)):
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (Path(below, name) for name in files if name[0] != ".")
        yield from (
            Path(below, name) for name in folders if os.path.islink(Path(below, name))
        )  # it may lead in circles
    yield from map(Path, unsearched)


class Predictor:
    """A model that was loaded once, for any number of files.

    Args:
        folder: holds `model.safetensors` and `model.json`.

    Raises:
        DataError: it does not.
    """

    def __init__(self, folder: Path):
        self.model, self.description = load_model(folder)
        self._device = choose_device(torch.cuda.is_available())
        self.model.to(self._device)

    @property
    def data_set(self) -> str:
        """The name of the data set that the model was trained on."""
        return str(self.description["source"])

    def predict(self, files: Sequence[Path]) -> Iterator[Prediction | Unreadable]:
        """The class of each file, in order; images are made grey or colour and resized as ingest did (`data.resize`)."""
        rule = _rule_of(self.description)
        with unwarned():
            for batch in _decoded_ahead(files, rule):
                yield from _classified(self.model, batch, self.description["classes"], self._device)


def _rule_of(description: dict[str, Any]) -> ImageRule:
    """How images are made like those that the model was trained on."""
    height, width, channels = description["image_shape"]
    data = description["config"]["data"]
    return ImageRule(
        image_shape=(height, width, channels),
        resize=data["resize"],
        is_grey_required=False,
        max_pixels=MAX_MEGAPIXELS * 1_000_000,
    )


Decoded = tuple[Path, np.ndarray | str]
"""A file and its pixels (H, W, C), or why there are none."""


def _decoded_ahead(files: Sequence[Path], rule: ImageRule) -> Iterator[list[Decoded]]:
    """Batches of decoded files; while one is in use, the next is being read."""

    def decode(file: Path) -> Decoded:
        try:
            if file.is_dir():
                return file, "is a folder that was not searched: a link, or not readable"
            if file.exists() and not file.is_file():
                return file, "is not a regular file"  # a pipe would be waited for forever
            return file, decode_image(file, rule)
        except (BadImage, SourceError, OSError) as error:
            return file, str(error)

    with ThreadPoolExecutor(NUM_DECODERS, thread_name_prefix="decode") as pool:
        coming: deque[list[Future[Decoded]]] = deque()
        for start in range(0, len(files), BATCH_SIZE):
            coming.append([pool.submit(decode, file) for file in files[start : start + BATCH_SIZE]])
            if len(coming) > 1:
                yield [future.result() for future in coming.popleft()]
        while coming:
            yield [future.result() for future in coming.popleft()]


def _classified(
    model: Classifier, batch: Sequence[Decoded], classes: Sequence[str], device: torch.device
) -> Iterator[Prediction | Unreadable]:
    images = [pixels for _, pixels in batch if isinstance(pixels, np.ndarray)]
    answers: Iterator[tuple[float, int]] = iter(())
    if images:
        images_NCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
        with torch.inference_mode():
            best = model(images_NCHW).softmax(1).max(1)
        answers = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    for file, pixels in batch:
        if isinstance(pixels, str):
            yield Unreadable(file, pixels)
        else:
            probability, label = next(answers)
            yield Prediction(file, classes[label], probability)
