"""The figures of validation and testing: against hand sums, and one that is added in one place."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from rcnn import progress
from rcnn.config import PipelineConfig
from rcnn.data.loader import load_training_data
from rcnn.evaluate.report import run_evaluate
from rcnn.progress import EpochProgress
from rcnn.results import IngestResult, TrainResult
from rcnn.scores import Scores, Share
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from rcnn.train.loop import Metrics, fit
from rcnn.train.step import score_logits


def test_figures_agree_with_a_hand_count() -> None:
    logits = torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 9]])
    scores = score_logits(logits, torch.tensor([0, 1, 1, 0]))
    assert scores.confusion.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert scores.error == 0.5
    truth = functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0]))
    assert scores.loss == pytest.approx(float(truth))


@given(st.integers(1, 60), st.integers(1, 7))
def test_shares_of_any_number_of_workers_add_up_to_the_whole(rows: int, workers: int) -> None:
    logits, labels = torch.randn(rows, 4), torch.randint(0, 4, (rows,))
    whole = score_logits(logits, labels)
    parts = [score_logits(logits[rank::workers], labels[rank::workers]) for rank in range(min(workers, rows))]
    total = sum(parts[1:], parts[0])
    assert torch.equal(total.confusion, whole.confusion)
    assert total.num_rows == rows
    assert total.loss == pytest.approx(whole.loss)


class Recording(NoTracker):
    """Keeps the metrics that MLflow would get."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        self.metrics |= metrics


@pytest.fixture
def trained(tiny_config: PipelineConfig, digits_storage: Path, digits: IngestResult, tmp_path: Path) -> Callable:
    """Trains for an epoch, in a copy of the storage; gives the config there, the epoch's metrics and the result."""

    def train() -> tuple[PipelineConfig, Metrics, TrainResult]:
        shutil.copytree(digits_storage, tmp_path / "storage")
        config = tiny_config.with_settings({"storage": str(tmp_path / "storage"), "train.epochs": 1})
        storage = Storage(config.storage)
        folder = storage.local_path("runs/train-0/model")
        folder.mkdir(parents=True)
        data = load_training_data(storage, digits.folder, num_rows=320)
        state = fit(config, data, lambda metrics: None)
        state.save_best(folder)
        storage.write_json("runs/train-0/history.json", state.history)
        result = TrainResult(
            folder="runs/train-0", weights_sha256="0", val_error=0.9, best_epoch=1, epochs=1, num_parameters=1,
            images_per_second=1, seconds=1,
        )  # fmt: skip
        return config, state.history[0], result

    return train


def test_a_metric_is_one_property_and_appears_everywhere(
    trained: Callable, digits: IngestResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def balanced_error(scores: Scores) -> float:
        right, rows = scores.confusion.diagonal(), scores.confusion.sum(1)
        return 1 - float((right[rows > 0] / rows[rows > 0]).mean())

    monkeypatch.setattr(Scores, "balanced_error", Share(balanced_error), raising=False)
    config, epoch, model = trained()
    assert 0.5 < epoch["val/balanced_error"] < 1  # to the history, to MLflow and to the screen
    lines: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    EpochProgress(1).finish_epoch(epoch)
    assert f"  val balanced error {100 * epoch['val/balanced_error']:.2f} %  " in lines[0]

    tracker, storage = Recording(), Storage(config.storage)
    result = run_evaluate(config, digits, model, StageFolder(storage, "reports/x"), tracker)
    value = tracker.metrics["test/balanced_error"]
    assert result.metrics["balanced_error"] == value
    assert {f"test/{name}" for name in result.metrics} <= tracker.metrics.keys()
    assert result.highlights(str)["test balanced error"] == f"{100 * value:.2f} %"
    assert f"\n| test balanced error | {100 * value:.2f} % |\n" in storage.local_path("reports/x/report.md").read_text()


def test_validation_and_testing_agree_on_the_same_rows(
    trained: Callable, digits: IngestResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rcnn.data.streaming import stored_rows
    from rcnn.evaluate import scoring

    config, epoch, model = trained()
    num_val = digits.rows["val"]
    monkeypatch.setattr(
        scoring, "stored_rows", lambda storage, folder, manifest, split: stored_rows(storage, folder, manifest, "val")
    )
    as_test = digits.model_copy(update={"rows": {"test": num_val}})
    result = run_evaluate(config, as_test, model, StageFolder(Storage(config.storage), "reports/x"), NoTracker())
    assert result.num_rows == num_val
    of_validation = {name: value for name, value in epoch.items() if name.startswith("val/")}
    assert {name: result.metrics[name.removeprefix("val/")] for name in of_validation} == pytest.approx(of_validation)
