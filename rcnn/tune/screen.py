"""What a person sees of a search: on a terminal a live table, best trial first; elsewhere a line for each epoch.

In: each epoch of each trial, and each record as it ends. Out: standard error.
"""

import sys
import time
from bisect import bisect_right
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from rcnn.config import PipelineConfig
from rcnn.progress import as_duration, say
from rcnn.results import Choice
from rcnn.tune.ledger import Record
from rcnn.tune.search import rungs_of

MAX_LINES = 20
"""Of the table, so that it fits on a screen."""


class SearchScreen:
    """The trials of one search, as they are reported.

    Args:
        config: says how long trials are.
        records: the trials that ended in earlier attempts.
        num_planned: trials that this attempt starts.
        num_at_once: trials that run at a time.
        num_rows: training rows of a trial.
    """

    def __init__(
        self, config: PipelineConfig, records: Iterable[Record], *, num_planned: int, num_at_once: int, num_rows: int
    ):
        self.config, self.num_left, self.num_at_once, self.num_rows = config, num_planned, num_at_once, num_rows
        self.lines: dict[str, _Line] = {record.name: _Line.of(record, config.tune.epochs) for record in records}
        self.rungs = rungs_of(config)
        self.seconds: list[float] = []
        self.live: Any = None

    def __enter__(self) -> Self:
        """Shows the table, if there is a terminal."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(
                get_renderable=self.table, console=Console(stderr=True), refresh_per_second=2, redirect_stdout=False
            )
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leaves the table as it is."""
        if self.live:
            self.live.stop()

    def show_epoch(self, name: str, choice: Choice, metrics: dict[str, float]) -> None:
        """Shows an epoch of a running trial."""
        line = _Line(choice, int(metrics["epoch"]), self.config.tune.epochs, metrics["val/error"])
        line.images_per_second = metrics["perf/images_per_second"]
        if name not in self.lines or not self.lines[name].outcome:  # the note of the last epoch may come after the end
            self.lines[name] = line
        if not self.live:
            say(
                f"  {name}  {choice!s:<32} epoch {line.epoch}/{line.num_epochs}  val error {100 * line.val_error:.2f} %  "
                f"{line.images_per_second:.0f} images/s"
            )

    def show_end(self, record: Record) -> None:
        """Shows how a trial ended; a line for those that failed."""
        self.lines[record.name] = _Line.of(record, self.config.tune.epochs)
        self.seconds.append(record.seconds)
        self.num_left -= 1
        if record.fault:
            say(f"  {record.name} failed: {record.fault}")

    def table(self) -> Any:
        """The trials as a table of rich, best first."""
        from rich.table import Table

        table = Table(title=self._title(), title_justify="left")
        rung_heading = ["rung"] if self.rungs else []
        for heading in ("trial", "settings", *rung_heading, "epoch", "val error", "images/s", "state"):
            table.add_column(heading, justify="left" if heading in ("trial", "settings", "state") else "right")
        ranked = sorted(self.lines.items(), key=lambda item: item[1].val_error)
        for name, line in ranked[:MAX_LINES]:
            settings, *rest = line.cells(self.num_rows)
            rung = [f"{bisect_right(self.rungs, line.epoch)}/{len(self.rungs)}"] if self.rungs else []
            table.add_row(name, settings, *rung, *rest, style="dim" if line.outcome else "")
        if len(ranked) > MAX_LINES:
            table.caption = f"and {len(ranked) - MAX_LINES} more"
        return table

    def _title(self) -> str:
        num_ended = sum(bool(line.outcome) for line in self.lines.values())
        left = ""
        if self.seconds and self.num_left > 0:
            mean = sum(self.seconds) / len(self.seconds)
            left = f", about {as_duration(mean * self.num_left / self.num_at_once)} left"
        return f"{num_ended} of {num_ended + max(self.num_left, 0)} trials ended{left}"


class _Line:
    """A trial as the table shows it."""

    def __init__(self, choice: Choice, epoch: int, num_epochs: int, val_error: float):
        self.choice, self.epoch, self.num_epochs, self.val_error = choice, epoch, num_epochs, val_error
        self.images_per_second = 0.0
        self.outcome = ""
        self.since = time.monotonic()

    @classmethod
    def of(cls, record: Record, num_epochs: int) -> "_Line":
        """The line of a trial that has ended."""
        line = cls(record.choice, record.epochs, num_epochs, record.val_error)
        line.images_per_second, line.outcome = record.images_per_second, record.outcome
        return line

    def cells(self, num_rows: int) -> tuple[str, ...]:
        """Text of each column but the first; `num_rows` is the number of images in an epoch."""
        speed = f"{self.images_per_second:,.0f}" if self.images_per_second else ""
        error = f"{100 * self.val_error:.2f} %"
        return (
            str(self.choice),
            f"{self.epoch}/{self.num_epochs}",
            error,
            speed,
            self.outcome or self._time_left(num_rows),
        )

    def _time_left(self, num_rows: int) -> str:
        if not self.images_per_second:
            return "running"
        seconds = (self.num_epochs - self.epoch) * num_rows / self.images_per_second - (time.monotonic() - self.since)
        return f"{as_duration(max(seconds, 0))} left"
