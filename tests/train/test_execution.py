"""How steps are carried out: precision, compiling, determinism, memory."""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch

from rcnn.config import PipelineConfig
from rcnn.data.loader import TrainingData, load_training_data
from rcnn.errors import ClusterError
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train import execution
from rcnn.train.checkpoint import TrainState
from rcnn.train.execution import STEPS_WORTH_COMPILING, choose_execution, prepare
from rcnn.train.loop import fit

pytestmark = pytest.mark.long

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def data(tiny_config: PipelineConfig, digits: IngestResult) -> TrainingData:
    return load_training_data(Storage(tiny_config.storage), digits.folder, num_rows=320)


def changed(config: PipelineConfig, settings: Mapping[str, object]) -> PipelineConfig:
    """The config with settings of `train` or `execution`."""
    own = type(config.execution).model_fields
    return config.with_settings(
        {f"{'execution' if name in own else 'train'}.{name}": value for name, value in settings.items()}
    )


def trained(config: PipelineConfig, data: TrainingData, **settings: object) -> TrainState:
    return fit(changed(config, settings), data, lambda metrics: None)


@pytest.mark.parametrize(
    ("settings", "device", "has_bfloat16", "num_steps", "precision", "is_compiled", "reason"),
    [
        ({}, CPU, False, 10**9, "float32", False, "auto: on a CPU it gains nothing"),
        ({"precision": "bfloat16"}, CPU, False, 10, "bfloat16", False, "on a CPU"),
        ({"compile": "on"}, CPU, False, 10, "float32", True, "execution.compile = on"),
        ({}, GPU, True, 100, "bfloat16", False, "auto: 100 steps are too few to pay for compiling"),
        ({}, GPU, True, STEPS_WORTH_COMPILING, "bfloat16", True, "steps pay for compiling"),
        ({}, GPU, False, 100, "float32", False, "too few"),
        ({"precision": "float32", "compile": "off"}, GPU, True, 10**9, "float32", False, "execution.compile = off"),
    ],
)
def test_settings_and_device_decide_and_the_reason_is_told(
    tiny_config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], device: torch.device,
    has_bfloat16: bool, num_steps: int, precision: str, is_compiled: bool, reason: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(execution, "_has_bfloat16", lambda device: has_bfloat16)
    chosen = choose_execution(changed(tiny_config, settings), device, num_steps=num_steps)
    assert chosen.precision == getattr(torch, precision)
    assert chosen.is_compiled == is_compiled
    assert reason in str(chosen)
    assert precision in str(chosen)


def test_a_run_tells_how_it_trains(
    tiny_config: PipelineConfig, data: TrainingData, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="rcnn"):
        trained(tiny_config, data, epochs=1)
    threads = torch.get_num_threads()
    assert (
        f"training on the CPU (threads: {threads}) in float32, not compiled (auto: on a CPU it gains nothing)"
        in caplog.text
    )


def test_bfloat16_learns_alike_with_float32_weights(tiny_config: PipelineConfig, data: TrainingData) -> None:
    narrow, wide = (trained(tiny_config, data, precision=name) for name in ("bfloat16", "float32"))
    for ours, theirs in zip(narrow.history, wide.history, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=0.01)
        assert ours["train/loss"] != theirs["train/loss"]
    assert {tensor.dtype for tensor in narrow.model.parameters()} == {torch.float32}
    held = [value for kept in narrow.optimizer.state.values() for value in kept.values()]
    assert {value.dtype for value in held} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_deterministic_runs_give_the_same_bits_in_every_process(precision: str) -> None:
    code = f"""
import hashlib, torch
from rcnn.model import RCNN
from rcnn.train.optim import SGD
from rcnn.train.execution import prepare
from rcnn.train.step import train_step
torch.set_num_threads(2)
prepare(torch.device("cpu"), deterministic=True)
torch.manual_seed(0)
model = RCNN(24, 2, 3, 10).to(memory_format=torch.channels_last)
optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
images, labels = torch.randn(32, 3, 24, 24), torch.randint(10, (32,))
for _ in range(4):
    train_step(model, optimizer, images, labels, clip_norm=1.0, precision=torch.{precision})
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert len(runs[0].stdout.strip()) == 64
    assert runs[0].stdout == runs[1].stdout


def test_the_deterministic_mode_is_on_while_it_trains_and_off_again_in_the_next_run(
    tiny_config: PipelineConfig, data: TrainingData
) -> None:
    modes = []
    for wanted in (True, False):
        config = tiny_config.with_settings({"train.deterministic": wanted, "train.epochs": 1})
        fit(config, data, lambda metrics: modes.append(torch.are_deterministic_algorithms_enabled()))
    assert modes == [True, False]


def test_deterministic_products_on_a_gpu_get_the_workspace_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that what was there before comes back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    prepare(GPU, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    prepare(GPU)
    assert torch.backends.cudnn.benchmark
    prepare(CPU)


def test_recomputing_changes_nothing_but_the_memory(tiny_config: PipelineConfig, data: TrainingData) -> None:
    config = tiny_config.with_settings({"model.t": 3, "train.deterministic": True})
    keeping, recomputing = (trained(config, data, recompute=value).model.state_dict() for value in (False, True))
    assert all(torch.equal(tensor, recomputing[name]) for name, tensor in keeping.items())


@pytest.mark.slow
def test_the_compiled_step_learns_alike(tiny_config: PipelineConfig, data: TrainingData) -> None:
    config = tiny_config.with_settings({"model.dropout": 0})  # compiled code draws other random numbers
    compiled, eager = (trained(config, data, compile=value).history for value in ("on", "off"))
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
        assert ours["val/error"] == pytest.approx(theirs["val/error"], abs=0.05)


def test_without_a_compiler_on_is_an_error_and_auto_is_off(
    tiny_config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    on, auto = (tiny_config.with_settings({"execution.compile": value}) for value in ("on", "auto"))
    with pytest.raises(ClusterError, match=r"execution\.compile = on: torch compiles with no-such-compiler"):
        choose_execution(on, CPU, num_steps=10)
    monkeypatch.setattr(execution, "_has_bfloat16", lambda device: True)
    assert "not compiled (auto: there is no C++ compiler)" in str(choose_execution(auto, GPU, num_steps=10**6))
