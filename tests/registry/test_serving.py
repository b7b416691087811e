"""`mlflow models serve` on a registered model, over HTTP."""

import base64
import io
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rcnn.config import PipelineConfig
from rcnn.recipes import debug_tiny
from rcnn.results import IngestResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import tracking_uri
from rcnn.train.checkpoint import load_model
from tests.registry.server import free_port
from tests.registry.test_mlflow_store import evaluated, registered, trained

pytestmark = [pytest.mark.long, pytest.mark.thorough]

SECONDS_TO_START = 240


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    settings = {"storage": str(tmp_path_factory.mktemp("serving")), "tracking.model_name": "digits"}
    return debug_tiny().with_settings(settings)


@pytest.fixture(scope="module")
def url(config: PipelineConfig, digits_storage: Path, digits: IngestResult) -> Iterator[str]:
    """The address of a server of a registered model, started by the documented command."""
    target = StageFolder(Storage(config.storage), "runs/register")
    registered(config, trained(config, digits_storage, digits, 1), evaluated(config, 0.5), target)
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        "models:/digits@champion",
        "--env-manager",
        "local",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = Path(config.storage, "serve.log")
    with log.open("w") as stream:
        environment = os.environ | {"MLFLOW_TRACKING_URI": tracking_uri(config)}
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", process, log)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"exit code {process.wait(0.3)}: {log.read_text()}")
        else:
            return


def ask(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["predictions"]


@pytest.fixture(scope="module")
def images(config: PipelineConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 1, 28, 28), dtype=np.uint8)


def wanted(config: PipelineConfig, images_NCHW: np.ndarray) -> np.ndarray:
    model, _ = load_model(Path(config.storage, "runs/train-1/model"))
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(images_NCHW)).softmax(1))


def as_base64(image_HW: np.ndarray) -> str:
    packed = io.BytesIO()
    Image.fromarray(image_HW).save(packed, "png")
    return base64.b64encode(packed.getvalue()).decode()


def require_equal(answers: Any, probabilities_NC: np.ndarray) -> None:
    assert [list(each["probabilities"]) for each in answers] == [[str(digit) for digit in range(10)]] * len(answers)
    found_NC = np.array([list(each["probabilities"].values()) for each in answers])
    np.testing.assert_allclose(found_NC, probabilities_NC, atol=1e-5)
    assert [each["label"] for each in answers] == [str(best) for best in probabilities_NC.argmax(1)]
    np.testing.assert_allclose([each["probability"] for each in answers], probabilities_NC.max(1), atol=1e-5)


def test_pixels_get_class_names_and_the_models_probabilities(
    url: str, config: PipelineConfig, images: np.ndarray
) -> None:
    require_equal(ask(url, {"inputs": images.tolist()}), wanted(config, images))
    require_equal(ask(url, {"inputs": images[:1].tolist()}), wanted(config, images[:1]))


def test_raw_png_files_get_the_same_answers(url: str, config: PipelineConfig, images: np.ndarray) -> None:
    files = [as_base64(image_CHW[0]) for image_CHW in images]
    require_equal(ask(url, {"inputs": files}), wanted(config, images))
    require_equal(
        ask(url, {"dataframe_split": {"columns": ["image"], "data": [[file] for file in files]}}),
        wanted(config, images),
    )


@pytest.mark.parametrize(
    ("inputs", "fault"),
    [
        ([[[[300] * 28] * 28]], "give whole numbers from 0 to 255"),
        ([[[0, 1]]], r"of the shape (1, 1, 2); give whole numbers"),
        ([base64.b64encode(b"no image").decode()], "image 0 is not an image that can be read"),
        (["?"], "image 0 is not base64"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(url: str, inputs: Any, fault: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(url, {"inputs": inputs})
    assert caught.value.code == 400
    assert fault in caught.value.read().decode()
