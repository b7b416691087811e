import json
import multiprocessing
import os
import resource
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
from rcnn.data.manifest import SourceRecord, read_manifest, require_manifest
from rcnn.data.shards import ShardJob, ShardRecord
from rcnn.data.sources.origin import Arrays, Origin, origin_of_arrays
from rcnn.errors import ClusterError, DataError, RcnnError
from rcnn.lease import held
from rcnn.results import IngestResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker


@pytest.fixture
def target(tmp_path: Path) -> StageFolder:
    return StageFolder(Storage(str(tmp_path)), "datasets/x")


@pytest.fixture(autouse=True)
def _no_wait_before_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SECONDS_BEFORE_RETRIES", (0.0, 0.0))


@pytest.fixture
def random_source(random_origin: Origin, monkeypatch: pytest.MonkeyPatch) -> Origin:
    monkeypatch.setattr(ingest, "open_source", lambda data, downloads: random_origin)
    return random_origin


def test_every_row_goes_to_one_split_and_classes_keep_their_share(random_origin: Origin) -> None:
    plan = split_rows(random_origin, PipelineConfig().data)
    assert sorted(np.concatenate([rows for _, rows in plan.values()])) == list(range(60))
    counts = rows_per_class(plan, random_origin)
    assert counts["test"] == [4, 4, 4]
    assert sorted(counts["val"]) == [1, 2, 2]  # 5 of 48, where each class gives 1 or 2
    assert sorted(counts["train"]) == [14, 14, 15]


def rows_per_class(plan: ingest.Plan, origin: Origin) -> dict[str, list[int]]:
    labels, num_classes = origin.labels["train"], len(origin.classes)
    return {name: np.bincount(labels[rows], minlength=num_classes).tolist() for name, (_, rows) in plan.items()}


def origin_of_labels(labels: np.ndarray | list[int]) -> Origin:
    """A source of black pixels with these labels."""
    arrays = Arrays(np.zeros((len(labels), 1, 1, 1), np.uint8), np.array(labels))
    classes = tuple(f"c{label}" for label in range(max(labels) + 1))
    return origin_of_arrays({"train": arrays}, classes, SourceRecord(name="labels", url="", files={}))


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("per_class", [500, 50])
def test_fractions_that_divide_each_class_are_taken_from_a_permutation_of_each_class(per_class: int, seed: int) -> None:
    """The split of every data set that was ingested so far, and of the golden losses, is one of these."""
    labels = np.random.default_rng(5).permutation(np.repeat(np.arange(10), per_class))
    data = PipelineConfig().with_settings({"data.split_seed": seed}).data
    plan = split_rows(origin_of_labels(labels), data)
    rng, rows, expected = np.random.default_rng(seed), np.arange(len(labels)), {}
    for name, share in (("test", per_class // 5), ("val", per_class * 4 // 50)):
        held_out = [rng.permutation(rows[labels[rows] == label])[:share] for label in range(10)]
        expected[name] = np.sort(np.concatenate(held_out))
        rows = np.setdiff1d(rows, expected[name])
    for name, chosen in (expected | {"train": rows}).items():
        np.testing.assert_array_equal(plan[name][1], chosen)


def test_10_000_classes_of_5_rows_can_be_split() -> None:
    origin = origin_of_labels(np.random.default_rng(0).permutation(np.repeat(np.arange(10_000), 5)))
    plan = split_rows(origin, PipelineConfig().data)
    assert {name: len(rows) for name, (_, rows) in plan.items()} == {"train": 36_000, "val": 4_000, "test": 10_000}
    counts = rows_per_class(plan, origin)
    assert set(counts["test"]) == {1}
    assert set(counts["val"]) == {0, 1}
    given = np.flatnonzero(counts["val"])
    assert 4_500 < given.mean() < 5_500  # drawn from all classes, not from the first ones


def test_2_classes_of_3_rows_can_be_split() -> None:
    plan = split_rows(origin_of_labels([0, 1, 0, 1, 0, 1]), PipelineConfig().data)
    assert {name: len(rows) for name, (_, rows) in plan.items()} == {"train": 4, "val": 1, "test": 1}


def test_a_class_of_one_row_keeps_it_for_training() -> None:
    origin = origin_of_labels([0] + [1] * 20 + [2] + [3] * 20)
    plan = split_rows(origin, PipelineConfig().with_settings({"data.test_fraction": 0.5}).data)
    counts = rows_per_class(plan, origin)
    assert (counts["train"][0], counts["train"][2]) == (1, 1)
    assert counts["test"] == [0, 10, 0, 10]


@pytest.mark.parametrize("seed", range(10))
def test_a_split_gives_its_share_and_no_class_gives_much_more_or_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 40, 30)
    fraction = round(float(rng.uniform(0.01, 0.6)), 2)
    origin = origin_of_labels(np.repeat(np.arange(30), counts))
    data = PipelineConfig().with_settings({"data.test_fraction": fraction, "data.split_seed": seed}).data
    given = np.array(rows_per_class(split_rows(origin, data), origin)["test"])
    assert given.sum() == max(1, round(fraction * counts.sum()))
    assert (np.abs(given - fraction * counts) < 1).all()
    assert (given < counts).all()


def test_which_class_gives_the_odd_row_follows_the_seed() -> None:
    origin = origin_of_labels(np.repeat(np.arange(100), 4))
    configs = [PipelineConfig().with_settings({"data.split_seed": seed}) for seed in (0, 0, 1)]
    one, again, other = (rows_per_class(split_rows(origin, config.data), origin)["test"] for config in configs)
    assert one == again != other


def test_a_fraction_that_floating_point_rounds_down_is_exact() -> None:
    assert 0.29 * 100 < 29
    origin = origin_of_labels(np.repeat(np.arange(3), 100))
    data = PipelineConfig().with_settings({"data.test_fraction": 0.29}).data
    assert rows_per_class(split_rows(origin, data), origin)["test"] == [29, 29, 29]


@pytest.mark.parametrize(
    ("labels", "settings", "expected"),
    [
        (
            [0, 1],
            {},
            r"the test split of x would have no rows: each class .*'c0' \(1 of 2 rows\).* at least one class needs 3 rows",
        ),
        (
            [0, 1, 1],
            {},
            r"the val split of x would have no rows: each class .*'c1' \(2 of 3 rows\).* at least one class needs 3 rows",
        ),
        (
            [0, 1] * 10,
            {"data.test_fraction": 0.99},
            r"test_fraction = 0\.99: the val split .*'c0' \(10 of 20 rows\), .*Lower data\.test_fraction",
        ),
    ],
)
def test_a_source_that_cannot_be_split_is_named_with_its_largest_class(
    labels: list[int], settings: dict[str, object], expected: str
) -> None:
    data = PipelineConfig().with_settings({"data.name": "x", **settings}).data
    with pytest.raises(DataError, match=expected):
        split_rows(origin_of_labels(labels), data)


def test_a_tiny_fraction_holds_out_one_row(random_origin: Origin) -> None:
    plan = split_rows(random_origin, PipelineConfig().with_settings({"data.val_fraction": 0.001}).data)
    assert {name: len(rows) for name, (_, rows) in plan.items()} == {"train": 47, "val": 1, "test": 12}


def test_classes_that_a_split_lacks_are_said_in_one_line(target: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = origin_of_labels([*range(2_000), *[0] * 8])
    said: list[str] = []
    monkeypatch.setattr(ingest, "open_source", lambda data, downloads: origin)
    monkeypatch.setattr(ingest, "say", said.append)
    run_ingest(PipelineConfig(), target, NoTracker())
    [line] = [line for line in said if "without test rows" in line]
    assert line == "  classes without test rows: 1,999 of 2,000 ('c1', 'c2', 'c3', 'c4', 'c5', ...)"
    assert not [line for line in said if "without train rows" in line]


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
    assert result.rows == {"train": 43, "val": 5, "test": 12}
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


@pytest.mark.long
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


def _ingest_onto_a_full_disk(storage: Storage) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
    with pytest.raises(ClusterError, match=r"val-00000\.parquet: cannot be written \(File too large\)"):
        run_ingest(PipelineConfig(), StageFolder(storage, "datasets/x"), NoTracker())
    os._exit(0)


def test_a_full_disk_keeps_finished_shards(
    target: StageFolder, random_arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    black = Arrays(np.zeros_like(random_arrays.images), random_arrays.labels)  # takes less room than the limit
    parts = {"train": black, "val": random_arrays, "test": random_arrays}
    origin = origin_of_arrays(parts, ("a", "b", "c"), SourceRecord(name="random", url="", files={}))
    monkeypatch.setattr(ingest, "open_source", lambda data, downloads: origin)
    process = multiprocessing.get_context("fork").Process(target=_ingest_onto_a_full_disk, args=(target.storage,))
    process.start()
    process.join()
    assert process.exitcode == 0
    jobs: list[str] = []
    write_shard = ingest.write_shard
    monkeypatch.setattr(ingest, "write_shard", lambda job: jobs.append(job.file) or write_shard(job))
    run_ingest(PipelineConfig(), target, NoTracker())
    assert jobs == ["val/val-00000.parquet", "test/test-00000.parquet"]


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


def test_stale_drafts_are_removed_after_a_week(target: StageFolder, random_source: Origin) -> None:
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
    target = StageFolder(Storage(str(tmp_path)), "datasets/x", replaces="me")
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


def test_only_a_retry_of_the_same_fresh_run_takes_up_its_shards(
    tmp_path: Path, random_source: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    written: list[str] = []
    run_ingest(PipelineConfig(), StageFolder(storage, "datasets/x"), NoTracker())
    write_shard = ingest.write_shard

    def fail_at_the_second(job: ShardJob) -> ShardRecord | RcnnError:
        written.append(job.file)
        return ClusterError("gone") if len(written) == 2 else write_shard(job)

    monkeypatch.setattr(ingest, "write_shard", fail_at_the_second)
    with pytest.raises(ClusterError, match="gone"):
        run_ingest(PipelineConfig(), StageFolder(storage, "datasets/x", replaces="flow 1"), NoTracker())
    run_ingest(PipelineConfig(), StageFolder(storage, "datasets/x", replaces="flow 1"), NoTracker())
    assert len(set(written)) == len(written) - 1  # only the one that failed came twice
    num_shards = len(set(written))
    run_ingest(PipelineConfig(), StageFolder(storage, "datasets/x", replaces="flow 2"), NoTracker())
    assert len(written) == 1 + 2 * num_shards
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == ["x"]


def test_an_unwritable_storage_is_named(tmp_path: Path, random_source: Origin) -> None:
    (tmp_path / "datasets").write_text("a file where a folder should be")
    with pytest.raises(ClusterError, match="cannot be written"):
        run_ingest(PipelineConfig(), StageFolder(Storage(str(tmp_path)), "datasets/x"), NoTracker())


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
            run_ingest(PipelineConfig(), StageFolder(storage, "datasets/x", replaces="me"), NoTracker())
    assert read_manifest(storage, "datasets/x") is None
    assert run_ingest(PipelineConfig(), StageFolder(storage, "datasets/x"), NoTracker()) == first
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == ["x"]


@pytest.mark.long
def test_an_old_draft_that_somebody_is_at_is_left_alone(target: StageFolder, random_source: Origin) -> None:
    draft = target.storage.local_path("datasets/.draft-old")
    (draft / "records").mkdir(parents=True)
    os.utime(draft, (0, 0))
    with held(StageFolder(target.storage, "datasets/old")):
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
