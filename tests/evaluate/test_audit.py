"""The audit of a data set with known wrong labels, by a model that was trained on them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars
import pytest
from PIL import Image

from rcnn.config import PipelineConfig
from rcnn.data import ingest
from rcnn.data.ingest import run_ingest
from rcnn.data.manifest import Manifest, require_manifest
from rcnn.data.sources import open_source
from rcnn.data.sources.origin import Arrays, origin_of_arrays
from rcnn.evaluate.audit import delete_predictions, run_audit
from rcnn.evaluate.audited_rows import reason_to_skip, scoring_share
from rcnn.evaluate.report import run_evaluate
from rcnn.recipes import debug_tiny
from rcnn.results import AuditResult, IngestResult, TrainResult
from rcnn.stages import planned, stage_folder
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from rcnn.train.loop import fit, training_data
from tests.evaluate.scene import ingested, many_test_rows, untrained

QUICK = {
    "model.k": 16, "model.t": 1, "model.dropout": 0.2, "train.epochs": 8, "train.batch_size": 32,
    "train.learning_rate": 0.03, "train.schedule": "one_cycle", "train.num_rows": 0, "data.test_fraction": 0.2,
    "tune.enabled": False, "audit.train_rows": "always",
}  # fmt: skip
SHARE_OF_FLIPS = 0.02


@dataclass(frozen=True)
class Audited:
    """A finished audit, and the row ids whose labels were flipped."""

    result: AuditResult
    table: polars.DataFrame
    flipped: set[str]
    folder: Path

    def share_found(self, split: str, *, top: float) -> float:
        """Of a split's flipped rows, the share among the first `top` of its ranking."""
        ranked = self.table.filter(polars.col("split") == split).sort("rank")["row_id"].to_list()
        first = set(ranked[: round(top * len(ranked))])
        there = self.flipped & set(ranked)
        assert len(there) >= 0.01 * len(ranked)
        return len(there & first) / len(there)


def audit_with_flips(config: PipelineConfig, patch: pytest.MonkeyPatch) -> Audited:
    """Flips labels of the source to another class at random, then runs ingest, training, evaluation and audit on it."""
    rng = np.random.default_rng(0)
    storage = Storage(config.storage)
    origin = open_source(config.data, Path(config.storage))
    flipped: set[str] = set()
    parts = {}
    for part, labels in origin.labels.items():
        block, _ = origin.cut(part, np.arange(len(labels))).read()
        chosen = rng.choice(len(labels), round(SHARE_OF_FLIPS * len(labels)), replace=False)
        wrong = block.labels.copy()
        wrong[chosen] = (wrong[chosen] + rng.integers(1, 10, len(chosen))) % 10
        parts[part] = Arrays(block.images, wrong)
        flipped |= {block.row_ids[n] for n in chosen}
    changed = origin_of_arrays(parts, origin.classes, origin.record)
    patch.setattr(ingest, "open_source", lambda data, downloads: changed)
    data = run_ingest(config, StageFolder(storage, "datasets/x"), NoTracker())
    trained = trained_quickly(config, data, require_manifest(storage, data.folder))
    evaluated = run_evaluate(config, data, trained, StageFolder(storage, "reports/evaluate"), NoTracker())
    target = StageFolder(storage, "reports/audit")
    result = run_audit(config, data, trained, evaluated, target, NoTracker())
    delete_predictions(target)
    folder = storage.local_path(target.name)
    return Audited(result, polars.read_parquet(folder / "suspects.parquet"), flipped, folder)


def trained_quickly(config: PipelineConfig, data: IngestResult, manifest: Manifest) -> TrainResult:
    storage = Storage(config.storage)
    state = fit(config, training_data(config, storage, data.folder), lambda metrics: None)
    folder = storage.local_path("runs/train-0")
    (folder / "model").mkdir(parents=True)
    state.save_best(folder / "model")
    storage.write_json("runs/train-0/history.json", state.history)
    return TrainResult(
        folder="runs/train-0", weights_sha256="0", val_error=state.history[-1]["val/error"], best_epoch=1, epochs=1,
        num_parameters=1, images_per_second=1, seconds=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Audited:
    config = debug_tiny().with_settings(QUICK | {"storage": str(tmp_path_factory.mktemp("audit"))})
    with pytest.MonkeyPatch.context() as patch:
        return audit_with_flips(config, patch)


@pytest.mark.thorough
@pytest.mark.long
@pytest.mark.parametrize("split", ["test", "train"])  # of the 400 validation rows, 12 would have to hold all 10
def test_nine_of_ten_flipped_labels_are_in_the_first_3_percent(audited: Audited, split: str) -> None:
    assert audited.share_found(split, top=0.03) >= 0.9


@pytest.mark.long
def test_every_row_is_in_the_list_once_and_the_counts_are_its(audited: Audited) -> None:
    table = audited.table
    assert len(table) == table["row_id"].n_unique() == 5_000
    for split, num_rows in audited.result.num_rows.items():
        rows = table.filter(polars.col("split") == split)
        assert rows["rank"].to_list() == list(range(1, num_rows + 1))
        assert rows["is_suspect"].sum() == audited.result.suspects[split]
    assert (table["label"] != table["suggested"]).all()


@pytest.mark.long
def test_each_split_has_a_contact_sheet_and_the_predictions_are_deleted(audited: Audited) -> None:
    assert sorted(file.name for file in audited.folder.iterdir()) == [
        "suspects-train.png", "suspects-val.png", "suspects.parquet", "suspects.png"
    ]  # fmt: skip
    with Image.open(audited.folder / "suspects.png") as picture:
        assert picture.width > 600


def test_training_rows_are_left_out_of_short_trainings_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="rcnn")
    config = many_test_rows(tmp_path)
    data = ingested(config)
    trained = untrained(config, data)
    target = StageFolder(Storage(config.storage), "reports/evaluate")
    evaluated = run_evaluate(config, data, trained, target, NoTracker())
    results = {"ingest": data, "train": trained, "evaluate": evaluated}
    result = run_audit(config, data, trained, evaluated, stage_folder(config, "audit", results), NoTracker())
    assert set(result.num_rows) == {"test", "val"}
    assert "audit.train_rows = always" in result.skipped
    assert f"training rows are not scored: {result.skipped}" in caplog.text


def test_from_12_epochs_on_scoring_the_training_rows_costs_at_most_3_percent() -> None:
    config = PipelineConfig().with_settings({"train.epochs": 12})
    assert scoring_share(config, 50_000) == pytest.approx(1 / 36)
    assert reason_to_skip(config, 50_000) == ""
    assert reason_to_skip(config.with_settings({"train.epochs": 11}), 50_000)
    assert reason_to_skip(config.with_settings({"train.num_rows": 10_000}), 50_000)
    assert reason_to_skip(config.with_settings({"audit.train_rows": "never"}), 50_000)
    assert not reason_to_skip(config.with_settings({"train.epochs": 1, "audit.train_rows": "always"}), 50_000)


def test_a_pipeline_without_audit_has_no_such_stage() -> None:
    config = PipelineConfig().with_settings({"audit.enabled": False})
    assert planned(config) == ["ingest", "tune", "train", "evaluate", "register"]
    assert planned(PipelineConfig())[-2:] == ["audit", "register"]
