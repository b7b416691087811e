"""A finished model on images: their classes, and how sure the model is.

Files are decoded by threads, a batch ahead of the model; one that cannot be read is reported, and the rest are classified.
"""

import os
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcnn.config import MAX_MEGAPIXELS
from rcnn.data.sources.decode import BadImage, ImageRule, decode_image, unwarned
from rcnn.errors import ConfigError, SourceError
from rcnn.evaluate.early_exit import with_steps
from rcnn.evaluate.temperature import TEMPERATURE, temperature_of
from rcnn.text import printable
from rcnn.train.checkpoint import load_model
from rcnn.train.execution import choose_device

BATCH_SIZE = 128
NUM_TOP = 5
BAR_WIDTH, EIGHTHS = 30, " ▏▎▍▌▋▊▉"
NUM_DECODERS = min(8, os.cpu_count() or 1)

Decoded = tuple[Path, np.ndarray | str]
"""A file and its pixels (H, W, C), or why there are none."""


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, the most probable first; `file` is None for pixels from memory."""

    file: Path | None
    top: tuple[tuple[str, float], ...]
    """Class names with their probabilities."""

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.top[0][0]

    @property
    def probability(self) -> float:
        """Of that class."""
        return self.top[0][1]

    def __str__(self) -> str:
        return printable(f"{self.file or 'image'}: {self.label} ({100 * self.probability:.1f} %)")

    def bars(self) -> str:
        """A line for each class, with a bar as long as its probability."""
        names = [printable(name) for name, _ in self.top]
        width = max(map(len, names))
        lines = (
            f"  {name:<{width}}  {100 * probability:5.1f} %  {_bar(probability)}".rstrip()
            for name, (_, probability) in zip(names, self.top, strict=True)
        )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        top = [{"label": name, "probability": probability} for name, probability in self.top]
        return {"file": str(self.file or ""), "label": self.label, "probability": self.probability, "top": top}


def _bar(share: float) -> str:
    """A bar of up to `BAR_WIDTH` characters, in steps of an eighth of one."""
    whole, eighths = divmod(round(8 * BAR_WIDTH * share), 8)
    return "█" * whole + EIGHTHS[eighths]


@dataclass(frozen=True)
class Unreadable:
    """A file that is not an image, and why."""

    file: Path
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.reason}")

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {"file": str(self.file), "error": self.reason}


class Predictor:
    """A model that was loaded once, for any number of images.

    Args:
        folder: holds `model.safetensors` and `model.json`.
        num_top: how many classes a prediction names, if there are as many.
        calibrated: whether probabilities are those with the model's temperature; a model without one gives the same as ever.
        num_steps: recurrent steps, of a model that was trained for any number of them; None: all T.
        confidence: least probability of an answer that holds after `num_steps`; the other images take all T steps. 0: every
            answer holds.

    Raises:
        DataError: it does not.
        ConfigError: the model has fewer steps.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_top: int = NUM_TOP,
        calibrated: bool = False,
        num_steps: int | None = None,
        confidence: float = 0.0,
    ):
        self.model, self.description = load_model(folder)
        self._num_top = num_top
        self._temperature = temperature_of(self.description) if calibrated else 1.0
        self._device = choose_device(torch.cuda.is_available())
        self.model.to(self._device)
        if not 0 <= confidence <= 1 or (confidence and num_steps is None):
            fault = "needs num_steps" if 0 <= confidence <= 1 else "is not a probability"
            raise ConfigError(fault, where=f"confidence = {confidence}", remedy="Give both, such as 1 and 0.99")
        try:
            self._ask = with_steps(self.model, num_steps, confidence)
        except ValueError as error:
            raise ConfigError(str(error), where="num_steps", remedy="Use fewer, or leave it out") from error

    @classmethod
    def of_files(cls, files: Mapping[str, bytes]) -> "Predictor":
        """A model from the contents of its folder, by file name: for processes that do not see that folder."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            return cls(Path(folder))

    @property
    def has_temperature(self) -> bool:
        """Whether one was fitted: to registered models, by their evaluation."""
        return TEMPERATURE in self.description

    @property
    def data_set(self) -> str:
        """The name of the data set that the model was trained on."""
        return str(self.description["source"])

    @property
    def rule(self) -> ImageRule:
        """How image files are made like those that the model was trained on."""
        return _rule_of(self.description)

    def predict(self, files: Sequence[Path]) -> Iterator[Prediction | Unreadable]:
        """The class of each file, in order; images are made grey or colour and resized as ingest did (`data.resize`)."""
        for batch in self.decode(files):
            yield from self._classified(batch)

    def decode(self, files: Sequence[Path]) -> Iterator[list[Decoded]]:
        """Batches of files with their pixels, in order; while one is in use, the next is being read."""
        with unwarned():
            yield from _decoded_ahead(files, self.rule)

    def predict_pixels(self, images_NHWC: np.ndarray) -> Iterator[Prediction]:
        """The classes of uint8 images (N, H, W, C) of the shape that the model was trained on."""
        for start in range(0, len(images_NHWC), BATCH_SIZE):
            for top in self._tops(images_NHWC[start : start + BATCH_SIZE]):
                yield Prediction(None, top)

    def probabilities(self, images_NHWC: np.ndarray) -> np.ndarray:
        """The probabilities (N, classes), float32, of one batch of uint8 images (N, H, W, C)."""
        return self._probabilities(images_NHWC).cpu().numpy()  # type: ignore[no-any-return]

    def _classified(self, batch: Sequence[Decoded]) -> Iterator[Prediction | Unreadable]:
        images = [pixels for _, pixels in batch if isinstance(pixels, np.ndarray)]
        answers = iter(self._tops(np.stack(images)) if images else ())
        for file, pixels in batch:
            yield Unreadable(file, pixels) if isinstance(pixels, str) else Prediction(file, next(answers))

    def _tops(self, images_NHWC: np.ndarray) -> Iterator[tuple[tuple[str, float], ...]]:
        """The most probable classes of each image of one batch."""
        classes = self.description["classes"]
        best = self._probabilities(images_NHWC).topk(min(self._num_top, len(classes)))
        for probabilities, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            yield tuple((classes[label], share) for label, share in zip(labels, probabilities, strict=True))

    @torch.inference_mode()
    def _probabilities(self, images_NHWC: np.ndarray) -> torch.Tensor:
        images_NCHW = torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2).to(self._device)
        return (self._ask(images_NCHW) / self._temperature).softmax(1)  # type: ignore[no-any-return]


def answer_of(classes: Sequence[str], shares: Sequence[float]) -> dict[str, Any]:
    """What a server answers about one image: its class, the probability of that class, and those of all classes by name."""
    best = max(range(len(classes)), key=shares.__getitem__)
    by_name = dict(zip(classes, shares, strict=True))
    return {"label": classes[best], "probability": shares[best], "probabilities": by_name}


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
