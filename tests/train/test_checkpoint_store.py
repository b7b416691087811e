"""Checkpoints: resumed at any step, checked, replaced, and never in the way of training."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rcnn.config import PipelineConfig
from rcnn.data.loader import TrainingData, load_training_data
from rcnn.errors import ClusterError, TrainingError
from rcnn.results import IngestResult
from rcnn.storage import StageFolder, Storage
from rcnn.train.checkpoint import TrainState
from rcnn.train.checkpoint_store import FOLDER, CheckpointStore, read_records
from rcnn.train.loop import Stopped, fit

STEPS_PER_EPOCH = 10


@pytest.fixture(scope="module")
def data(tiny_config: PipelineConfig, digits: IngestResult) -> TrainingData:
    return load_training_data(Storage(tiny_config.storage), digits.folder, num_rows=320)


@pytest.fixture
def config(tiny_config: PipelineConfig) -> PipelineConfig:
    return tiny_config.with_settings(
        {"train.epochs": 3, "train.schedule": "one_cycle", "train.ema_decay": 0.9, "augment.max_shift": 2,
         "model.dropout": 0.3, "train.deterministic": True}
    )  # fmt: skip


@pytest.fixture
def target(tmp_path: Path) -> StageFolder:
    return StageFolder(Storage(str(tmp_path)), "run")


def after(num_steps: int) -> Any:
    """A request to stop that comes after some steps."""
    left = iter(range(num_steps - 1, -1, -1))
    return lambda: next(left) == 0


def run(config: PipelineConfig, data: TrainingData, target: StageFolder, **options: Any) -> TrainState:
    return fit(config, data, lambda metrics: None, checkpoints=CheckpointStore(target), **options)


def what_was_learned(state: TrainState) -> list[Any]:
    """All that should not depend on interruptions."""
    history = [{name: value for name, value in row.items() if "perf" not in name} for row in state.history]
    weights = [*state.model.state_dict().values(), *state.best["weights"].values()]
    return [[tensor.numpy().tobytes() for tensor in weights], history, state.best["epoch"]]


@pytest.mark.long
@pytest.mark.parametrize("loader", ["resident", "streaming"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_run_that_is_stopped_at_any_step_ends_with_the_same_bits(
    config: PipelineConfig, digits: IngestResult, target: StageFolder, loader: str, deterministic: bool
) -> None:
    config = config.with_settings({"train.deterministic": deterministic})
    data = load_training_data(Storage(config.storage), digits.folder, num_rows=320, engine=loader)
    torch.set_num_threads(1)
    whole = fit(config, data, lambda metrics: None)
    for num_steps in (1, 3, STEPS_PER_EPOCH - 4, 2):
        with pytest.raises(Stopped):
            run(config, data, target, is_stopping=after(num_steps))
    assert [record.name for record in read_records(target)] == [
        "000001-0-00000000",
        "000001-0-00000002",
    ]  # stopped after the last step too
    assert what_was_learned(run(config, data, target)) == what_was_learned(whole)


def test_checkpoints_come_with_the_clock_and_the_last_ones_are_kept(
    config: PipelineConfig, data: TrainingData, target: StageFolder
) -> None:
    often = config.with_settings({"execution.checkpoint_minutes": 1e-9, "train.epochs": 1})
    fit(often, data, lambda metrics: None, checkpoints=CheckpointStore(target, keep=3))
    assert [(record.epoch, record.step) for record in read_records(target)] == [(0, 9), (0, 10), (1, 0)]
    files = {Path(file).name for file in target.storage.list_sizes(target.path(FOLDER))}
    assert len(files) == 6  # a file and a record each, and no draft


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    config: PipelineConfig, data: TrainingData, target: StageFolder, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(config, data, target)
    newest = Path(target.storage.root, target.path(FOLDER), f"{read_records(target)[-1].name}.pt")
    content = newest.read_bytes()
    newest.write_bytes(
        {"cut": content[:-1], "changed": content[:-9] + b"x" + content[-8:], "missing": b"", "empty": b""}[damage]
    )
    if damage == "missing":
        newest.unlink()
    with caplog.at_level(logging.INFO, logger="rcnn"):
        resumed = run(config, data, target)
    assert f"{newest}: " in caplog.text
    assert "using the one before it" in caplog.text
    assert "resuming after epoch 2 of 3" in caplog.text
    assert what_was_learned(resumed) == what_was_learned(whole)


def test_a_damaged_checkpoint_does_not_outlive_those_that_follow_it(
    config: PipelineConfig, data: TrainingData, target: StageFolder
) -> None:
    """It is the newest by name: kept, each new one would be deleted as the oldest."""
    run(config, data, target)
    for record in read_records(target):
        target.storage.write_bytes(target.path(f"{FOLDER}/{record.name}.pt"), b"damaged")
    target.storage.write_bytes(target.path(f"{FOLDER}/000009-0-00000000.pt.1234.part"), b"of a killed process")
    target.storage.write_bytes(target.path(f"{FOLDER}/000009-0-00000000.pt"), b"without a record")
    with pytest.raises(Stopped):
        run(config, data, target, is_stopping=after(2))
    assert [record.name for record in read_records(target)] == ["000000-0-00000002"]
    assert len(target.storage.list_sizes(target.path(FOLDER))) == 2


@pytest.mark.long
def test_a_checkpoint_that_is_being_written_survives_an_error(
    config: PipelineConfig, data: TrainingData, target: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Storage.write_bytes

    def slow(storage: Storage, name: str, content: Any, **options: Any) -> None:
        time.sleep(0.5)
        write(storage, name, content, **options)

    def fail(metrics: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Storage, "write_bytes", slow)
    with pytest.raises(RuntimeError, match="a bug"):
        fit(config, data, fail, checkpoints=CheckpointStore(target))
    assert [record.name for record in read_records(target)] == ["000001-0-00000000"]


def test_a_record_that_is_none_is_ignored_and_named(
    config: PipelineConfig, data: TrainingData, target: StageFolder, caplog: pytest.LogCaptureFixture
) -> None:
    run(config.with_settings({"train.epochs": 1}), data, target)
    for text in ("{", "[]", '{"epoch": 1}'):
        target.storage.write_text(target.path(f"{FOLDER}/000009-0-00000000.json"), text)
        with caplog.at_level(logging.INFO, logger="rcnn"):
            assert [record.epoch for record in read_records(target)] == [1]
        assert "000009-0-00000000.json: is not the record of a checkpoint; ignored" in caplog.text


@pytest.mark.long
def test_a_full_disk_does_not_end_training_but_a_lost_last_checkpoint_does(
    config: PipelineConfig, data: TrainingData, target: StageFolder, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    write, fails = Storage.write_bytes, [True, False, False]

    def full_at_first(storage: Storage, name: str, content: Any, **options: Any) -> None:
        if name.endswith(".pt") and (fails.pop(0) if len(fails) > 1 else fails[0]):
            raise ClusterError("cannot be written (No space left on device)", where=name)
        write(storage, name, content, **options)

    monkeypatch.setattr(Storage, "write_bytes", full_at_first)
    with caplog.at_level(logging.INFO, logger="rcnn"):
        state = run(config, data, target)
    assert len(state.history) == 3
    assert "a checkpoint is lost, and training goes on without it: cannot be written (No space left" in caplog.text
    assert [record.epoch for record in read_records(target)] == [2, 3]
    fails[:] = [True]
    with pytest.raises(ClusterError, match="No space left"):
        run(config.with_settings({"execution.checkpoint_minutes": 60}), data, StageFolder(target.storage, "other"))


def test_another_data_set_is_refused(config: PipelineConfig, data: TrainingData, target: StageFolder) -> None:
    run(config.with_settings({"train.epochs": 1}), data, target)
    other = TrainingData(data.manifest.model_copy(update={"digest": "other"}), data.train, data.val)
    with pytest.raises(TrainingError, match="made with another data set"):
        run(config, other, target)


def test_a_loss_that_is_no_number_leaves_no_checkpoint_of_its_weights(
    config: PipelineConfig, data: TrainingData, target: StageFolder
) -> None:
    wild = config.with_settings(
        {"train.learning_rate": 10, "train.weight_decay": 1000, "train.clip_norm": 0, "train.schedule": "plateau",
         "execution.checkpoint_minutes": 1e-9}
    )  # fmt: skip
    with pytest.raises(TrainingError, match="the training loss is"):
        run(wild, data, target)
    store = CheckpointStore(target)
    assert all(math.isfinite(float(store.read(record)["loss_sum"])) for record in read_records(target))


def test_a_storage_that_cannot_be_read_is_no_reason_to_begin_from_the_start(
    config: PipelineConfig, data: TrainingData, target: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config.with_settings({"train.epochs": 1}), data, target)

    read = Storage.read_bytes

    def fail(self: Storage, name: str) -> bytes:
        if name.endswith(".pt"):
            raise OSError("slow down")
        return read(self, name)

    monkeypatch.setattr(Storage, "read_bytes", fail)
    with pytest.raises(ClusterError, match=r"000001-0-00000000\.pt: cannot be read \(slow down\)") as caught:
        run(config, data, target)
    assert caught.value.retryable
    assert len(read_records(target)) == 1


def test_what_follows_a_roll_back_is_newer_than_what_it_replaces(
    config: PipelineConfig, data: TrainingData, target: StageFolder
) -> None:
    snapshot = run(config.with_settings({"train.epochs": 1}), data, target).snapshot()
    store = CheckpointStore(target, keep=1)
    for place in ((1, 0, 0), (1, 9, 0), (1, 3, 1), (1, 6, 1)):  # epoch, step, roll-backs
        store.write(snapshot | dict(zip(("epoch", "step", "roll_backs"), place, strict=True)))
    store.close()
    newest = store.newest()
    assert newest is not None
    assert (newest.epoch, newest.step, newest.roll_backs) == (1, 6, 1)
    assert [record.step for record in read_records(target)] == [0, 6]  # the start of the epoch, and the last one
