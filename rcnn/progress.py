"""Progress reports of a stage: lines and bars, on standard error.

On a terminal, a bar; in a log file, a line now and then, because a bar would flood it.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable

from rcnn.scores import written_metrics
from rcnn.text import printable

SECONDS_BETWEEN_LINES = 15

_log = logging.getLogger("rcnn")


def say(text: str) -> None:
    """Reports a line to the user: on the screen, and in the log of the Prefect run if there is one."""
    _log.info(printable(text))  # it can contain names of classes and files


def say_lines(lines: Iterable[str]) -> None:
    """Reports several lines that belong together, such as a table."""
    _log.info("\n".join(printable(line) for line in lines))


def show_on_screen() -> None:
    """Prints the lines of `say` to standard error, above the progress bar if there is one; a second call does nothing."""
    if not any(isinstance(handler, _Screen) for handler in _log.handlers):
        _log.addHandler(_Screen())
    _log.setLevel(logging.INFO)
    _log.propagate = False


def hand_on(to: Callable[[str], None]) -> None:
    """Sends the lines of `say` to a function: from a worker, whose output is not shown, to the driver."""
    _log.handlers = [_Elsewhere(to)]
    _log.setLevel(logging.INFO)


class _Elsewhere(logging.Handler):
    def __init__(self, to: Callable[[str], None]):
        super().__init__()
        self._to = to

    def emit(self, record: logging.LogRecord) -> None:
        self._to(record.getMessage())


class _Screen(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # late: the training core must run without tqdm

        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


class EpochProgress:
    """Progress of a training run, epoch by epoch and within each.

    Args:
        num_epochs: total number of epochs of the run.
    """

    def __init__(self, num_epochs: int):
        from tqdm import tqdm

        self.num_epochs = num_epochs
        self._bar = tqdm(total=num_epochs, unit="epoch", file=sys.stderr, leave=False, disable=not sys.stderr.isatty())
        self._last_line = time.monotonic()

    def advance(self, epochs_done: float) -> None:
        """Moves the bar to a number of epochs, fractions included; without a terminal, prints a line every 15 s."""
        self._bar.n = round(epochs_done, 2)
        self._bar.refresh()
        if self._bar.disable and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._line(f"  epoch {epochs_done:.2f} of {self.num_epochs}")

    def finish_epoch(self, metrics: dict[str, float]) -> None:
        """Prints the epoch's metrics."""
        self._bar.n = metrics["epoch"]
        of_val = {name.removeprefix("val/"): value for name, value in metrics.items() if name.startswith("val/")}
        validation = "  ".join(f"{label} {value}" for label, value in written_metrics(of_val, "val").items())
        self._line(
            f"  epoch {metrics['epoch']:g}/{self.num_epochs}  train loss {metrics['train/loss']:.4f}  {validation}  "
            f"lr {metrics['learning_rate']:.2g}  {metrics['perf/images_per_second']:.0f} images/s"
        )

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        say(text)


class RowProgress:
    """Progress of work on rows: a bar; without a terminal, a line every 15 s.

    Args:
        num_rows: all rows.
        num_done: those that were done before.
    """

    def __init__(self, num_rows: int, *, num_done: int = 0):
        from tqdm import tqdm

        self._bar = tqdm(
            total=num_rows,
            initial=num_done,
            unit=" rows",
            file=sys.stderr,
            leave=False,
            disable=not sys.stderr.isatty(),
        )
        self._num_rows, self._num_done, self._last_line = num_rows, num_done, time.monotonic()

    def advance(self, num_rows: int) -> None:
        """Counts rows that are done now."""
        self._num_done += num_rows
        self._bar.update(num_rows)
        if self._bar.disable and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            say(f"  {self._num_done:,} of {self._num_rows:,} rows")

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()


def as_duration(seconds: float) -> str:
    """`9 s`, `4 min`, `2 h 10 min`, `3 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours < 48 else f"{hours / 24:.0f} days"
