"""A finished model on image files: their classes, and how sure the model is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

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
    """Classifies image files, each made grey or colour and resized (bilinear) to what the model was trained on.

    Raises:
        DataError: the folder holds no model, or a file is no image.
    """
    model, description = load_model(model_folder)
    for file in files:
        image_1CHW = _read_image(file, tuple(description["image_shape"]))
        with torch.inference_mode():
            probabilities = model(image_1CHW).softmax(1)[0]
        best = int(probabilities.argmax())
        yield Prediction(file, description["classes"][best], float(probabilities[best]))


def _read_image(file: Path, image_shape: tuple[int, int, int]) -> torch.Tensor:
    height, width, channels = image_shape
    try:
        with Image.open(file) as opened:
            image = _eight_bits(opened)
            image = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(image).reshape(image_shape)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        fault = "there is no such file" if isinstance(error, FileNotFoundError) else f"is no image ({error})"
        raise DataError(fault, where=str(file), remedy="Give PNG, JPEG or another format that Pillow reads") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greys scaled to 8 bits; Pillow's own conversion would clip them to white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8))
    return image
