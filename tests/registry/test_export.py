"""Exported models answer as the live model does, in programs that know nothing of this project."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.data.manifest import require_manifest
from rcnn.errors import ConfigError, DataError
from rcnn.model.networks import NETWORKS
from rcnn.registry import export
from rcnn.registry.export import METADATA, export_model
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train.checkpoint import build_classifier, load_model, save_model

pytestmark = pytest.mark.long


def written(config: PipelineConfig, digits: IngestResult, folder: Path, **settings: Any) -> Path:
    """A model with initial weights, but with running statistics and a crop that a trained one could have."""
    folder.mkdir(parents=True)
    manifest = require_manifest(Storage(config.storage), digits.folder)
    network = settings.get("network", "rcnn")
    unread = [name for name in ("k", "t", "dropout") if name not in NETWORKS[network].reads]
    usual = {name: getattr(PipelineConfig().model, name) for name in unread}
    changes = {f"model.{name}": value for name, value in (usual | settings).items()}
    changed = config.with_settings(changes | {"tune.enabled": False})
    torch.manual_seed(0)
    model = build_classifier(changed, manifest)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.uniform_(0, 0.5)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    save_model(model.state_dict(), changed, manifest, folder)
    return folder


@pytest.fixture(scope="module")
def model(tiny_config: PipelineConfig, digits: IngestResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tiny_config, digits, tmp_path_factory.mktemp("models") / "model")


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 1, 28, 28), dtype=np.uint8)


def live(folder: Path, images_NCHW: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(load_model(folder)[0](torch.from_numpy(images_NCHW)))


@pytest.mark.parametrize("network", NETWORKS)
def test_both_formats_of_each_network_answer_any_number_of_images(
    tiny_config: PipelineConfig, digits: IngestResult, tmp_path: Path, network: str
) -> None:
    folder = written(tiny_config, digits, tmp_path / "model", network=network, crop=24 if network == "rcnn" else 0)
    files = {each.file.suffix: each for each in export_model(folder, tmp_path / "out")}
    assert all(each.difference < 1e-5 for each in files.values())
    session = onnxruntime.InferenceSession(files[".onnx"].file)
    program = torch.export.load(files[".pt2"].file).module()
    for count in (1, 3, 130):  # none but the first is one that the export was checked with
        images_NCHW = random_images(count)
        wanted_NC = live(folder, images_NCHW)
        assert np.ptp(wanted_NC) > 1e-3
        scale = max(1, np.abs(wanted_NC).max())
        [from_onnx] = session.run(None, {"images": images_NCHW})
        np.testing.assert_allclose(from_onnx, wanted_NC, atol=1e-5 * scale, rtol=0)
        with torch.inference_mode():
            from_pt2 = program(torch.from_numpy(images_NCHW))
        np.testing.assert_allclose(from_pt2.numpy(), wanted_NC, atol=1e-5 * scale, rtol=0)


def test_files_say_what_goes_in_and_what_comes_out(model: Path, tmp_path: Path) -> None:
    export_model(model, tmp_path)
    description = json.loads((model / "model.json").read_text())
    extra = {METADATA: ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    of_onnx = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(of_onnx, full_check=True)
    found = {entry.key: json.loads(entry.value) for entry in of_onnx.metadata_props if not entry.key.startswith("pkg.")}
    assert found == json.loads(extra[METADATA])
    assert found["classes"] == [str(digit) for digit in range(10)]
    assert found["image_shape"] == [28, 28, 1]
    assert found["data_digest"] == description["data_digest"]
    [images] = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["N", 1, 28, 28])


def test_an_export_that_answers_differently_is_refused_with_the_figure(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    network, _ = load_model(model)
    weights = network.state_dict()
    weights["network.classifier.bias"][3] += 0.5
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, other / "model.safetensors")
    changed, _ = load_model(other)
    trace = export._traced
    monkeypatch.setattr(export, "_traced", lambda _, shape: trace(changed, shape))
    for kind in ("pt2", "onnx"):
        with pytest.raises(DataError, match=rf"model\.{kind}: its logits differ from the model's by \d\.\de-0\d"):
            export_model(model, tmp_path / "out", [kind])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_exists_is_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("mine")
    with pytest.raises(ConfigError, match=r"model\.onnx: exists"):
        export_model(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "mine"


def test_the_command_writes_the_formats_that_it_is_asked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--model", str(model), "--to", str(tmp_path / "out"), "--format", "onnx"]) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.onnx"]
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path}/out/model.onnx: 0.")
    assert printed.endswith("of the model's in batches of 1, 7 and 64\n")
    assert main(["export", "--model", str(tmp_path / "absent"), "--to", str(tmp_path)]) == 2
    assert "absent: does not hold a model" in capsys.readouterr().err
