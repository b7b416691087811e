"""The deployment "rcnn/batch-predict", with a real Prefect server and Ray."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from rcnn.config import PipelineConfig
from rcnn.data.manifest import require_manifest
from rcnn.errors import ConfigError
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train.checkpoint import build_classifier, save_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("prefect_server", "ray_session")]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tiny_config: PipelineConfig, digits: IngestResult, tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    manifest = require_manifest(Storage(tiny_config.storage), digits.folder)
    torch.manual_seed(0)
    save_model(build_classifier(tiny_config, manifest).state_dict(), tiny_config, manifest, tmp_path / "model")
    return str(tmp_path / "model")


def test_the_flow_predicts_a_folder_and_says_what_it_did(model: str, tmp_path: Path, capfd: Any) -> None:
    from flows.batch_predict import batch_predict

    (tmp_path / "in").mkdir()
    for number in range(3):
        Image.fromarray(np.full((28, 28), 80 * number, np.uint8)).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    to = str(tmp_path / "out")
    first = batch_predict(str(tmp_path / "in"), to, model)
    assert (first["rows"], first["bad"], first["is_finished"]) == (3, 1, True)
    assert pl.read_parquet(f"{to}/*.parquet")["row_id"].to_list() == ["0.png", "1.png", "2.png"]
    assert batch_predict(str(tmp_path / "in"), to, model) == first
    assert "nothing to do" in capfd.readouterr().err


def test_a_fault_of_the_input_is_the_flows_error(model: str, tmp_path: Path) -> None:
    from flows.batch_predict import batch_predict

    with pytest.raises(ConfigError, match="does not exist"):
        batch_predict(str(tmp_path / "absent"), str(tmp_path / "out"), model)
