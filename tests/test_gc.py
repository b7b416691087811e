"""What `rcnn gc` lists and deletes, and what it leaves."""

import os
from pathlib import Path

import pytest

from rcnn.cli import main
from rcnn.config import PipelineConfig
from rcnn.gc import find_leftovers
from rcnn.lease import held
from rcnn.registry.outbox import outbox_of
from rcnn.registry.runs import open_run
from rcnn.storage import StageFolder, Storage

pytestmark = pytest.mark.long

FILES = {
    "datasets/.draft-x/records/a.json": "data set that was never finished",
    "datasets/x/_manifest.json": "",
    "runs/train-dead/checkpoints/000001-00000000.pt": "work that was never finished",
    "runs/train-done/_result.json": "",
    "runs/train-done/model/model.safetensors": "",
    "runs/train-done/checkpoints/000001-00000000.pt": "checkpoints of a finished training",
    "runs/train-limited/_result.json": "",
    "runs/train-limited/checkpoints/000001-00000000.pt": "",
    "runs/train-held/checkpoints/000001-00000000.pt": "",
    "runs/tune-done/_result.json": "",
    "runs/tune-done/ray-1a2b/state": "what Ray left of a killed attempt",
    "runs/jobs/rcnn-train-done/job.json": "note of a Ray job",
    "reports/evaluate-dead/report.md": "work that was never finished",
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A storage whose files are 10 days old."""
    storage = Storage(str(tmp_path))
    for name in FILES:
        limited = '{"limit_minutes": 5}' if "limited" in name else "{}"
        storage.write_text(name, limited if name.endswith("_result.json") else "x" * 1000)
        file = storage.local_path(name)
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 10 * 86400))
    return storage


@pytest.fixture
def config(storage: Storage) -> PipelineConfig:
    return PipelineConfig().with_settings({"storage": storage.root})


def test_what_nothing_refers_to_is_listed_and_then_deleted(
    storage: Storage, config: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = {os.path.dirname(name): what for name, what in FILES.items() if what}
    expected = {
        "datasets/.draft-x": expected.pop("datasets/.draft-x/records"),
        "runs/train-dead": expected.pop("runs/train-dead/checkpoints"),
    } | expected
    options = ["gc", "--set", f"storage={storage.root}"]
    with held(StageFolder(storage, "runs/train-held")):
        assert {each.place: each.what for each in find_leftovers(config)} == expected
        assert all(9.9 < each.days < 10.1 and each.num_bytes == 1000 for each in find_leftovers(config))
        assert list(find_leftovers(config, days=11)) == []
        assert main(options) == 0
        assert "0.0 MB can be deleted: `rcnn gc --delete` does so" in capsys.readouterr().out
        assert storage.exists("runs/train-dead")
        assert main([*options, "--delete"]) == 0
        assert list(find_leftovers(config)) == []
        assert main(options) == 0
        assert "nothing in" in capsys.readouterr().out
    left = {name for name in FILES if storage.exists(name)}
    assert left == {name for name, what in FILES.items() if not what}


def test_work_that_is_resumed_after_the_listing_is_left(
    storage: Storage, config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = list(find_leftovers(config))
    monkeypatch.setattr("rcnn.gc.find_leftovers", lambda config, days: listed)
    with held(StageFolder(storage, "runs/train-dead")):
        assert main(["gc", "--set", f"storage={storage.root}", "--delete"]) == 0
    assert "runs/train-dead is left: " in capsys.readouterr().err
    assert storage.exists("runs/train-dead/checkpoints")
    assert not storage.exists("runs/train-done/checkpoints")


def test_runs_in_mlflow_whose_files_are_gone_are_deleted(storage: Storage, config: PipelineConfig) -> None:
    for key in ("runs/train-done", "runs/train-gone"):
        open_run(config, "train", key=key).finish()
    open_run(config, "train", key="runs/train-running")
    open_run(config, "pipeline", key="pipeline-0a1b").finish()
    assert outbox_of(config).flush()
    [found] = [each for each in find_leftovers(config, days=0) if "MLflow" in each.what]
    assert found.place.startswith("train (")
    found.delete()
    assert not [each for each in find_leftovers(config, days=0) if "MLflow" in each.what]
