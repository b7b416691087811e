"""What is known of the trials that have ended: one small JSON file each, in the search's folder.

In: records, as trials end. Out: the records of all attempts; and one Parquet table of them. The ledger is the only
state of a search. Ray Tune's own folder is scratch: its state is written every few seconds, so a search that was killed in
its first second could not be restored from it (`KeyError: 'k'`), nor can a finished search be extended with it.
"""

import io
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from rcnn.results import Trial
from rcnn.storage import StageFolder

FOLDER = "trials"
TABLE = "trials.parquet"


class Record(Trial):
    """A trial, with all that the next attempt needs to know of it."""

    val_errors: tuple[float, ...] = ()
    """Validation error after each epoch."""
    peak_memory_mb: float = 0.0
    """Of the trial's process; 0 where it has several workers."""
    fault: str = ""
    """Why it failed."""
    minutes_allowed: float = 0.0
    """`tune.trial_minutes` at that time."""

    def has_ended(self, trial_minutes: float) -> bool:
        """Whether it need not be trained again: a limit that ended it may have been raised since (0: its own forecast's)."""
        if self.outcome != "out of time" or trial_minutes == self.minutes_allowed:
            return True
        return 0 < trial_minutes <= (self.minutes_allowed or self.seconds / 60)

    @property
    def trial(self) -> Trial:
        """What the result of the stage says of it."""
        return Trial(**{name: getattr(self, name) for name in Trial.model_fields})


def write_record(target: StageFolder, record: Record) -> None:
    """Notes that a trial has ended. The file is there as a whole or not at all.

    Raises:
        LeaseLost: another process has taken over the search.
        ClusterError: the storage cannot be written.
    """
    target.require_held()
    target.storage.write_text(target.path(f"{FOLDER}/{record.name}.json"), record.model_dump_json(indent=1) + "\n")


def read_records(target: StageFolder) -> dict[str, Record]:
    """The trials that have ended, by name. A damaged record is left out: its trial is trained again."""
    records = {}
    for file in sorted(target.storage.list_sizes(target.path(FOLDER))):
        try:
            tree = target.storage.read_json(target.path(f"{FOLDER}/{file}"))
            record = Record.model_validate(tree)
        except (ValueError, ValidationError):
            continue
        if file == f"{record.name}.json":
            records[record.name] = record
    return records


def write_table(target: StageFolder, records: Iterable[Record]) -> None:
    """Writes all trials as one Parquet file: a row each, and a column for each searched setting.

    Raises:
        ClusterError: the storage cannot be written.
    """
    rows = [
        {"trial": record.name, **record.choice.root, **record.model_dump(exclude={"name", "choice"})}
        for record in records
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    target.storage.write_bytes(target.path(TABLE), buffer.getbuffer())
