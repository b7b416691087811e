"""Training on real Ray workers."""

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, TrainingError
from rcnn.results import IngestResult, TrainResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from rcnn.train.limit import allows_no_more
from rcnn.train.pace import STEPS_BETWEEN_LOOKS

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


class Recorder(NoTracker):
    """Remembers the metrics by step."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log_metrics(self, metrics: Any, *, step: int = 0) -> None:
        if "val/error" in metrics:  # not the figures of the whole run, which come last
            self.steps.append(step)


def train(config: PipelineConfig, digits: IngestResult, folder: str, tracker: Any = None) -> TrainResult:
    from rcnn.train.ray_trainer import run_train

    return run_train(config, digits, StageFolder(Storage(config.storage), folder), tracker or NoTracker())


def model_weights(config: PipelineConfig, result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(Path(config.storage, result.folder, "model", "model.safetensors"))


@pytest.mark.slow
def test_a_killed_worker_is_replaced_its_run_agrees_with_that_of_two_and_is_not_trained_again(
    tiny_config: PipelineConfig, digits: IngestResult, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config.with_settings(
        {"model.dropout": 0, "model.t": 4, "train.epochs": 8, "train.num_rows": 2000, "train.learning_rate": 0.0001,
         "execution.keep_checkpoints": 1}
    )  # fmt: skip
    killed: list[int] = []

    class Killer(Recorder):
        def log_metrics(self, metrics: Any, *, step: int = 0) -> None:
            super().log_metrics(metrics, step=step)
            if step == 1 and not killed:  # it learns of an epoch late: the ones after it must take longer than that
                ours = psutil.Process().children(recursive=True)
                victim = next(process for process in ours if "RayTrainWorker" in " ".join(_command(process)))
                killed.append(victim.pid)
                os.kill(victim.pid, signal.SIGKILL)

    killer, before = Killer(), _actors()
    with caplog.at_level(logging.INFO, logger="rcnn"):
        one = train(config, digits, "runs/killed", killer)
    assert "training on the CPU (threads: 1) in float32" in caplog.text  # said by the worker
    started = {name for actor, name in _actors().items() if actor not in before}
    assert started == {"_Notes", "TrainController", "SynchronizationActor", "RayTrainWorker"}  # no other helpers
    assert "the training failed (" in caplog.text
    assert "resuming after epoch" in caplog.text
    assert killed
    assert one.epochs == 8
    assert one.num_parameters == 4938
    assert sorted(set(killer.steps)) == list(range(1, 9))
    assert killer.steps[-1] == 8
    assert killer.steps.count(1) == 1  # it went on from a checkpoint, and not from the start

    two = train(config.with_settings({"execution.num_workers": 2}), digits, "runs/two")
    kept = list(Path(config.storage, "runs/two").rglob("*.pt"))
    assert [file.stem for file in kept] == ["000008-0-00000000"]
    storage = Storage(config.storage)
    histories = [storage.read_json(f"{result.folder}/history.json") for result in (one, two)]
    for ours, theirs in zip(*histories, strict=True):
        for name in ("train/loss", "val/loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
        assert abs(ours["val/error"] - theirs["val/error"]) < 2.5 / 450  # a row near the border may change sides
    theirs_by_name = model_weights(config, two)
    for name, tensor in model_weights(config, one).items():  # rounding grows with the steps: an element differs by 1e-3
        assert (tensor - theirs_by_name[name]).norm() <= 0.01 * tensor.norm()

    recorder = Recorder()
    again = train(config, digits, "runs/killed", recorder)
    assert recorder.steps == []  # all epochs are in the last checkpoint
    assert (again.val_error, again.weights_sha256) == (one.val_error, one.weights_sha256)


def _actors() -> dict[str, str]:
    """The class of each actor that this Ray has started, by id."""
    from ray._private.state import actors

    return {actor: tree["ActorClassName"] for actor, tree in actors().items()}


@pytest.mark.thorough
def test_a_limit_ends_two_workers_at_one_step_and_without_it_they_stream_uneven_rows_to_the_end(
    tiny_config: PipelineConfig, digits: IngestResult
) -> None:
    config = tiny_config.with_settings(
        {"execution.loader": "streaming", "train.num_rows": 333, "execution.num_workers": 2, "train.batch_size": 10}
    )
    limit = config.with_settings({"train.max_minutes": 0.001})
    limited = train(limit, digits, "runs/streaming")
    assert limited.epochs == pytest.approx(STEPS_BETWEEN_LOOKS / 33, abs=0.001)
    assert limited.highlights(str)["ended early"] == "train.max_minutes = 0.001 ended it after 0.303 epochs"
    target = StageFolder(Storage(config.storage), "runs/streaming")
    assert allows_no_more(limit, limited, target)
    assert not allows_no_more(config, limited, target)
    whole = train(config, digits, "runs/streaming")
    assert whole.epochs == 2
    assert whole.limit_minutes == 0
    assert whole.predicted_seconds == pytest.approx(whole.seconds, rel=0.7)
    assert 0 < whole.predicted_peak_bytes <= whole.peak_bytes < 1e10


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_diverging_run_ends_at_once_with_its_own_error(tiny_config: PipelineConfig, digits: IngestResult) -> None:
    config = tiny_config.with_settings({"train.learning_rate": 10, "train.weight_decay": 1000, "train.clip_norm": 0})
    started = time.monotonic()
    with pytest.raises(TrainingError, match=r"train\.learning_rate = 10\.0: the training loss is"):
        train(config, digits, "runs/diverging")
    assert time.monotonic() - started < 120


def test_a_ray_of_our_own_listens_on_loopback_alone() -> None:
    import ray

    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
    ours = [p for p in psutil.process_iter(["name"]) if any("ray" in word for word in _command(p)[:2])]
    listening = {
        connection.laddr.ip
        for process in ours
        for connection in _connections(process)
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def _connections(process: psutil.Process) -> list[Any]:
    try:
        return process.net_connections(kind="tcp")
    except psutil.Error:
        return []


def test_more_cores_than_there_are_is_an_error(tiny_config: PipelineConfig, digits: IngestResult) -> None:
    config = tiny_config.with_settings({"execution.num_workers": 32})
    with pytest.raises(ClusterError, match=r"execution\.num_workers.*: 32 CPU cores are wanted and Ray has 2"):
        train(config, digits, "runs/huge")
    with pytest.raises(ClusterError, match="1 GPUs are wanted and Ray has 0"):
        train(tiny_config.with_settings({"execution.use_gpu": True}), digits, "runs/gpu")
