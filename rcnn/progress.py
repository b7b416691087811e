"""What a person sees while a stage works: lines and bars, on standard error.

On a terminal there is a bar; in a log file a line now and then, since a bar would fill it.
"""

import logging
import sys
import time
from collections.abc import Callable

from rcnn.scores import written_metrics
from rcnn.text import printable

SECONDS_BETWEEN_LINES = 15

_log = logging.getLogger("rcnn")


def say(text: str) -> None:
    """Shows the user a line: on the screen, and in the log of the Prefect run if there is one."""
    _log.info(printable(text))  # names of classes and files are in it


def show_on_screen() -> None:
    """Sends what `say` says to standard error, above a bar if there is one; a second call does nothing."""
    if not any(isinstance(handler, _Screen) for handler in _log.handlers):
        _log.addHandler(_Screen())
    _log.setLevel(logging.INFO)
    _log.propagate = False


def hand_on(to: Callable[[str], None]) -> None:
    """Sends what `say` says to a function: from a worker, whose screen nobody sees, to the one that started it."""
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
        from tqdm import tqdm  # late: training alone does without it

        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


class EpochProgress:
    """Progress of a training run, epoch by epoch and within each.

    Args:
        num_epochs: epochs of the whole run.
    """

    def __init__(self, num_epochs: int):
        from tqdm import tqdm

        self.num_epochs = num_epochs
        self._bar = tqdm(total=num_epochs, unit="epoch", file=sys.stderr, leave=False, disable=not sys.stderr.isatty())
        self._last_line = time.monotonic()

    def advance(self, epochs_done: float) -> None:
        """Moves the bar to a fraction of epochs."""
        self._bar.n = round(epochs_done, 2)
        self._bar.refresh()
        if self._bar.disable and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._line(f"  epoch {epochs_done:.2f} of {self.num_epochs}")

    def finish_epoch(self, metrics: dict[str, float]) -> None:
        """Prints the epoch's figures."""
        self._bar.n = metrics["epoch"]
        of_val = {name.removeprefix("val/"): value for name, value in metrics.items() if name.startswith("val/")}
        validation = "  ".join(f"{label} {value}" for label, value in written_metrics(of_val, "val").items())
        self._line(
            f"  epoch {metrics['epoch']:g}/{self.num_epochs}  train loss {metrics['train/loss']:.4f}  {validation}  "
            f"lr {metrics['learning_rate']:.2g}  {metrics['perf/images_per_second']:.0f} images/s"
        )

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        say(text)
