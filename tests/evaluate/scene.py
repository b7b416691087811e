"""What the tests of evaluation need: many test rows in shards of different sizes, and a model without its training."""

import tempfile
from pathlib import Path

from rcnn.config import PipelineConfig
from rcnn.data.ingest import run_ingest
from rcnn.data.manifest import require_manifest
from rcnn.recipes import debug_tiny
from rcnn.results import IngestResult, TrainResult
from rcnn.stages import made_of, stage_folder
from rcnn.storage import MADE_OF, RESULT, StageFolder
from rcnn.tracking import NoTracker
from rcnn.train.checkpoint import build_classifier, save_model

HISTORY = [{"epoch": 1, "val/error": 0.9, "val/loss": 2.3, "train/loss": 2.3, "learning_rate": 0.01}]


def many_test_rows(storage: Path, **changed: object) -> PipelineConfig:
    """`debug_tiny` on digits of which 3,000 are for testing, in three shards; parts of 200 rows lie across their borders."""
    settings = {
        "storage": str(storage), "tune.enabled": False, "data.test_fraction": 0.6, "data.shard_megabytes": 1,
        "evaluate.batch_size": 50,
    }  # fmt: skip
    return debug_tiny().with_settings(settings | changed)


def ingested(config: PipelineConfig) -> IngestResult:
    """The data set of a config, as its stage leaves it."""
    target = stage_folder(config, "ingest", {})
    data = run_ingest(config, target, NoTracker())
    _finish(config, "ingest", {}, target, data)
    return data


def untrained(config: PipelineConfig, data: IngestResult) -> TrainResult:
    """A model with its initial weights, as the stage would leave a finished one."""
    target = stage_folder(config, "train", {"ingest": data})
    manifest = require_manifest(target.storage, data.folder)
    with tempfile.TemporaryDirectory() as folder:
        save_model(build_classifier(config, manifest).state_dict(), config, manifest, Path(folder))
        target.storage.upload(Path(folder), target.path("model"))
    target.storage.write_json(target.path("history.json"), HISTORY)
    trained = TrainResult(
        folder=target.name, weights_sha256="0", val_error=0.9, best_epoch=1, epochs=1, num_parameters=1,
        images_per_second=1, seconds=1,
    )  # fmt: skip
    _finish(config, "train", {"ingest": data}, target, trained)
    return trained


def _finish(
    config: PipelineConfig,
    name: str,
    results: dict[str, object],
    target: StageFolder,
    result: IngestResult | TrainResult,
) -> None:
    target.storage.write_json(target.path(MADE_OF), made_of(config, name, results))
    target.storage.write_json(target.path(RESULT), result.model_dump(mode="json"))
