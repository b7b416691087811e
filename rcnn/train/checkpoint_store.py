"""Where a training keeps its checkpoints: written in the background, whole or not at all, and checked when they are read.

In: snapshots of a `TrainState`. Out: the newest one that is intact. A checkpoint is a file of tensors, `<name>.pt`, and a
record beside it, `<name>.json`, which is written last and has the file's SHA-256.
"""

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from rcnn.errors import ClusterError, LeaseLost, TrainingError
from rcnn.progress import say
from rcnn.storage import StageFolder

FOLDER = "checkpoints"


@dataclass(frozen=True)
class Record:
    """What a checkpoint is, for those who do not want its tensors.

    Attributes:
        epoch: finished epochs.
        step: finished steps of the epoch after those.
        seconds: of training up to there.
        sha256: of the file.
        roll_backs: how often training had gone back (see `roll_back.py`).
    """

    epoch: int
    step: int
    seconds: float
    sha256: str
    roll_backs: int = 0

    @property
    def name(self) -> str:
        """Of its files, without their suffixes; sorted by name, checkpoints are in the order of training. An epoch that was
        begun again comes after what it replaces, so roll-backs stand before the step."""
        return f"{self.epoch:06d}-{self.roll_backs}-{self.step:08d}"


class CheckpointStore:
    """The checkpoints in a stage's folder.

    Args:
        target: the stage's folder.
        keep: how many to keep, the last ones, and besides them the newest that is the start of an epoch.
    """

    def __init__(self, target: StageFolder, *, keep: int = 2):
        self._target, self._keep = target, keep
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def write(self, snapshot: dict[str, Any]) -> None:
        """Writes a checkpoint in the background, after the one before it.

        A checkpoint that cannot be written is reported, and does not end the training: the next one may be luckier.

        Raises:
            LeaseLost: another process took over, seen when the one before was to be written.
        """
        self._finish_last()
        self._writing = self._writer.submit(self._write, snapshot)

    def require_space(self, num_bytes: int) -> None:
        """Checks that there is room for all that are kept, the one that is being written, and the model.

        Args:
            num_bytes: of one.

        Raises:
            ClusterError: there is not.
        """
        self._target.storage.require_free((self._keep + 3) * num_bytes)

    def close(self) -> None:
        """Waits for the last checkpoint.

        Raises:
            ClusterError: it could not be written.
        """
        if self._writing is not None:
            self._writing.result()
        self._writer.shutdown()

    def newest(self) -> Record | None:
        """The newest intact checkpoint. Damaged ones are named and deleted, as is what a killed writer left.

        Raises:
            ClusterError: the storage cannot be read.
        """
        records = read_records(self._target)
        self._delete_strays(records)
        for record in reversed(records):
            try:
                self.read(record)
            except TrainingError as error:
                say(f"  {error.where}: {error.what}; using the one before it")
                self._delete(record)  # as the newest by name, it would outlive those that follow
            except ClusterError as error:  # no reason to begin from the start: the next attempt may be luckier
                raise ClusterError(error.what, where=error.where, remedy=error.remedy, retryable=True) from error
            else:
                return record
        return None

    def read(self, record: Record) -> dict[str, Any]:
        """The snapshot of a checkpoint.

        Raises:
            TrainingError: its file is missing or damaged.
            ClusterError: the storage cannot be read.
        """
        storage, file = self._target.storage, self._path(record, "pt")
        try:
            with storage.reading(file):
                content = storage.read_bytes(file)
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != record.sha256:
            what = "is not the checkpoint that was written" if content else "the checkpoint is missing or empty"
            raise TrainingError(what, where=storage.uri(file), remedy="Train again with --fresh")
        import torch  # late: `rcnn plan` reads records, and no tensors

        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # type: ignore[no-any-return]

    def start_of(self, epoch: int) -> Record:
        """The checkpoint of the start of an epoch.

        Raises:
            TrainingError: there is none.
        """
        for record in read_records(self._target):
            if (record.epoch, record.step) == (epoch, 0):
                return record
        raise TrainingError(
            f"the checkpoint of the start of epoch {epoch + 1} is missing",
            where=self._target.storage.uri(self._target.path(FOLDER)),
            remedy="Train again with --fresh",
        )

    def settle(self) -> None:
        """Waits for the last checkpoint, where training has ended for another reason than its end."""
        self._finish_last()
        self._writing = None

    def _finish_last(self) -> None:
        try:
            if self._writing is not None:
                self._writing.result()
        except LeaseLost:
            raise
        except ClusterError as error:
            say(f"  a checkpoint is lost, and training goes on without it: {error.what} ({error.where})")

    def _write(self, snapshot: dict[str, Any]) -> None:
        import torch

        stream = io.BytesIO()
        torch.save(snapshot, stream)
        content = stream.getbuffer()
        place = {name: snapshot[name] for name in ("epoch", "step", "seconds", "roll_backs")}
        record = Record(**place, sha256=hashlib.sha256(content).hexdigest())
        storage = self._target.storage
        self._target.require_held()
        storage.write_bytes(self._path(record, "pt"), content, durable=True)
        storage.write_json(self._path(record, "json"), asdict(record), durable=True)
        try:
            records = read_records(self._target)
            start = max((record.name for record in records if record.step == 0), default="")
            for old in records[: -self._keep]:
                if old.name != start:
                    self._delete(old)
        except ClusterError as error:  # the new checkpoint is there all the same
            say(f"  an old checkpoint could not be deleted: {error.what} ({error.where})")

    def _delete(self, record: Record) -> None:
        """The record first: a record without its file would be taken for a damaged checkpoint."""
        for suffix in ("json", "pt"):
            if self._target.storage.exists(self._path(record, suffix)):
                self._target.storage.delete_file(self._path(record, suffix))

    def _delete_strays(self, records: Sequence[Record]) -> None:
        """Deletes drafts, and files without a record."""
        wanted = {f"{record.name}.pt" for record in records}
        for file in self._target.storage.list_sizes(self._target.path(FOLDER)):
            if not file.endswith(".json") and file not in wanted:
                self._target.storage.delete_file(self._target.path(f"{FOLDER}/{file}"))

    def _path(self, record: Record, suffix: str) -> str:
        return self._target.path(f"{FOLDER}/{record.name}.{suffix}")


def read_records(target: StageFolder) -> list[Record]:
    """The checkpoints in a stage's folder, oldest first; records that cannot be read are left out."""
    records = []
    for file in sorted(target.storage.list_sizes(target.path(FOLDER))):
        if file.endswith(".json"):
            try:
                with target.storage.reading(target.path(f"{FOLDER}/{file}")):
                    records.append(Record(**target.storage.read_json(target.path(f"{FOLDER}/{file}"))))
            except (ValueError, TypeError):
                say(
                    f"  {target.storage.uri(target.path(f'{FOLDER}/{file}'))}: is not the record of a checkpoint; ignored"
                )
    return records
