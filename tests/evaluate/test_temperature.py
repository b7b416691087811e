"""The temperature of a registered model: an option of predictions, which old models lack."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax

from rcnn.api import load_model
from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.data.manifest import require_manifest
from rcnn.evaluate.predict import Predictor
from rcnn.evaluate.temperature import add_temperature, temperature_of
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train.checkpoint import build_classifier, save_model
from rcnn.train.checkpoint import load_model as read_model


@pytest.fixture
def model_folder(tiny_config: PipelineConfig, digits: IngestResult, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    manifest = require_manifest(Storage(tiny_config.storage), digits.folder)
    save_model(build_classifier(tiny_config, manifest).state_dict(), tiny_config, manifest, tmp_path)
    return tmp_path


def probabilities(folder: Path, pixels_NHWC: np.ndarray, *, calibrated: bool) -> list[dict[str, float]]:
    found = Predictor(folder, num_top=10, calibrated=calibrated).predict_pixels(pixels_NHWC)
    return [dict(each.top) for each in found]


def test_calibrated_probabilities_are_those_of_divided_logits(model_folder: Path) -> None:
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    add_temperature(model_folder, 2.5)
    model, description = read_model(model_folder)
    assert temperature_of(description) == 2.5
    with torch.inference_mode():
        logits_NC = model(torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2)).numpy()
    for temperature, calibrated in ((1.0, False), (2.5, True)):
        found = probabilities(model_folder, pixels_NHWC, calibrated=calibrated)
        for row, truth_C in enumerate(softmax(logits_NC / temperature, axis=1)):
            assert list(found[row].values()) == sorted(found[row].values(), reverse=True)
            for label, name in enumerate(description["classes"]):
                assert found[row][name] == pytest.approx(truth_C[label], rel=1e-4)


def test_a_model_without_a_temperature_answers_as_before(model_folder: Path) -> None:
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), dtype=np.uint8)
    assert not Predictor(model_folder, calibrated=True).has_temperature
    plain, calibrated = (probabilities(model_folder, pixels_NHWC, calibrated=each) for each in (False, True))
    assert plain == calibrated


def test_the_option_is_that_of_the_command_and_of_the_python_api(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 1), dtype=np.uint8)
    Image.fromarray(pixels_NHWC[0, ..., 0]).save(model_folder / "x.png")
    command = ["predict", str(model_folder / "x.png"), "--model", str(model_folder), "--json", "--calibrated"]
    assert main(command) == 0
    before, note = capsys.readouterr()
    assert note == "rcnn: this model has no temperature: probabilities are as they are\n"
    add_temperature(model_folder, 3.0)
    assert main(command) == 0
    after, note = capsys.readouterr()
    assert note == ""
    [answer] = load_model(str(model_folder), calibrated=True).predict(pixels_NHWC)
    assert json.loads(after)["probability"] == pytest.approx(answer.probability, rel=1e-5)
    assert json.loads(after)["label"] == json.loads(before)["label"]
    assert json.loads(after)["probability"] < json.loads(before)["probability"]


def test_adding_it_changes_nothing_else_of_the_description(model_folder: Path) -> None:
    before = json.loads((model_folder / "model.json").read_text())
    weights = (model_folder / "model.safetensors").read_bytes()
    add_temperature(model_folder, 1.25)
    add_temperature(model_folder, 1.5)
    assert json.loads((model_folder / "model.json").read_text()) == before | {"temperature": 1.5}
    assert (model_folder / "model.safetensors").read_bytes() == weights
    assert Predictor(model_folder).has_temperature
