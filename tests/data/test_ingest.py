import json
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from rcnn.config import PipelineConfig
from rcnn.data import ingest
from rcnn.data.ingest import run_ingest, split_rows
from rcnn.data.loader import load_rows, require_manifest
from rcnn.data.manifest import read_manifest
from rcnn.data.sources import Images
from rcnn.errors import ClusterError, DataError
from rcnn.results import IngestResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker


@pytest.fixture
def target(tmp_path: Path) -> StageFolder:
    return StageFolder(Storage(str(tmp_path)), "datasets/x")


@pytest.fixture
def random_source(random_images: Images, monkeypatch: pytest.MonkeyPatch) -> Images:
    monkeypatch.setattr(ingest, "read_source", lambda data, downloads: random_images)
    return random_images


def test_every_row_goes_to_one_split_and_classes_keep_their_share(random_images: Images) -> None:
    splits = split_rows(random_images, PipelineConfig())
    rows = np.concatenate([rows for _, rows in splits.values()])
    assert sorted(rows) == list(range(60))
    labels = random_images.arrays["train"][1]
    assert {name: np.bincount(labels[rows]).tolist() for name, (_, rows) in splits.items()} == {
        "train": [14, 14, 14],
        "val": [2, 2, 2],
        "test": [4, 4, 4],
    }


def test_the_split_follows_its_seed_alone(random_images: Images) -> None:
    config = PipelineConfig()
    once, again = split_rows(random_images, config), split_rows(random_images, config.with_settings({"seed": 7}))
    other = split_rows(random_images, config.with_settings({"data.split_seed": 1}))
    assert all((once[name][1] == again[name][1]).all() for name in once)
    assert any((once[name][1] != other[name][1]).any() for name in once)


def test_a_source_with_a_test_split_keeps_it(random_images: Images) -> None:
    both = Images(
        random_images.arrays | {"test": random_images.arrays["train"]}, random_images.classes, random_images.record
    )
    splits = split_rows(both, PipelineConfig())
    assert splits["test"][0] == "test"
    assert len(splits["test"][1]) == 60
    assert len(splits["train"][1]) + len(splits["val"][1]) == 60


def test_pixels_labels_and_ids_come_back(target: StageFolder, random_source: Images) -> None:
    result = run_ingest(PipelineConfig(), target, NoTracker())
    assert result.rows == {"train": 42, "val": 6, "test": 12}
    images, labels = random_source.arrays["train"]
    folder = target.storage.local_path("datasets/x")
    for split in result.rows:
        table = pq.read_table(folder / split)
        rows = [int(row_id.as_py().split("/")[1]) for row_id in table["row_id"]]
        pixels = table["image"].combine_chunks().to_numpy_ndarray()
        np.testing.assert_array_equal(pixels, images[rows])
        np.testing.assert_array_equal(table["label"].to_numpy(), labels[rows])


def test_the_manifest_holds_what_numpy_finds(target: StageFolder, random_source: Images) -> None:
    run_ingest(PipelineConfig(), target, NoTracker())
    manifest = require_manifest(target.storage, "datasets/x")
    _, rows = split_rows(random_source, PipelineConfig())["train"]
    train = random_source.arrays["train"][0][rows].astype(np.float64)
    assert manifest.image_shape == (6, 5, 3)
    np.testing.assert_allclose(manifest.pixel_mean, train.mean(0).ravel(), atol=1e-4)
    assert manifest.pixel_std == pytest.approx((train - train.mean(0)).std(), abs=1e-3)
    assert manifest.splits["test"].rows_per_class == (4, 4, 4)


def test_the_same_input_gives_the_same_digest_and_another_a_different_one(
    tmp_path: Path, random_source: Images
) -> None:
    def digest(name: str, **settings: object) -> str:
        config = PipelineConfig().with_settings({f"data.{key}": value for key, value in settings.items()})
        return run_ingest(config, StageFolder(Storage(str(tmp_path)), name), NoTracker()).digest

    assert digest("a") == digest("b")
    assert digest("a2", split_seed=3) != digest("a3")


def test_shards_are_cut_by_size_and_loaded_whole(target: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "ROWS_PER_GROUP", 16)
    config = PipelineConfig().with_settings({"data.source": "mnist-sample", "data.shard_megabytes": 1})
    run_ingest(config, target, NoTracker())
    manifest = require_manifest(target.storage, "datasets/x")
    assert [shard.rows for shard in manifest.splits["train"].shards] == [1275, 1275, 1050]
    assert len(load_rows(target.storage, "datasets/x", manifest, "train")) == 3600


def test_what_is_not_whole_is_not_there(
    target: StageFolder, random_source: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ingest, "_describe", fail)
    with pytest.raises(KeyboardInterrupt):
        run_ingest(PipelineConfig(), target, NoTracker())
    assert list(target.storage.local_path("datasets").iterdir()) == []


def test_a_faster_twin_is_not_harmed(
    target: StageFolder, random_source: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = ingest._describe

    def let_the_twin_finish_first(*arguments: object) -> object:
        monkeypatch.setattr(ingest, "_describe", describe)
        run_ingest(PipelineConfig(), target, NoTracker())
        (target.storage.local_path("datasets/x") / "mark").write_text("the twin's")
        return describe(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ingest, "_describe", let_the_twin_finish_first)
    run_ingest(PipelineConfig(), target, NoTracker())
    assert [folder.name for folder in target.storage.local_path("datasets").iterdir()] == ["x"]
    assert (target.storage.local_path("datasets/x") / "mark").exists()


def test_an_unwritable_storage_is_named(tmp_path: Path, random_source: Images) -> None:
    (tmp_path / "datasets").write_text("a file where a folder should be")
    with pytest.raises(ClusterError, match="cannot be written"):
        run_ingest(PipelineConfig(), StageFolder(Storage(str(tmp_path)), "datasets/x"), NoTracker())


def test_a_split_without_rows_is_named(random_images: Images) -> None:
    with pytest.raises(DataError, match="the val split of mnist-sample would have no rows"):
        split_rows(random_images, PipelineConfig().with_settings({"data.val_fraction": 0.001}))


def _manifest_of(digits_storage: Path, digits: IngestResult, tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "manifest.json"
    file.write_text((digits_storage / digits.folder / "manifest.json").read_text())
    return file


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema_version": 99}, "schema_version is 99, and this rcnn reads up to 1"),
        ({"pixel_std": 1.0}, "its content does not match its digest"),
        ({"image_shape": "round"}, "image_shape"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_named(
    digits_storage: Path, digits: IngestResult, tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    file = _manifest_of(digits_storage, digits, tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=expected):
        read_manifest(Storage(str(tmp_path)), "d")
    file.write_text("{")
    with pytest.raises(DataError, match="no JSON"):
        read_manifest(Storage(str(tmp_path)), "d")


def test_a_missing_or_altered_shard_is_named(digits_storage: Path, digits: IngestResult, tmp_path: Path) -> None:
    manifest = read_manifest(Storage(str(digits_storage)), digits.folder)
    assert manifest is not None
    storage = Storage(str(tmp_path))
    with pytest.raises(DataError, match="the shard cannot be read"):
        load_rows(storage, "d", manifest, "val")
    (tmp_path / "d" / "val").mkdir(parents=True)
    file = tmp_path / "d" / "val" / "val-00000.parquet"
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="the shard was changed"):
        load_rows(storage, "d", manifest, "val")
    table = pq.read_table(digits_storage / digits.folder / "val")
    pq.write_table(table.slice(0, 10), file)
    with pytest.raises(DataError, match="the shard was changed"):
        load_rows(storage, "d", manifest, "val")


def test_other_readers_see_plain_lists(digits_storage: Path, digits: IngestResult) -> None:
    table = pyarrow.dataset.dataset(digits_storage / digits.folder / "test", format="parquet").to_table()
    frame = table.to_pandas()
    assert len(frame) == 500
    assert len(frame["image"][0]) == 784
