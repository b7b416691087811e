"""A finished model on image files: their classes, and how sure the model is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rcnn.config import DataConfig
from rcnn.data.sources.decode import BadImage, ImageRule, decode_image
from rcnn.errors import DataError
from rcnn.train.checkpoint import load_model


@dataclass(frozen=True)
class Prediction:
    """The most probable class of a file."""

    file: Path
    label: str
    probability: float

    def __str__(self) -> str:
        return f"{self.file}: {self.label} ({100 * self.probability:.1f} %)"


def predict_files(model_folder: Path, files: Sequence[Path]) -> Iterator[Prediction]:
    """Classifies image files, each made grey or colour and resized as ingest does it (`data.resize`).

    Raises:
        DataError: the folder holds no model, or a file is no image.
    """
    model, description = load_model(model_folder)
    for file in files:
        image_1CHW = _read_image(file, description)
        with torch.inference_mode():
            probabilities = model(image_1CHW).softmax(1)[0]
        best = int(probabilities.argmax())
        yield Prediction(file, description["classes"][best], float(probabilities[best]))


def _read_image(file: Path, description: dict[str, Any]) -> torch.Tensor:
    """An image made like those that the model was trained on, by the rule of its ingest."""
    data = DataConfig.model_validate(description["config"]["data"])
    height, width, channels = description["image_shape"]
    rule = ImageRule(
        image_shape=(height, width, channels),
        resize=data.resize,
        is_grey_required=False,
        max_pixels=data.max_megapixels * 1_000_000,
    )
    try:
        pixels = decode_image(file, rule)
    except BadImage as error:
        raise DataError(
            str(error), where=str(file), remedy="Give PNG, JPEG or another format that Pillow reads"
        ) from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
