"""A scene for each test, and a whole data set to be altered."""

import shutil
from pathlib import Path

import pytest

from rcnn.config import PipelineConfig
from rcnn.data.ingest import run_ingest
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from tests.data.broken.scene import Scene, ingest


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    (tmp_path / "source").mkdir()
    return Scene(tmp_path / "source", str(tmp_path / "storage"), monkeypatch)


@pytest.fixture(scope="module")
def whole_data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a whole data set, and another one of other rows."""
    above = tmp_path_factory.mktemp("whole")
    scene = Scene(above / "source", str(above / "storage"), pytest.MonkeyPatch())
    settings = scene.tree()
    ingest(scene, settings)
    config = PipelineConfig().with_settings(settings | {"data.split_seed": 1})
    run_ingest(config, StageFolder(Storage(scene.storage), "datasets/other"), NoTracker())
    return Path(scene.storage)


@pytest.fixture
def data_set(whole_data_set: Path, scene: Scene) -> Path:
    """A copy to be altered; the other data set lies beside it."""
    shutil.copytree(whole_data_set, scene.storage)
    return Path(scene.storage, "datasets/x")
