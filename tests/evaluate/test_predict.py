from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn.config import PipelineConfig
from rcnn.data.loader import load_training_data
from rcnn.errors import DataError
from rcnn.evaluate.predict import predict_files
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train.loop import fit


@pytest.fixture(scope="module")
def model(tiny_config: PipelineConfig, digits: IngestResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    data = load_training_data(Storage(tiny_config.storage), digits.folder, num_rows=320)
    fit(tiny_config.with_settings({"train.epochs": 1}), data, lambda metrics, save: save(folder))
    return folder


def test_any_size_and_colour_of_image_gets_a_class(model: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:28, :28, 0]).save(tmp_path / "b.jpg")
    predictions = list(predict_files(model, [tmp_path / "a.png", tmp_path / "b.jpg"]))
    assert all(prediction.label in "0123456789" and 0.1 <= prediction.probability <= 1 for prediction in predictions)
    assert str(predictions[0]).startswith(f"{tmp_path / 'a.png'}: ")


def test_what_is_no_image_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png: is no image"):
        list(predict_files(model, [tmp_path / "a.png"]))
    with pytest.raises(DataError, match=r"b\.png: is not there"):
        list(predict_files(model, [tmp_path / "b.png"]))
    with pytest.raises(DataError, match="holds no model"):
        list(predict_files(tmp_path, [tmp_path / "a.png"]))
