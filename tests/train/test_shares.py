"""The same bits on any number of workers and threads, with real process groups of gloo."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rcnn.config import PipelineConfig
from rcnn.data.loader import TrainingData, load_training_data
from rcnn.errors import ConfigError
from rcnn.model.networks import NETWORKS
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train.checkpoint import TrainState
from rcnn.train.loop import fit
from rcnn.train.shares import shares_of, subtrees

WORKER = """
import hashlib, json, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from rcnn.config import PipelineConfig
from rcnn.storage import Storage, StageFolder
from rcnn.train.checkpoint_store import CheckpointStore
from rcnn.train.loop import fit, training_data

tree, folder, rank, num_ranks, threads, rendezvous, checkpoints = json.loads(sys.argv[1])
torch.set_num_threads(threads)
if num_ranks > 1:
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120)
    )
config = PipelineConfig.model_validate(tree)
store = CheckpointStore(StageFolder(Storage(checkpoints), "run")) if checkpoints else None
state = fit(config, training_data(config, Storage(config.storage), folder), lambda metrics: None, checkpoints=store)
weights = b"".join(tensor.numpy().tobytes() for tensor in state.model.state_dict().values())
history = [{name: value for name, value in row.items() if "perf" not in name} for row in state.history]
print(json.dumps([hashlib.sha256(weights).hexdigest(), history]))
"""


def run_of(
    config: PipelineConfig,
    digits: IngestResult,
    tmp_path: Path,
    *,
    workers: int,
    threads: int = 1,
    checkpoints: str = "",
) -> list[Any]:
    """The weights' SHA-256 and the history of a run: all workers must have the same."""
    rendezvous = tmp_path / f"{workers}-{threads}-{len(list(tmp_path.iterdir()))}"
    arguments = [
        [config.model_dump(mode="json"), digits.folder, rank, workers, threads, str(rendezvous), checkpoints]
        for rank in range(workers)
    ]
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(each)], stdout=subprocess.PIPE, text=True)
        for each in arguments
    ]
    answers = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * workers
    assert len(set(answers)) == 1
    return json.loads(answers[0])  # type: ignore[no-any-return]


def shared(config: PipelineConfig, **settings: object) -> PipelineConfig:
    """A short deterministic run with everything that draws random numbers."""
    usual = {
        "train.deterministic": True, "train.batch_size": 24, "train.num_rows": 240, "train.epochs": 2, "augment.max_shift": 2,
        "model.dropout": 0.3, "train.ema_decay": 0.9, "train.clip_norm": 0.5, "train.learning_rate": 0.02,
    }  # fmt: skip
    return config.with_settings(usual | settings)


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"model.k": 16, "model.t": 2},
        {"model.k": 12, "train.num_shares": 6},  # torch's convolutions, and a tree that is no power of two
        {"execution.loader": "streaming"},
    ],
)
def test_the_same_bits_on_one_two_three_and_four_workers_of_one_or_two_threads(
    tiny_config: PipelineConfig, digits: IngestResult, tmp_path: Path, settings: Mapping[str, object]
) -> None:
    config = shared(tiny_config, **settings)
    sha256, history = run_of(config, digits, tmp_path, workers=1)
    assert len(sha256) == 64
    assert [row["epoch"] for row in history] == [1, 2]
    for workers, threads in ((1, 2), (2, 1), (3, 2), (4, 1)):
        assert run_of(config, digits, tmp_path, workers=workers, threads=threads) == [sha256, history], (
            workers,
            threads,
        )


@pytest.mark.long
@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "rcnn"])
def test_every_network_has_the_same_bits(
    tiny_config: PipelineConfig, digits: IngestResult, tmp_path: Path, network: str
) -> None:
    reads = NETWORKS[network].reads
    unread = {"model.k": 32, "model.t": 3, "model.dropout": 0.2}
    own = {
        "model.network": network,
        "tune.enabled": False,
        "train.epochs": 1,
        "train.num_rows": 72,
        "train.ema_decay": 0,
    }
    settings = own | {name: value for name, value in unread.items() if name.removeprefix("model.") not in reads}
    config = shared(tiny_config, **settings)
    one = run_of(config, digits, tmp_path, workers=1)
    assert run_of(config, digits, tmp_path, workers=2) == one


def test_shares_follow_torch_without_them(tiny_config: PipelineConfig, digits: IngestResult) -> None:
    """One step after another, but for rounding: an independent way to the same gradients."""
    config = shared(tiny_config, **{"model.dropout": 0})
    data = load_training_data(Storage(config.storage), digits.folder, num_rows=240)
    with_shares = fit(config, data, lambda metrics: None)
    without = fit(config.with_settings({"train.deterministic": False}), data, lambda metrics: None)
    for ours, theirs in zip(with_shares.history, without.history, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    other = without.model.state_dict()
    for name, tensor in with_shares.model.state_dict().items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)


def test_averaged_statistics_are_those_of_the_shares(tiny_config: PipelineConfig, digits: IngestResult) -> None:
    settings = {
        "model.network": "rcnn_bn",
        "tune.enabled": False,
        "train.epochs": 1,
        "model.dropout": 0,
        "train.ema_decay": 0,
    }
    config = shared(tiny_config, **settings)
    data = load_training_data(Storage(config.storage), digits.folder, num_rows=240)
    state = fit(config, data, lambda metrics: None)
    assert float(state.model.network.first_norm.running_mean.abs().sum()) > 0  # type: ignore[union-attr, operator]
    assert 0 < state.history[0]["val/error"] < 1


def test_a_worker_owns_neighbours_and_adds_up_whole_parts_of_the_tree() -> None:
    assert [shares_of(8, rank, 3) for rank in range(3)] == [range(2), range(2, 5), range(5, 8)]
    assert subtrees(range(2, 5), range(8)) == [range(2, 4), range(4, 5)]
    assert subtrees(range(4), range(4)) == [range(4)]
    assert subtrees(range(1, 3), range(4)) == [range(1, 2), range(2, 3)]


def test_what_does_not_divide_is_refused(tiny_config: PipelineConfig) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size = 30 does not divide by train\.num_shares = 4; .* to 28"):
        tiny_config.with_settings({"train.deterministic": True, "train.batch_size": 30})
    with pytest.raises(ConfigError, match=r"execution\.num_workers = 8 is more than train\.num_shares = 4"):
        tiny_config.with_settings({"train.deterministic": True, "execution.num_workers": 8})


def weights_of(state: TrainState) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in state.model.state_dict().values())).hexdigest()


def test_the_threads_of_the_caller_stay_as_they_are(tiny_config: PipelineConfig, digits: IngestResult) -> None:
    data: TrainingData = load_training_data(Storage(tiny_config.storage), digits.folder, num_rows=48)
    config = shared(tiny_config, **{"train.epochs": 1, "train.num_rows": 48})
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.add(weights_of(fit(config, data, lambda metrics: None)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
