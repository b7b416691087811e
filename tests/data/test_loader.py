"""One contract, two engines: rows in memory, and rows read from shards. A row's label is its number."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn.config import PipelineConfig
from rcnn.data import ingest, shards, streaming
from rcnn.data.augment import Augmentation
from rcnn.data.ingest import run_ingest
from rcnn.data.loader import Loader, Order, ResidentLoader, Rows, RowSource, load_rows, load_training_data
from rcnn.data.manifest import Manifest, Shard, SourceRecord, require_manifest
from rcnn.data.shards import ShardJob, write_shard
from rcnn.data.sources.origin import ArrayChunk, Arrays, origin_of_arrays
from rcnn.data.streaming import Segment, StoredRows, StreamingLoader, stored_rows, stretch
from rcnn.errors import DataError
from rcnn.results import IngestResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker

CPU = torch.device("cpu")
NUM_STORED = 700
GROUP = 16


def pixels_of(count: int) -> np.ndarray:
    """Images of 4x4 pixels that tell their number."""
    return np.random.default_rng(7).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def resident(count: int) -> Rows:
    return Rows(torch.from_numpy(pixels_of(count)).permute(0, 3, 1, 2), torch.arange(count))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], StoredRows]]:
    """Any first rows of a split of 700, in shards of 300, 300 and 100 rows and row groups of 16."""
    storage = Storage(str(tmp_path_factory.mktemp("stored")))
    written = []
    for start in range(0, NUM_STORED, 300):
        rows = np.arange(start, min(NUM_STORED, start + 300))
        chunk = ArrayChunk("train", Arrays(pixels_of(NUM_STORED), np.arange(NUM_STORED)), rows)
        file = f"train/train-{len(written):05d}.parquet"
        job = ShardJob(storage.root, "d", file, f"records/{start}.json", "", chunk, NUM_STORED, False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "rows_per_group", lambda image_bytes: GROUP)
            written.append(write_shard(job).shard)  # type: ignore[union-attr]

    def first_rows(count: int) -> StoredRows:
        segments = [
            Segment(number, first // GROUP, 0, min(GROUP, shard.rows - first))
            for number, shard in enumerate(written)
            for first in range(0, shard.rows, GROUP)
        ]
        return StoredRows(storage, "d", tuple(written), stretch(segments, 0, count), (4, 4, 3))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "GROUPS_PER_WINDOW", 4)
        yield first_rows


def source(engine: str, stored: Callable[[int], StoredRows], count: int) -> RowSource:
    return resident(count) if engine == "resident" else stored(count)


def epoch_of(loader: Loader, epoch: int, first_step: int = 0) -> list[list[int]]:
    return [labels.tolist() for _, labels in loader.epoch(epoch, first_step=first_step)]


ENGINES = pytest.mark.parametrize("engine", ["resident", "streaming"])


@ENGINES
@given(count=st.integers(1, NUM_STORED), share=st.integers(1, 40), ranks=st.integers(1, 5), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_ranks_make_as_many_steps_and_no_row_comes_twice(
    engine: str, stored: Callable[[int], StoredRows], count: int, share: int, ranks: int, epoch: int
) -> None:
    batch_size = share * ranks
    if count < batch_size:
        with pytest.raises(DataError, match="fewer than one batch"):
            source(engine, stored, count).loader(Order(batch_size, seed=1), Augmentation(), CPU)
        return
    seen = []
    for rank in range(ranks):
        loader = source(engine, stored, count).loader(Order(batch_size, 1, rank, ranks), Augmentation(), CPU)
        steps = epoch_of(loader, epoch)
        assert len(steps) == loader.num_steps == count // batch_size
        assert all(len(labels) == share for labels in steps)
        seen += sum(steps, [])
    assert len(seen) == len(set(seen)) == count // batch_size * batch_size
    assert set(seen) <= set(range(count))


@ENGINES
@given(count=st.integers(1, NUM_STORED), ranks=st.integers(1, 9), batch_size=st.integers(1, 800))
@settings(max_examples=40, deadline=None)
def test_evaluation_sees_each_row_once_whatever_the_ranks(
    engine: str, stored: Callable[[int], StoredRows], count: int, ranks: int, batch_size: int
) -> None:
    shares = [source(engine, stored, count).share(rank, ranks) for rank in range(ranks)]
    batches = [labels.tolist() for share in shares for _, labels in share.batches(batch_size, CPU)]
    assert all(len(labels) <= batch_size for labels in batches)
    assert sorted(sum(batches, [])) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@ENGINES
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_an_epoch_is_taken_up_in_its_middle(
    engine: str, stored: Callable[[int], StoredRows], data: st.DataObject
) -> None:
    order = Order(batch_size=data.draw(st.sampled_from([4, 10, 34, 120])), seed=3, rank=1, num_ranks=2)
    augmentation = Augmentation(max_shift=1, flip=True, cutout=2)
    loader = source(engine, stored, 650).loader(order, augmentation, CPU)
    first_step = data.draw(st.integers(0, loader.num_steps))
    whole = list(loader.epoch(2))
    taken_up = list(loader.epoch(2, first_step=first_step))
    assert len(taken_up) == loader.num_steps - first_step
    for (images, labels), (other_images, other_labels) in zip(whole[first_step:], taken_up, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@ENGINES
def test_images_belong_to_their_labels(engine: str, stored: Callable[[int], StoredRows]) -> None:
    rows = source(engine, stored, NUM_STORED)
    expected = torch.from_numpy(pixels_of(NUM_STORED)).permute(0, 3, 1, 2)
    for batches in (rows.loader(Order(50, seed=0), Augmentation(), CPU).epoch(0), rows.batches(64, CPU)):
        for images, labels in batches:
            assert images.dtype == torch.uint8
            assert labels.dtype == torch.int64
            assert torch.equal(images, expected[labels])
            assert images.is_contiguous(memory_format=torch.channels_last)


@ENGINES
def test_an_image_whose_flips_alternate_is_mirrored_in_one_of_two_epochs(
    engine: str, stored: Callable[[int], StoredRows]
) -> None:
    upright = torch.from_numpy(pixels_of(NUM_STORED)).permute(0, 3, 1, 2)
    augmentation = Augmentation(flip=True, alternate_flips=True)

    def mirrored(epoch: int, rank: int = 0, num_ranks: int = 1) -> dict[int, bool]:
        order = Order(50 * num_ranks, seed=0, rank=rank, num_ranks=num_ranks)
        loader = source(engine, stored, NUM_STORED).loader(order, augmentation, CPU)
        return {
            int(label): torch.equal(image, upright[label].flip(2))
            for images, labels in loader.epoch(epoch)
            for image, label in zip(images, labels, strict=True)
        }

    first, second, third = mirrored(0), mirrored(1), mirrored(2)
    both = first.keys() & second.keys()  # a partial batch is left out of each epoch
    assert len(both) > NUM_STORED - 100
    assert all(first[label] != second[label] for label in both)
    assert 0.4 < sum(first.values()) / len(first) < 0.6
    assert 0.3 < sum(third[label] == first[label] for label in both & third.keys()) / len(both) < 0.7
    of_others = mirrored(0, rank=1, num_ranks=2)
    assert all(first[label] == of_others[label] for label in first.keys() & of_others.keys())


@ENGINES
def test_epochs_differ_and_repeat_by_seed(engine: str, stored: Callable[[int], StoredRows]) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return epoch_of(source(engine, stored, 200).loader(Order(200, seed), Augmentation(), CPU), epoch)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


@ENGINES
def test_epochs_are_shuffled_well(engine: str, stored: Callable[[int], StoredRows]) -> None:
    """The labels of each batch spread over the whole split: their mean is that of a fair draw."""
    loader = source(engine, stored, NUM_STORED).loader(Order(50, seed=0), Augmentation(), CPU)
    means = [np.mean(labels) for epoch in range(5) for labels in epoch_of(loader, epoch)]
    spread = NUM_STORED / np.sqrt(12)
    assert np.abs(np.array(means) - NUM_STORED / 2).max() < spread * (0.6 if engine == "resident" else 1.5)


@given(rows=st.integers(1, 200), share=st.integers(1, 4), ranks=st.integers(1, 8), epoch=st.integers(0, 3))
def test_resident_ranks_share_the_global_batches_of_one(rows: int, share: int, ranks: int, epoch: int) -> None:
    if rows < share * ranks:
        return
    whole = epoch_of(ResidentLoader(resident(rows), Order(share * ranks, seed=1)), epoch)
    parts = [
        epoch_of(ResidentLoader(resident(rows), Order(share * ranks, 1, rank, ranks)), epoch) for rank in range(ranks)
    ]
    assert [sum((part[step] for part in parts), []) for step in range(len(whole))] == whole


@given(st.lists(st.integers(1, 20), max_size=12), st.integers(0, 250), st.integers(0, 100))
def test_a_stretch_is_a_slice_of_the_rows(sizes: list[int], start: int, length: int) -> None:
    stop = start + length
    segments = [Segment(0, number, 5, 5 + size) for number, size in enumerate(sizes)]

    def rows(segments: object) -> list[tuple[int, int]]:
        return [(segment.group, row) for segment in segments for row in range(segment.start, segment.stop)]  # type: ignore[attr-defined]

    assert rows(stretch(segments, start, stop)) == rows(segments)[start:stop]


def test_a_rank_reads_its_own_stretch_and_little_more(
    stored: Callable[[int], StoredRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0
    original = StoredRows.read

    def counting(self: StoredRows, segments: list[Segment]) -> tuple[np.ndarray, np.ndarray]:
        nonlocal read
        read += sum(map(len, segments))
        return original(self, segments)

    monkeypatch.setattr(StoredRows, "read", counting)
    list(StreamingLoader(stored(NUM_STORED), Order(20, 0, 1, 4)).epoch(0))
    assert read == NUM_STORED // 20 * 20 // 4


def test_a_loader_that_is_left_early_ends_its_thread(stored: Callable[[int], StoredRows]) -> None:
    import threading

    batches = StreamingLoader(stored(NUM_STORED), Order(20, seed=0)).epoch(0)
    next(batches)
    assert any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


@pytest.fixture(scope="module")
def manifest(digits_storage: Path, digits: IngestResult) -> Manifest:
    return require_manifest(Storage(str(digits_storage)), digits.folder)


def test_the_engine_follows_the_size_or_the_setting(digits_storage: Path, digits: IngestResult) -> None:
    def kind(**settings: object) -> type:
        return type(load_training_data(Storage(str(digits_storage)), digits.folder, **settings).train)  # type: ignore[arg-type]

    assert kind() is Rows
    assert kind(resident_megabytes=2) is StoredRows
    assert kind(resident_megabytes=2, num_rows=1000) is Rows
    assert kind(engine="streaming") is StoredRows
    assert kind(engine="resident", resident_megabytes=1) is Rows


def test_a_subset_has_as_many_rows_as_asked_for(digits_storage: Path, digits: IngestResult) -> None:
    for engine in ("resident", "streaming"):
        data = load_training_data(Storage(str(digits_storage)), digits.folder, num_rows=777, seed=1, engine=engine)
        assert len(data.train) == 777


def test_validation_rows_follow_the_training_rows_where_they_are_learned_too(
    digits_storage: Path, digits: IngestResult, manifest: Manifest
) -> None:
    storage = Storage(str(digits_storage))
    train, val = (load_rows(storage, digits.folder, manifest, split) for split in ("train", "val"))
    for engine in ("resident", "streaming"):
        data = load_training_data(storage, digits.folder, with_validation=True, engine=engine)
        [(images, labels)] = data.train.batches(10_000, CPU)
        assert torch.equal(images, torch.cat([train.images, val.images]))
        assert torch.equal(labels, torch.cat([train.labels, val.labels]))
        assert len(data.val) == len(val)


def test_a_streamed_subset_is_spread_over_all_row_groups(stored: Callable[[int], StoredRows]) -> None:
    rows = stored(NUM_STORED)
    thinned = streaming._thinned(rows.segments, 99, np.random.default_rng(0))
    assert sum(map(len, thinned)) == 99
    assert all(1 <= len(segment) <= 3 for segment in thinned)
    assert len({(segment.shard, segment.group) for segment in thinned}) == len(rows.segments)


def test_both_engines_read_the_same_rows(digits_storage: Path, digits: IngestResult, manifest: Manifest) -> None:
    storage = Storage(str(digits_storage))
    for split in digits.rows:
        whole = load_rows(storage, digits.folder, manifest, split)
        [(images, labels)] = stored_rows(storage, digits.folder, manifest, split).batches(10_000, CPU)
        assert torch.equal(images, whole.images)
        assert torch.equal(labels, whole.labels)


@pytest.fixture
def shard_copy(
    digits_storage: Path, digits: IngestResult, manifest: Manifest, tmp_path: Path
) -> tuple[Storage, Path, Shard]:
    """The validation shard in a storage of its own, to be damaged."""
    [shard] = manifest.splits["val"].shards
    file = tmp_path / "d" / shard.file
    file.parent.mkdir(parents=True)
    file.write_bytes((digits_storage / digits.folder / shard.file).read_bytes())
    return Storage(str(tmp_path)), file, shard


@pytest.mark.parametrize("engine", ["resident", "streaming"])
@pytest.mark.parametrize("damage", ["missing", "cut off", "one byte longer", "a byte changed"])
def test_a_shard_that_was_altered_after_ingest_is_named(
    shard_copy: tuple[Storage, Path, Shard], manifest: Manifest, engine: str, damage: str
) -> None:
    storage, file, _ = shard_copy
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        content[len(content) // 3] ^= damage == "a byte changed"
        file.write_bytes({"cut off": content[:-9], "one byte longer": content + b"x"}.get(damage, content))

    def load() -> object:
        if engine == "resident":
            return load_rows(storage, "d", manifest, "val")
        return list(stored_rows(storage, "d", manifest, "val").batches(100, CPU))

    with pytest.raises(DataError, match=r"val-00000\.parquet: the shard (was changed|cannot be read).*Ingest again"):
        load()


def test_a_data_set_larger_than_a_window_is_streamed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = Arrays(pixels_of(3000), np.arange(3000) % 2)
    origin = origin_of_arrays({"train": arrays}, ("even", "odd"), SourceRecord(name="x", url="", files={}))
    monkeypatch.setattr(ingest, "open_source", lambda data, downloads: origin)
    monkeypatch.setattr(streaming, "GROUPS_PER_WINDOW", 1)
    storage = Storage(str(tmp_path))
    run_ingest(PipelineConfig(), StageFolder(storage, "datasets/x"), NoTracker())
    data = load_training_data(storage, "datasets/x", engine="streaming")
    seen = torch.cat([labels for _, labels in data.train.loader(Order(100, seed=0), Augmentation(), CPU).epoch(0)])
    assert len(seen) == len(data.train) // 100 * 100
    assert abs(int(seen.sum()) - len(seen) // 2) < 60
