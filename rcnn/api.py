"""A finished model for notebooks and scripts: `rcnn.load_model(...).predict(images)`."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcnn.errors import ConfigError, DataError
from rcnn.evaluate.predict import Prediction, Predictor, Unreadable
from rcnn.recipes import resolve_config

ImageFile = str | os.PathLike[str]


class Model:
    """A model in memory.

    Attributes:
        name: what was loaded, for people.
        classes: the names of the classes, in the order of the labels.
        image_shape: (H, W, C) of the images that it was trained on.
    """

    def __init__(self, name: str, predictor: Predictor):
        self.name, self._predictor = name, predictor
        self.classes: tuple[str, ...] = tuple(predictor.description["classes"])
        height, width, channels = predictor.description["image_shape"]
        self.image_shape: tuple[int, int, int] = (height, width, channels)

    def __repr__(self) -> str:
        return f"<rcnn model {self.name}: {len(self.classes)} classes, images {self.image_shape}>"

    def predict(self, images: ImageFile | Iterable[ImageFile] | np.ndarray) -> list[Prediction]:
        """The most probable classes of each image.

        Args:
            images: image files of any size, which are resized as ingest did; or uint8 pixels (N, H, W, C) of the shape that the
                model was trained on.

        Raises:
            DataError: a file cannot be read, or the pixels are of another shape or type.
        """
        if isinstance(images, np.ndarray):
            return list(self._predictor.predict_pixels(self._checked(images)))
        files = [Path(images)] if isinstance(images, str | os.PathLike) else [Path(each) for each in images]
        return [_readable(answer) for answer in self._predictor.predict(files)]

    def _checked(self, images: np.ndarray) -> np.ndarray:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self.image_shape:
            height, width, channels = self.image_shape
            raise DataError(
                f"these pixels are {images.dtype} of the shape {images.shape}",
                where=self.name,
                remedy=f"Give uint8 of the shape (N, {height}, {width}, {channels}), or image files",
            )
        return images


def _readable(answer: Prediction | Unreadable) -> Prediction:
    if isinstance(answer, Unreadable):
        raise DataError(answer.reason, where=str(answer.file), remedy="Leave it out, or replace it")
    return answer


def load_model(
    name: str = "",
    *,
    storage: str = "",
    tracking_uri: str = "",
    num_top: int = 5,
    calibrated: bool = False,
    num_steps: int | None = None,
    confidence: float = 0.0,
) -> Model:
    """Loads a registered model, or one from a folder.

    Args:
        name: `models:/NAME/3`, `models:/NAME@champion`, the same without `models:/`, or a folder that `rcnn train` wrote;
            empty: the only registered model.
        storage: where the pipeline keeps its results (default: `RCNN_STORAGE`, or else `storage` in the working directory).
        tracking_uri: of an MLflow server (default: `RCNN_TRACKING__URI`, or else the store in the storage).
        num_top: how many classes a prediction names.
        calibrated: whether probabilities are those with the temperature that the evaluation fitted and registered.
        num_steps: recurrent steps, of a model that was trained for any number of them (`train.any_t`); None: all T.
        confidence: least probability of an answer that holds after `num_steps`; the other images take all T steps. 0: every
            answer holds.

    Raises:
        ConfigError: there is no such model, or it has fewer steps.
        DataError: its files are gone or damaged.
        ClusterError: MLflow is out of reach.
    """
    if num_top < 1:
        raise ConfigError(f"is {num_top}", where="num_top", remedy="Use 1 or more")
    options: dict[str, Any] = {
        "num_top": num_top, "calibrated": calibrated, "num_steps": num_steps, "confidence": confidence
    }  # fmt: skip
    folder = Path(name)
    if name and folder.is_dir():
        place = folder / "model" if (folder / "model").is_dir() else folder
        return Model(name, Predictor(place, **options))
    places: Sequence[tuple[str, str]] = [("storage", storage), ("tracking.uri", tracking_uri)]
    settings = [f"{setting}={value}" for setting, value in places if value]
    config = resolve_config(environ=os.environ, overrides=settings).rooted()
    from rcnn.registry.answers import fetched_model

    with fetched_model(config, name.removeprefix("models:/")) as (title, fetched):
        return Model(title, Predictor(fetched, **options))
