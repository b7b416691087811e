"""The same bits on any number of workers and threads, with real process groups of gloo."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rcnn.config import PipelineConfig
from rcnn.data.loader import load_training_data
from rcnn.errors import ConfigError
from rcnn.model.networks import NETWORKS
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train.loop import fit, training_data
from rcnn.train.shares import shares_of, subtrees

ROOT = Path(__file__).parents[2]
WORKER = """
import json, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from rcnn.config import PipelineConfig
from tests.train.test_shares import outcome_of

trees, folder, rank, num_ranks, threads, rendezvous = json.loads(sys.argv[1])
torch.set_num_threads(threads)
dist.init_process_group(
    "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=300)
)
print(json.dumps([outcome_of(PipelineConfig.model_validate(tree), folder) for tree in trees]))
"""


def outcome_of(config: PipelineConfig, folder: str) -> list[Any]:
    """The weights' SHA-256 and the history of a run as one worker of several, or as the only one."""
    state = fit(config, training_data(config, Storage(config.storage), folder), lambda metrics: None)
    weights = b"".join(tensor.numpy().tobytes() for tensor in state.model.state_dict().values())
    history = [{name: value for name, value in row.items() if "perf" not in name} for row in state.history]
    return [hashlib.sha256(weights).hexdigest(), history]


def outcomes_of(
    configs: Sequence[PipelineConfig], folder: str, tmp_path: Path, *, workers: int, threads: int = 1
) -> list[Any]:
    """The outcomes of runs on several workers, one process each: all must have the same."""
    trees = [config.model_dump(mode="json") for config in configs]
    arguments = [[trees, folder, rank, workers, threads, str(tmp_path / "rendezvous")] for rank in range(workers)]
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(each)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for each in arguments
    ]
    answers = [process.communicate(timeout=500)[0] for process in processes]
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


MODERN = {
    "model.t": 2, "train.any_t": True, "train.optimizer": "muon", "augment.flip": True, "augment.alternate_flips": True
}  # fmt: skip


def of_network(config: PipelineConfig, network: str) -> PipelineConfig:
    """The same for another network, and shorter."""
    unread = {"model.k": 32, "model.t": 3, "model.dropout": 0.2}
    own = {
        "model.network": network,
        "tune.enabled": False,
        "train.epochs": 1,
        "train.num_rows": 48,
        "train.ema_decay": 0,
    }
    own |= {name: value for name, value in unread.items() if name.removeprefix("model.") not in NETWORKS[network].reads}
    return shared(config, **own)


@pytest.mark.long
@pytest.mark.parametrize(
    ("workers", "threads"), [(2, 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((3, 2), (4, 1)))]
)
def test_any_number_of_workers_and_threads_ends_with_the_same_bits(
    tiny_config: PipelineConfig, digits: IngestResult, tmp_path: Path, workers: int, threads: int
) -> None:
    configs = [
        shared(tiny_config, **{"model.k": 16, "model.t": 2}),
        shared(tiny_config, **{"model.k": 12, "train.num_shares": 6}),  # torch's convolutions; a tree that is not full
        shared(tiny_config, **{"execution.loader": "streaming"}),
        shared(tiny_config, **MODERN),
    ]
    if workers == 2:
        configs += [of_network(tiny_config, network) for network in NETWORKS if network != "rcnn"]
    alone = [outcome_of(config, digits.folder) for config in configs]
    assert len({sha256 for sha256, _ in alone}) == len(configs)
    assert outcomes_of(configs, digits.folder, tmp_path, workers=workers, threads=threads) == alone


@pytest.mark.parametrize("settings", [{}, {"train.any_t": True, "model.t": 2}], ids=["fixed T", "any T"])
def test_shares_follow_torch_without_them(
    tiny_config: PipelineConfig, digits: IngestResult, settings: dict[str, Any]
) -> None:
    """One step after another, but for rounding: an independent way to the same gradients."""
    config = shared(tiny_config, **{"model.dropout": 0} | settings)
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
    with pytest.raises(
        ConfigError, match=r"train\.batch_size = 30 does not divide by train\.num_shares = 4 \(its .* to 28"
    ):
        tiny_config.with_settings({"train.deterministic": True, "train.batch_size": 30})
    with pytest.raises(ConfigError, match=r"execution\.num_workers = 8 is more than train\.num_shares = 4"):
        tiny_config.with_settings({"train.deterministic": True, "execution.num_workers": 8})


def test_the_threads_of_the_caller_stay_as_they_are(tiny_config: PipelineConfig, digits: IngestResult) -> None:
    config = shared(tiny_config, **{"train.epochs": 1, "train.num_rows": 48})
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.add(outcome_of(config, digits.folder)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
