"""The public names, and a model as a notebook uses it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rcnn
from rcnn.config import PipelineConfig
from rcnn.data.loader import load_training_data
from rcnn.errors import ConfigError, DataError
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train.loop import fit


@pytest.fixture(scope="module")
def folder(tiny_config: PipelineConfig, digits: IngestResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `rcnn train` leaves."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "model").mkdir()
    data = load_training_data(Storage(tiny_config.storage), digits.folder, num_rows=320)
    fit(tiny_config.with_settings({"train.epochs": 1}), data, lambda metrics: None).save_best(folder / "model")
    return folder


def test_there_are_at_most_ten_names_and_each_is_there() -> None:
    assert len(rcnn.__all__) <= 10
    for name in rcnn.__all__:
        assert getattr(rcnn, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rcnn.nothing  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = "import sys, rcnn; print({'torch', 'numpy', 'ray', 'mlflow', 'prefect', 'pydantic'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"


def test_files_and_pixels_get_the_same_answers(folder: Path, tmp_path: Path) -> None:
    images_NHWC = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, image_HWC in zip(files, images_NHWC, strict=True):
        Image.fromarray(image_HWC[..., 0]).save(file)
    model = rcnn.load_model(str(folder), num_top=10)
    assert model.classes == tuple("0123456789")
    of_files, of_pixels, of_one = model.predict(files), model.predict(images_NHWC), model.predict(str(files[0]))
    assert [answer.top for answer in of_files] == [answer.top for answer in of_pixels]
    assert of_one[0].label == of_files[0].label
    assert of_one[0].probability == pytest.approx(of_files[0].probability, rel=1e-5)  # another batch, other last bits
    for answer in of_files:
        assert sum(probability for _, probability in answer.top) == pytest.approx(1, abs=1e-5)
        assert answer.probability == max(probability for _, probability in answer.top)


def test_bad_images_are_named(folder: Path, tmp_path: Path) -> None:
    model = rcnn.load_model(str(folder))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png.*Leave it out"):
        model.predict([tmp_path / "bad.png"])
    for pixels in (np.zeros((28, 28), np.uint8), np.zeros((1, 28, 28, 3), np.uint8), np.zeros((1, 28, 28, 1))):
        with pytest.raises(DataError, match=r"Give uint8 of the shape \(N, 28, 28, 1\)"):
            model.predict(pixels)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no registered model"):
        rcnn.load_model("models:/nothing", storage=str(tmp_path))
