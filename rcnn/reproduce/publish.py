"""Writes the report of a table to the storage and to MLflow; a report that says nothing new is not logged again."""

import base64
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rcnn.progress import say
from rcnn.registry.runs import git_commit, open_run
from rcnn.reproduce import report
from rcnn.reproduce.cells import Row, rows_of
from rcnn.reproduce.tables import TABLES, Cell
from rcnn.storage import Storage


@dataclass(frozen=True)
class Call:
    """What was asked for.

    Attributes:
        table: a key of `TABLES`.
        budget: "full" or "small".
        command: the call as a person types it.
    """

    table: str
    budget: str
    command: str


def table_of(call: Call, cells: Sequence[Cell]) -> report.Finished:
    """The table as it stands, cells that were not run included."""
    title, data_set = TABLES[call.table].title, cells[0].config.data.dataset
    return report.Finished(title, data_set, rows_of(cells), call.command, git_commit())


def publish(call: Call, cells: Sequence[Cell]) -> str:
    """Writes the table as it stands, and logs it; returns its folder.

    Raises:
        ClusterError: the storage cannot be written.
    """
    finished, config = table_of(call, cells), cells[0].config
    storage, folder = Storage(config.storage), _folder_of(call, cells)
    table = report.as_parquet(finished)
    is_news = not (storage.exists(f"{folder}/{report.PARQUET}") and _same(storage, folder, table))
    with tempfile.TemporaryDirectory() as name:
        local = Path(name)
        report.plot_errors(finished, local / report.PLOT)
        picture = base64.b64encode((local / report.PLOT).read_bytes()).decode()
        (local / report.MARKDOWN).write_text(report.as_markdown(finished), "utf-8")
        (local / report.HTML).write_text(report.as_html(finished, picture), "utf-8")
        (local / report.PARQUET).write_bytes(table)
        if is_news:
            storage.upload(local, folder)
            _log(call, cells, finished.rows, folder, local)
            say(f"  the table is in {storage.uri(folder)}")
    return folder


def _same(storage: Storage, folder: str, table: bytes) -> bool:
    return storage.read_bytes(f"{folder}/{report.PARQUET}") == table


def _folder_of(call: Call, cells: Sequence[Cell]) -> str:
    digest = hashlib.sha256(" ".join(cell.config.hash() for cell in cells).encode()).hexdigest()[:12]
    return f"reports/reproduce-{call.table}-{call.budget}-{digest}"


def _log(call: Call, cells: Sequence[Cell], rows: Sequence[Row], folder: str, local: Path) -> None:
    """A run of its own in the experiment of the data set: the files, and the mean error of each experiment."""
    tracker = open_run(cells[0].config, f"reproduce {call.table} ({call.budget})", key=folder)
    tracker.set_tags({"rcnn.table": call.table, "rcnn.budget": call.budget, "rcnn.command": call.command})
    means = {row.cell.experiment.name: row.outcome.mean for row in rows}
    tracker.log_metrics({f"test/error/{name}": mean for name, mean in means.items() if mean is not None})
    tracker.log_files(local)
    tracker.finish()
