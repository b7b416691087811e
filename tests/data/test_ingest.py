import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rcnn.config import PipelineConfig
from rcnn.data import ingest, shards
from rcnn.data.ingest import run_ingest, split_rows
from rcnn.data.loader import load_rows
from rcnn.data.manifest import read_manifest, require_manifest
from rcnn.data.sources.origin import Arrays, Origin, origin_of_arrays
from rcnn.errors import ClusterError, DataError
from rcnn.results import IngestResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker


@pytest.fixture
def target(tmp_path: Path) -> StageFolder:
    return StageFolder(Storage(str(tmp_path)), "datasets/x")


@pytest.fixture
def random_source(random_origin: Origin, monkeypatch: pytest.MonkeyPatch) -> Origin:
    monkeypatch.setattr(ingest, "open_source", lambda data, downloads: random_origin)
    return random_origin


def test_every_row_goes_to_one_split_and_classes_keep_their_share(random_origin: Origin) -> None:
    plan = split_rows(random_origin, PipelineConfig().data)
    assert sorted(np.concatenate([rows for _, rows in plan.values()])) == list(range(60))
    labels = random_origin.labels["train"]
    assert {name: np.bincount(labels[rows]).tolist() for name, (_, rows) in plan.items()} == {
        "train": [14, 14, 14],
        "val": [2, 2, 2],
        "test": [4, 4, 4],
    }


def test_the_split_follows_its_seed_alone(random_origin: Origin) -> None:
    config = PipelineConfig()
    once, again = (split_rows(random_origin, c.data) for c in (config, config.with_settings({"seed": 7})))
    other = split_rows(random_origin, config.with_settings({"data.split_seed": 1}).data)
    assert all((once[name][1] == again[name][1]).all() for name in once)
    assert any((once[name][1] != other[name][1]).any() for name in once)


@pytest.mark.parametrize("given", [("test",), ("val",), ("val", "test")])
def test_a_source_keeps_the_splits_that_it_has(
    random_arrays: Arrays, random_origin: Origin, given: tuple[str, ...]
) -> None:
    parts = dict.fromkeys(("train", *given), random_arrays)
    plan = split_rows(origin_of_arrays(parts, ("a", "b", "c"), random_origin.record), PipelineConfig().data)
    assert all(plan[name][0] == name and len(plan[name][1]) == 60 for name in given)
    assert sum(len(rows) for part, rows in plan.values() if part == "train") == 60


def test_pixels_labels_and_ids_come_back(target: StageFolder, random_source: Origin, random_arrays: Arrays) -> None:
    result = run_ingest(PipelineConfig(), target, NoTracker())
    assert result.rows == {"train": 42, "val": 6, "test": 12}
    folder = target.storage.local_path("datasets/x")
    for split in result.rows:
        table = pq.read_table(folder / split)
        rows = [int(row_id.as_py().split("/")[1]) for row_id in table["row_id"]]
        np.testing.assert_array_equal(table["image"].combine_chunks().to_numpy_ndarray(), random_arrays.images[rows])
        np.testing.assert_array_equal(table["label"].to_numpy(), random_arrays.labels[rows])


def test_the_manifest_holds_what_numpy_finds(target: StageFolder, random_source: Origin, random_arrays: Arrays) -> None:
    run_ingest(PipelineConfig(), target, NoTracker())
    manifest = require_manifest(target.storage, "datasets/x")
    _, rows = split_rows(random_source, PipelineConfig().data)["train"]
    train = random_arrays.images[rows].astype(np.float64)
    assert manifest.image_shape == (6, 5, 3)
    np.testing.assert_allclose(manifest.pixel_mean, train.mean(0).ravel(), atol=1e-4)
    assert manifest.pixel_std == pytest.approx((train - train.mean(0)).std(), abs=1e-3)
    np.testing.assert_allclose(manifest.channel_std, train.std((0, 1, 2)), atol=1e-3)
    assert manifest.splits["test"].rows_per_class == (4, 4, 4)


def test_the_same_input_gives_the_same_digest_and_another_a_different_one(
    tmp_path: Path, random_source: Origin
) -> None:
    def digest(name: str, **settings: object) -> str:
        config = PipelineConfig().with_settings({f"data.{key}": value for key, value in settings.items()})
        return run_ingest(config, StageFolder(Storage(str(tmp_path)), name), NoTracker()).digest

    assert digest("datasets/a") == digest("datasets/b")
    assert digest("datasets/c", split_seed=3) != digest("datasets/d")


def test_a_split_has_one_digest_however_it_is_packed(tmp_path: Path) -> None:
    def ingested(name: str, megabytes: int) -> IngestResult:
        config = PipelineConfig().with_settings({"data.shard_megabytes": megabytes})
        return run_ingest(config, StageFolder(Storage(str(tmp_path)), f"datasets/{name}"), NoTracker())

    one, many = ingested("one", 64), ingested("many", 1)
    assert one.digest != many.digest
    assert one.test_digest == many.test_digest
    manifest = require_manifest(Storage(str(tmp_path)), many.folder)
    assert [shard.rows for shard in manifest.splits["train"].shards] == [1024, 1024, 1024, 528]
    assert len(load_rows(Storage(str(tmp_path)), many.folder, manifest, "train")) == 3600


def test_a_second_ingest_finds_the_first_ones_work(target: StageFolder, random_source: Origin) -> None:
    first = run_ingest(PipelineConfig(), target, NoTracker())
    file = target.storage.local_path("datasets/x/_manifest.json")
    before = file.stat().st_mtime_ns
    assert run_ingest(PipelineConfig(), target, NoTracker()) == first
    assert file.stat().st_mtime_ns == before


def _ingest_until_killed(root: str, settings: dict[str, object], shards_to_write: int) -> None:
    written = 0
    write_shard = ingest.write_shard

    def write_some(job: shards.ShardJob) -> object:
        nonlocal written
        if written == shards_to_write:
            os.kill(os.getpid(), signal.SIGKILL)
        written += 1
        return write_shard(job)

    ingest.write_shard = write_some  # type: ignore[assignment]
    run_ingest(PipelineConfig().with_settings(settings), StageFolder(Storage(root), "datasets/x"), NoTracker())
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("shards_to_write", [0, 2, 6])
def test_a_killed_ingest_leaves_nothing_or_all_and_is_taken_up(
    target: StageFolder, monkeypatch: pytest.MonkeyPatch, shards_to_write: int
) -> None:
    settings: dict[str, object] = {"data.shard_megabytes": 1}
    whole = run_ingest(
        PipelineConfig().with_settings(settings), StageFolder(target.storage, "datasets/whole"), NoTracker()
    )
    process = multiprocessing.get_context("spawn").Process(
        target=_ingest_until_killed, args=(target.storage.root, settings, shards_to_write)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (read_manifest(target.storage, "datasets/x") is not None) == (shards_to_write == 6)

    jobs: list[shards.ShardJob] = []
    write_shard = ingest.write_shard
    monkeypatch.setattr(ingest, "write_shard", lambda job: jobs.append(job) or write_shard(job))
    resumed = run_ingest(PipelineConfig().with_settings(settings), target, NoTracker())
    assert len(jobs) == 6 - shards_to_write
    assert resumed.digest == whole.digest
    left = sorted(path.name for path in target.storage.local_path("datasets").iterdir())
    assert left == ["whole", "x"]


def test_a_shard_that_was_damaged_in_the_draft_is_written_anew(
    target: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_describe", stop)
        with pytest.raises(KeyboardInterrupt):
            run_ingest(PipelineConfig(), target, NoTracker())
    [shard] = target.storage.local_path("datasets").rglob("train-00000.parquet")
    shard.write_bytes(shard.read_bytes()[:-1])
    run_ingest(PipelineConfig(), target, NoTracker())
    manifest = require_manifest(target.storage, "datasets/x")
    assert len(load_rows(target.storage, "datasets/x", manifest, "train")) == 3600


def _ingest(root: str) -> None:
    run_ingest(PipelineConfig(), StageFolder(Storage(root), "datasets/x"), NoTracker())


def test_two_ingests_at_once_do_not_harm_each_other(target: StageFolder) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_ingest, args=(target.storage.root,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    manifest = require_manifest(target.storage, "datasets/x")
    assert len(load_rows(target.storage, "datasets/x", manifest, "train")) == 3600
    assert [path.name for path in target.storage.local_path("datasets").iterdir()] == ["x"]


def test_drafts_that_nobody_took_up_are_removed_after_a_week(target: StageFolder, random_source: Origin) -> None:
    folder = target.storage.local_path("datasets")
    for name, days in (("old", 8), ("new", 6)):
        (folder / f".draft-{name}" / "records").mkdir(parents=True)
        then = time.time() - days * 24 * 3600
        os.utime(folder / f".draft-{name}", (then, then))
    run_ingest(PipelineConfig(), target, NoTracker())
    assert sorted(path.name for path in folder.iterdir()) == [".draft-new", "x"]


def test_fresh_replaces_what_was_there_once_the_new_is_whole(
    tmp_path: Path, random_source: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = StageFolder(Storage(str(tmp_path)), "datasets/x", replaces=True)
    run_ingest(PipelineConfig(), target, NoTracker())
    (tmp_path / "datasets/x/mark").write_text("the old one")

    def fail(*_: object) -> None:
        raise DataError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_describe", fail)
        with pytest.raises(DataError, match="no more"):
            run_ingest(PipelineConfig(), target, NoTracker())
    assert (tmp_path / "datasets/x/mark").exists()
    run_ingest(PipelineConfig(), target, NoTracker())
    assert not (tmp_path / "datasets/x/mark").exists()


def test_an_unwritable_storage_is_named(tmp_path: Path, random_source: Origin) -> None:
    (tmp_path / "datasets").write_text("a file where a folder should be")
    with pytest.raises(ClusterError, match="cannot be written"):
        run_ingest(PipelineConfig(), StageFolder(Storage(str(tmp_path)), "datasets/x"), NoTracker())


def test_a_split_without_rows_is_named(random_origin: Origin) -> None:
    with pytest.raises(DataError, match="the val split of mnist-sample would have no rows"):
        split_rows(random_origin, PipelineConfig().with_settings({"data.val_fraction": 0.001}).data)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema_version": 99}, "schema_version is 99, and this rcnn reads 2. Upgrade"),
        ({"schema_version": 1}, "schema_version is 1, and this rcnn reads 2. Ingest"),
        ({"pixel_std": 1.0}, "its content does not match its digest"),
        ({"image_shape": "round"}, "image_shape"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_named(
    digits_storage: Path, digits: IngestResult, tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "_manifest.json"
    whole = json.loads((digits_storage / digits.folder / "_manifest.json").read_text())
    file.write_text(json.dumps(whole | change))
    with pytest.raises(DataError, match=expected):
        read_manifest(Storage(str(tmp_path)), "d")
    file.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_manifest(Storage(str(tmp_path)), "d")


def test_a_manifest_of_an_earlier_version_is_read(digits_storage: Path, digits: IngestResult, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "manifest.json").write_bytes((digits_storage / digits.folder / "_manifest.json").read_bytes())
    assert require_manifest(Storage(str(tmp_path)), "d").digest == digits.digest


def test_a_replacement_that_is_killed_leaves_nothing_or_all_and_is_taken_up(
    tmp_path: Path, random_source: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    first = run_ingest(PipelineConfig(), StageFolder(storage, "datasets/x"), NoTracker())
    renamed = 0
    rename = Path.rename

    def rename_once(self: Path, target: Path) -> Path:
        nonlocal renamed
        renamed += 1
        if renamed == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_once)
        with pytest.raises(KeyboardInterrupt):
            run_ingest(PipelineConfig(), StageFolder(storage, "datasets/x", replaces=True), NoTracker())
    assert read_manifest(storage, "datasets/x") is None
    assert run_ingest(PipelineConfig(), StageFolder(storage, "datasets/x"), NoTracker()) == first
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == ["x"]


def test_an_old_draft_that_somebody_is_at_is_left_alone(target: StageFolder, random_source: Origin) -> None:
    draft = target.storage.local_path("datasets/.draft-old")
    (draft / "records").mkdir(parents=True)
    os.utime(draft, (0, 0))
    target.storage.make_folder(".locks")
    with ingest._lock_of(target.storage, "old"):
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_ingest, args=(target.storage.root,))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert draft.exists()


def test_a_shard_that_vanished_before_the_end_is_noticed(
    target: StageFolder, random_source: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = ingest._describe

    def lose_a_shard(*arguments: object) -> object:
        next(target.storage.local_path("datasets").rglob("val-00000.parquet")).unlink()
        return describe(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ingest, "_describe", lose_a_shard)
    with pytest.raises(ClusterError, match=r"val-00000\.parquet: has None bytes"):
        run_ingest(PipelineConfig(), target, NoTracker())
    assert read_manifest(target.storage, "datasets/x") is None
