"""What a report says of the model that it is about."""

import shutil
from pathlib import Path

from rcnn.config import PipelineConfig
from rcnn.data.manifest import require_manifest
from rcnn.evaluate.report import run_evaluate
from rcnn.results import IngestResult, TrainResult
from rcnn.stages import STAGES
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from rcnn.train.checkpoint import build_classifier, save_model


def test_the_report_and_the_line_before_training_name_the_network(
    tiny_config: PipelineConfig, digits_storage: Path, digits: IngestResult, tmp_path: Path
) -> None:
    shutil.copytree(digits_storage, tmp_path / "storage")
    config = tiny_config.with_settings(
        {
            "storage": str(tmp_path / "storage"),
            "model.network": "wide",
            "model.k": 8,
            "model.t": 3,
            "tune.enabled": False,
        }
    )
    storage = Storage(config.storage)
    folder = storage.local_path("runs/train-0")
    (folder / "model").mkdir(parents=True)
    manifest = require_manifest(storage, digits.folder)
    save_model(build_classifier(config, manifest).state_dict(), config, manifest, folder / "model")
    history = [{"epoch": 1, "val/error": 0.9, "val/loss": 2.3, "train/loss": 2.3, "learning_rate": 0.01}]
    storage.write_json("runs/train-0/history.json", history)
    trained = TrainResult(
        folder="runs/train-0", weights_sha256="0", val_error=0.9, best_epoch=1, epochs=1, num_parameters=1,
        images_per_second=1, seconds=1,
    )  # fmt: skip
    scored = run_evaluate(config, digits, trained, StageFolder(storage, "reports/x"), NoTracker())
    report = (tmp_path / "storage/reports/x/report.md").read_text()
    assert report.startswith("# WCNN-8, mnist-sample\n")
    assert 0 < scored.seconds < 60
    assert f"images/s, {scored.seconds:.0f} s ({scored.predicted_seconds:.0f} s predicted), batches of" in report
    assert STAGES["train"].purpose(config).startswith("WCNN-8, 2 epochs")
