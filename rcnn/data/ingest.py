"""The ingest stage: a source in, a folder of Parquet shards with a manifest out.

The split into training, validation and test rows is drawn here, by seed, and never changes later. Shards are written to a
draft folder that is renamed when it is complete, so a data set appears with its manifest or not at all. A killed run is
resumed by the next.

    datasets/.draft-<name>/data/      the unfinished data set      datasets/.draft-<name>/records/   a record per shard
    datasets/<name>/                  the complete data set
"""

import errno
import hashlib
import itertools
import shutil
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rcnn.config import DataConfig, PipelineConfig
from rcnn.data.duplicates import find_near_duplicates, write_near_duplicates
from rcnn.data.hashes import NUM_WAVES, SIDE
from rcnn.data.manifest import MANIFEST, Manifest, Split, read_manifest, require_whole
from rcnn.data.schema import SCHEMA_VERSION
from rcnn.data.shards import ShardJob, ShardRecord, copies_of, rows_per_group, write_shard, written_shard
from rcnn.data.sources import open_source
from rcnn.data.sources.origin import Origin
from rcnn.errors import ClusterError, DataError, RcnnError, SourceError
from rcnn.lease import is_held
from rcnn.progress import say
from rcnn.results import IngestResult
from rcnn.storage import StageFolder, Storage
from rcnn.text import counted, printable
from rcnn.tracking import Tracker

SPLITS = ("train", "val", "test")
DRAFT_PREFIX = ".draft-"
BYTES_WORTH_A_CLUSTER = 64_000_000  # of encoded images: fewer are decoded in less than the 10 to 12 s of a Ray start
SECONDS_TO_KEEP_A_DRAFT = 7 * 24 * 3600
NUM_CLASSES_SHOWN = 5

Plan = dict[str, tuple[str, np.ndarray]]
"""For each split, the part of the source that it is drawn from, and the row numbers in that part."""


def run_ingest(config: PipelineConfig, target: StageFolder, tracker: Tracker) -> IngestResult:
    """Writes the data set that `config.data` describes, unless it exists.

    Raises:
        SourceError: the origin is missing, unreachable or altered.
        DataError: a row cannot be used, or the origin cannot be split as configured.
        ClusterError: the storage cannot be written.
    """
    if target.replaces or read_manifest(target.storage, target.name) is None:
        manifest = _ingest(config, target)
    else:
        manifest = require_whole(target.storage, target.name)
        target.storage.delete(_Draft(target.storage, target.name).folder)  # of a run killed during clean-up
    tracker.log_params({"source": config.data.source, "digest": manifest.digest})
    tracker.log_metrics({f"rows/{name}": split.rows for name, split in manifest.splits.items()})
    tracker.log_data(manifest.summary(), target.storage.uri(target.name), context="ingest")
    return IngestResult(
        folder=target.name,
        digest=manifest.digest,
        test_digest=manifest.splits["test"].digest,
        source=config.data.source,
        rows={name: split.rows for name, split in manifest.splits.items()},
    )


def _ingest(config: PipelineConfig, target: StageFolder) -> Manifest:
    storage = target.storage
    draft = _Draft(storage, target.name)
    _delete_old_drafts(storage, keep=draft.folder)
    if target.replaces:
        draft.begin(target.replaces)
    try:
        origin = open_source(config.data, _downloads(storage))
        found = " + ".join(f"{len(labels):,} {part}" for part, labels in origin.labels.items())
        say(f"  found {found} rows in {len(origin.classes)} classes")
        plan = split_rows(origin, config.data)
        jobs = list(_plan_shards(origin, plan, config.data, draft))
        tally = _write_shards(config, origin, jobs)
        manifest = _with_near_duplicates(_describe(config.data, origin, tally), draft, jobs, tally)
        draft.publish(manifest, target, tally.records)
    except (SourceError, DataError) as error:
        if not error.retryable:
            target.require_held()
            draft.delete()  # not resumable: the source itself is bad
        raise
    except ClusterError:
        if not draft.has_records():  # after a full disk, for example, finished shards are kept
            draft.delete()
        raise
    return manifest


def _downloads(storage: Storage) -> Path:
    """Where downloaded files are kept: in the storage, or in the user's cache if the storage is not a local folder."""
    return storage.local_path("downloads") if storage.is_local else Path.home() / ".cache" / "rcnn" / "downloads"


def split_rows(origin: Origin, data: DataConfig) -> Plan:
    """The rows of each split, ascending. Splits are stratified by class, and each class keeps at least one training row.

    Raises:
        DataError: a split would have no rows.
    """
    rng = np.random.default_rng(data.split_seed)
    labels_N = origin.labels["train"]
    rows = np.arange(len(labels_N))
    plan: Plan = {name: (name, np.arange(len(labels))) for name, labels in origin.labels.items() if name != "train"}
    for name, fraction in (("test", data.test_fraction), ("val", data.val_fraction)):
        if name not in plan:
            rows, held_out = _hold_out(rows, labels_N, fraction, rng)
            if not len(held_out):
                raise _too_small(name, data, origin)
            plan[name] = ("train", held_out)
    plan["train"] = ("train", rows)
    for name in SPLITS:
        if len(plan[name][1]) == 0:
            raise _empty(name, data, origin)
    return {name: plan[name] for name in SPLITS}


def _too_small(split: str, data: DataConfig, origin: Origin) -> DataError:
    """The error for a split that stays empty because each class needs its last row for training."""
    counts = np.bincount(origin.labels["train"], minlength=len(origin.classes))
    largest = int(counts.argmax())
    num_drawn = sum(name not in origin.labels for name in ("val", "test"))
    is_large_enough = counts[largest] > num_drawn
    return DataError(
        f"the {split} split of {data.dataset} would have no rows: each class keeps one for training, and even the largest, "
        f"{origin.classes[largest]!r} ({counts[largest]:,} of {counts.sum():,} rows), has no other row left",
        where=f"data.val_fraction = {data.val_fraction}, data.test_fraction = {data.test_fraction}",
        remedy="Lower data.test_fraction, or add images"
        if is_large_enough
        else f"Add images: at least one class needs {num_drawn + 1} rows",
    )


def _empty(split: str, data: DataConfig, origin: Origin) -> DataError:
    if split != "train" and split in origin.labels:
        there = f"{data.root}/{split}" if data.source == "folder" else f"{data.root}, {split}....parquet"
        return DataError(
            f"the {split} split of {data.dataset} would have no rows (of {len(origin.labels[split])})",
            where=f"data.root = {there}",
            remedy=f"Add {split} images, or remove that part",
        )
    return DataError(
        f"the {split} split of {data.dataset} would have no rows (of {len(origin.labels['train'])})",
        where=f"data.root = {data.root}",
        remedy="Fix the rows that were skipped, or add images",
    )


def _hold_out(
    rows: np.ndarray, labels_N: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Splits `rows` in two, the second with `fraction` of each class, drawn at random; both ascending."""
    _, counts = np.unique(labels_N[rows], return_counts=True)
    shares = _share_out(counts.tolist(), Fraction(str(fraction)), rng.spawn(1)[0])
    by_class = np.split(rows[np.argsort(labels_N[rows], kind="stable")], np.cumsum(counts)[:-1])
    held_out = [rng.permutation(of_class)[:share] for of_class, share in zip(by_class, shares, strict=True)]
    second = np.sort(np.concatenate(held_out))
    return np.setdiff1d(rows, second, assume_unique=True), second


def _share_out(counts: list[int], fraction: Fraction, rng: np.random.Generator) -> list[int]:
    """How many rows each class gives: `fraction` of its rows, rounded so that the total is `fraction` of all rows, at least 1.

    Rounding each class separately would take nothing from 10,000 classes of 4 rows. So the rows that rounding down leaves over
    are taken from the classes with the largest remainders, one each, with ties broken at random. No class gives its last row,
    so with tiny classes the total can be smaller. Uses exact fractions, because in floating point 0.29 * 100 is less than 29.
    """
    shares = [count * fraction.numerator // fraction.denominator for count in counts]
    remainders = [count * fraction.numerator % fraction.denominator for count in counts]
    can_give = [n for n in rng.permutation(len(counts)) if remainders[n] and shares[n] < counts[n] - 1]
    can_give.sort(key=lambda n: remainders[n], reverse=True)
    num_left = max(1, round(fraction * sum(counts))) - sum(shares)
    for n in can_give[: max(0, num_left)]:
        shares[n] += 1
    return shares


def _plan_shards(origin: Origin, plan: Plan, data: DataConfig, draft: "_Draft") -> Iterator[ShardJob]:
    """Cuts the splits into shards."""
    image_bytes = int(np.prod(origin.image_shape))
    group = rows_per_group(image_bytes)
    rows_per_shard = max(1, data.shard_megabytes * 1_000_000 // image_bytes // group) * group
    for split, (part, rows) in plan.items():
        if split == "train":
            rows = _spread(rows, origin.block_rows, data.split_seed)
        for number, start in enumerate(range(0, len(rows), rows_per_shard)):
            chosen = rows[start : start + rows_per_shard]
            name = f"{split}-{number:05d}"
            yield ShardJob(
                storage=draft.storage.root,
                folder=draft.data,
                file=f"{split}/{name}.parquet",
                record=f"{draft.records}/{name}.json",
                plan=hashlib.sha256(
                    f"{part} {origin.labels[part][chosen].tolist()} {chosen.tolist()}".encode()
                ).hexdigest(),
                chunk=origin.cut(part, chosen),
                num_classes=len(origin.classes),
                skips_bad_rows=data.on_error == "skip",
                shuffle_seed=(data.split_seed, number) if split == "train" else None,
            )


def _spread(rows: np.ndarray, block_rows: int, seed: int) -> np.ndarray:
    """The rows, in blocks that are shuffled. Sources are often sorted by class, and streaming shuffles only among neighbouring
    rows, so a shard must hold rows from everywhere."""
    starts = np.arange(0, len(rows), block_rows)
    order = np.random.default_rng(seed).permutation(len(starts))
    return np.concatenate([rows[start : start + block_rows] for start in starts[order]])


class _Tally:
    """The records of shards. The pixel sums of the training rows are added up as records arrive, and dropped from them: for
    images of 224 pixels, those of a single shard take 12 MB as Python integers."""

    def __init__(self, jobs: Sequence[ShardJob], num_pixels: int):
        self._order = [job.file for job in jobs]
        self._found: dict[str, ShardRecord] = {}
        self.sums = np.zeros((2, num_pixels), np.int64)
        """Of the training rows and of their squares, for each pixel: integers, so their order does not matter."""
        self._hashes: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, file: str) -> bool:
        return file in self._found

    def add(self, record: ShardRecord) -> None:
        """Takes the record of one more shard."""
        if record.shard.file.startswith("train/"):
            self.sums += (record.pixel_sums, record.square_sums)
        self._hashes[record.shard.file] = record.read_hashes()
        self._found[record.shard.file] = record.model_copy(update={"pixel_sums": (), "square_sums": (), "hashes": ""})

    def num_rows_of(self, file: str) -> int:
        """The rows of a shard."""
        return self._found[file].shard.rows

    def hashes_of(self, split: str) -> np.ndarray:
        """The hashes (N, V) of a split's rows, in the order of its shards."""
        files = [file for file in self._order if file.startswith(f"{split}/") and len(self._hashes[file])]
        return np.concatenate([self._hashes[file] for file in files])

    @property
    def records(self) -> list[ShardRecord]:
        """All records, without their sums, in the order of the jobs."""
        return [self._found[file] for file in self._order]


def _write_shards(config: PipelineConfig, origin: Origin, jobs: Sequence[ShardJob]) -> _Tally:
    """Writes the missing shards: in this process, or on Ray if there is much to decode.

    Raises:
        RcnnError: the first error of a shard.
    """
    there = _Tally(jobs, int(np.prod(origin.image_shape)))
    for job in jobs:
        if (record := written_shard(job)) is not None:
            there.add(record)
    missing = [job for job in jobs if job.file not in there]
    if there:
        say(f"  {len(there)} of {len(jobs)} shards exist already")
    outcomes: Generator[ShardRecord | RcnnError, None, None]
    if missing and origin.encoded_bytes > BYTES_WORTH_A_CLUSTER:
        from rcnn.data.ray_data import map_on_cluster

        outcomes = map_on_cluster(config, write_shard, missing)
    else:
        outcomes = (write_shard(job) for job in missing)
    # Closed before an error propagates: otherwise Ray tasks keep writing after the driver exits.
    with (
        closing(outcomes),
        tqdm(total=len(jobs), initial=len(there), unit="shard", leave=False, disable=not sys.stderr.isatty()) as bar,
    ):
        for outcome in outcomes:
            if isinstance(outcome, RcnnError):
                raise outcome
            there.add(outcome)
            bar.update()
            say(f"  {len(there)} of {len(jobs)} shards: {outcome.shard.rows:,} rows in {outcome.shard.file}")
    return there


def _describe(data: DataConfig, origin: Origin, tally: _Tally) -> Manifest:
    """The manifest, computed from the records of the shards."""
    splits, records = {}, tally.records
    for name in SPLITS:
        of_split = [record for record in records if record.shard.file.startswith(f"{name}/")]
        splits[name] = _add_up(of_split)
        if splits[name].rows == 0:
            raise _empty(name, data, origin)
        _say_missing_classes(name, splits[name], origin.classes)
    skipped = (*origin.skipped, *itertools.chain.from_iterable(record.skipped for record in records))
    if skipped:
        first = printable(f"{skipped[0].row_id} {skipped[0].reason}")
        say(f"  {len(skipped):,} rows were skipped (the manifest lists them): {first}, ...")
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=data.dataset,
        source=origin.record,
        classes=origin.classes,
        coarse_classes=origin.coarse_classes,
        image_shape=origin.image_shape,
        splits=splits,
        skipped=skipped,
        **_statistics(tally.sums / splits["train"].rows, origin.image_shape[2]),
    ).with_digest()


def _with_near_duplicates(manifest: Manifest, draft: "_Draft", jobs: Sequence[ShardJob], tally: _Tally) -> Manifest:
    """The manifest with the near-duplicates across splits, which are written into the data set's folder.

    It is returned as it is where images are too small to tell one picture from another.
    """
    if min(manifest.image_shape[:2]) < NUM_WAVES:
        return manifest
    hashes = {split: tally.hashes_of(split) for split in SPLITS}
    copies = partial(_read_copies, draft.storage, jobs, tally, [min(side, SIDE) for side in manifest.image_shape[:2]])
    table, found = find_near_duplicates(draft.storage, draft.data, manifest, hashes, copies)
    write_near_duplicates(draft.storage, draft.data, table)
    if num_rows := found.rows["test-train"]:
        share = 100 * num_rows / manifest.splits["test"].rows
        say(
            f"  {counted(num_rows, 'test row')} ({share:.2f} %) look like training rows: `rcnn data show` draws the closest "
            f"pairs, and {found.file} lists them"
        )
    return manifest.model_copy(update={"near_duplicates": found})


def _read_copies(
    storage: Storage, jobs: Sequence[ShardJob], tally: _Tally, sides: Sequence[int], split: str, numbers: np.ndarray
) -> np.ndarray:
    """Grey copies (n, h, w) of some rows of a split, by ascending number; a shard's copies are in memory at a time."""
    found, start = [np.empty((0, *sides), np.uint8)], 0
    for job in jobs:
        if job.file.startswith(f"{split}/"):
            stop = start + tally.num_rows_of(job.file)
            here = numbers[(numbers >= start) & (numbers < stop)] - start
            if len(here):
                found.append(np.frombuffer(storage.read_bytes(copies_of(job)), np.uint8).reshape(-1, *sides)[here])
            start = stop
    return np.concatenate(found)


def _say_missing_classes(name: str, split: Split, classes: Sequence[str]) -> None:
    missing = [repr(classes[label]) for label, count in enumerate(split.rows_per_class) if not count]
    if missing:
        more = ", ..." if len(missing) > NUM_CLASSES_SHOWN else ""
        shown = ", ".join(missing[:NUM_CLASSES_SHOWN]) + more
        say(f"  classes without {name} rows: {len(missing):,} of {len(classes):,} ({shown})")


def _add_up(records: Sequence[ShardRecord]) -> Split:
    counts = np.sum([record.rows_per_class for record in records], axis=0)
    content = sum(int(record.content, 16) for record in records) % 2**256
    return Split(
        rows=int(counts.sum()),
        rows_per_class=tuple(counts.tolist()),
        shards=tuple(record.shard for record in records if record.shard.rows),
        digest=f"{content:064x}",
    )


def _statistics(means: np.ndarray, num_channels: int) -> dict[str, object]:
    """Pixel means and standard deviations, from the means of the pixels and of their squares over the training rows."""
    mean, mean_of_squares = means
    by_channel = mean_of_squares.reshape(-1, num_channels).mean(0) - mean.reshape(-1, num_channels).mean(0) ** 2
    return {
        "pixel_mean": tuple(np.round(mean, 4).tolist()),
        "pixel_std": round(float(np.sqrt((mean_of_squares - mean**2).mean())), 4),
        "channel_std": tuple(np.round(np.sqrt(by_channel), 4).tolist()),
    }


class _Draft:
    """An unfinished data set. Object stores cannot rename folders, so there its shards are written to their final place."""

    def __init__(self, storage: Storage, name: str):
        self.storage = storage
        self.folder = f"datasets/{DRAFT_PREFIX}{name.rpartition('/')[2]}"
        self.records = f"{self.folder}/records"
        self.data = f"{self.folder}/data" if storage.is_local else name

    def begin(self, asked_by: str) -> None:
        """Deletes an existing draft, unless an earlier attempt of the same run wrote it."""
        mark = f"{self.folder}/asked-by.json"
        if self.storage.read_json(mark) != [asked_by]:
            self.storage.delete(self.folder)
            self.storage.write_json(mark, [asked_by])

    def publish(self, manifest: Manifest, target: StageFolder, records: Sequence[ShardRecord]) -> None:
        """Writes the manifest and moves the data set to its final place."""
        target.require_held()
        for record in records:
            if record.shard.rows == 0:
                self.storage.delete_file(f"{self.data}/{record.shard.file}")
        for split in manifest.splits.values():
            for shard in split.shards:
                self.storage.require_size(f"{self.data}/{shard.file}", shard.num_bytes)
        self.storage.write_json(f"{self.data}/{MANIFEST}", manifest.model_dump(mode="json"))
        if self.storage.is_local:
            with self.storage.writing(target.name):
                self._move_to(self.storage.local_path(target.name))
        self.storage.delete(self.folder)

    def _move_to(self, place: Path) -> None:
        """Renames the old data set away and this one into its place, so there is never a partial data set."""
        whole, old = self.storage.local_path(self.data), self.storage.local_path(self.folder) / "replaced"
        for leftover in whole.rglob("*.part"):  # of a killed process
            leftover.unlink()
        shutil.rmtree(old, ignore_errors=True)
        if place.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "a file is in the place of the data set's folder")
        if place.exists():
            place.rename(old)
        whole.rename(place)

    def has_records(self) -> bool:
        """Whether a shard is finished."""
        return any(file.endswith(".json") for file in self.storage.list_sizes(self.records))

    def delete(self) -> None:
        """Deletes the draft. On an object store the shards stay, since a concurrent run may have written them; the next run
        resumes from them."""
        self.storage.delete(self.folder)


def _delete_old_drafts(storage: Storage, *, keep: str) -> None:
    """Deletes stale drafts that no process holds."""
    if not storage.is_local:
        return
    for folder in storage.local_path("datasets").glob(f"{DRAFT_PREFIX}*"):
        if f"datasets/{folder.name}" == keep:
            continue
        if is_held(storage, f"datasets/{folder.name.removeprefix(DRAFT_PREFIX)}"):
            continue
        with suppress(FileNotFoundError):
            last_change = max(file.stat().st_mtime for file in [folder, *folder.glob("records/*")])
            if time.time() - last_change > SECONDS_TO_KEEP_A_DRAFT:
                shutil.rmtree(folder, ignore_errors=True)
