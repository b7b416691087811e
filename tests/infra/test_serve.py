"""The deployment of Ray Serve, for real: a process of its own, asked over HTTP."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rcnn.train.checkpoint import load_model
from tests.registry.server import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECONDS_TO_START = 300


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, folder = free_port(), tmp_path_factory.mktemp("served")
    command = [sys.executable, "-m", "infra.serve", "--model", str(model), "--port", str(port)]
    log = folder / "log"
    environment = os.environ | {"RCNN_STORAGE": str(folder / "storage"), "PYTHONPATH": str(ROOT)}
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    deadline = time.monotonic() + SECONDS_TO_START
    while "serving " not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        with suppress(subprocess.TimeoutExpired):
            pytest.fail(f"exit code {process.wait(0.3)}: {log.read_text()}")
    yield f"http://127.0.0.1:{port}/"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def as_png(image_HW: np.ndarray) -> bytes:
    packed = io.BytesIO()
    Image.fromarray(image_HW).save(packed, "png")
    return packed.getvalue()


def ask(url: str, content: bytes) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, content), timeout=120) as answer:
        return json.load(answer)


def test_requests_that_come_together_get_each_its_own_answer(url: str, model: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda image: ask(url, as_png(image)), images))
    with torch.inference_mode():
        wanted_NC = load_model(model)[0](torch.from_numpy(images[:, None])).softmax(1).numpy()
    found_NC = np.array([list(answer["probabilities"].values()) for answer in answers])
    np.testing.assert_allclose(found_NC, wanted_NC, atol=1e-5)
    assert [answer["label"] for answer in answers] == [str(best) for best in wanted_NC.argmax(1)]


def test_what_is_not_an_image_is_refused_with_the_reason(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(url, b"no image")
    assert caught.value.code == 400
    assert "the image is not an image that can be read" in json.load(caught.value)["error"]
