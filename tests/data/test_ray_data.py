"""Decoding on Ray Data gives what decoding here gives."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn.config import PipelineConfig
from rcnn.data import ingest
from rcnn.data.ingest import run_ingest
from rcnn.data.manifest import require_manifest
from rcnn.errors import DataError
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """900 images of 32x32 in two classes, 1.1 MB of shards in all."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / "train" / label).mkdir(parents=True)
        for number in range(450):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / "train" / label / f"{number:03d}.png")
    return tmp_path / "images"


def config_of(folder: Path, **settings: object) -> PipelineConfig:
    tree: dict[str, object] = {"data.source": "folder", "data.root": str(folder), "data.shard_megabytes": 1}
    return PipelineConfig().with_settings(tree | {f"data.{name}": value for name, value in settings.items()})


@pytest.mark.thorough
def test_a_cluster_writes_the_very_same_data_set(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path / "storage"))
    here = run_ingest(config_of(folder), StageFolder(storage, "datasets/here"), NoTracker())
    monkeypatch.setattr(ingest, "BYTES_WORTH_A_CLUSTER", 0)
    there = run_ingest(config_of(folder), StageFolder(storage, "datasets/there"), NoTracker())
    assert there.digest == here.digest
    assert require_manifest(storage, "datasets/there").splits["train"].rows == 648


def test_a_bad_image_ends_the_ingest_or_is_listed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "BYTES_WORTH_A_CLUSTER", 0)
    bad = folder / "train" / "dog" / "007.png"
    bad.write_bytes(bad.read_bytes()[:100])
    storage = Storage(str(tmp_path / "storage"))
    with pytest.raises(DataError, match=r"train/dog/007\.png: cannot be decoded"):
        run_ingest(config_of(folder), StageFolder(storage, "datasets/x"), NoTracker())
    assert list((tmp_path / "storage" / "datasets").iterdir()) == []
    run_ingest(config_of(folder, on_error="skip"), StageFolder(storage, "datasets/x"), NoTracker())
    manifest = require_manifest(storage, "datasets/x")
    assert [skipped.row_id for skipped in manifest.skipped] == ["train/dog/007.png"]
    assert sum(split.rows for split in manifest.splits.values()) == 899
