"""Cells as processes: each runs `rcnn evaluate` with its own config, so a cell that fails or is killed harms no other.

Two trainings in one process would share its Ray, its signal handlers and its random state.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rcnn.errors import TrainingError
from rcnn.progress import say
from rcnn.reproduce.cells import LAST
from rcnn.reproduce.tables import Cell
from rcnn.signals import SECONDS_TO_END
from rcnn.storage import Storage

LOGS = "reports/reproduce-logs"
OF_AN_ERROR = "rcnn: "


class Processes:
    """Runs cells, from any number of threads. Used as a context: those that are running at its end are stopped."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        """Stops what is running, if the body was interrupted; each training writes a checkpoint first."""
        with self._lock:
            self._is_closed, left = True, list(self._running)
        for process in left:
            process.terminate()
        for process in left:
            try:
                process.wait(2 * SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()

    def run(self, cell: Cell) -> None:
        """Runs a cell to its end. Its lines are reported with its name in front, and kept in a log.

        Raises:
            TrainingError: it failed or was stopped; the message is its own.
        """
        lines: list[str] = []
        with _config_file(cell) as file, self._process(file) as process:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line.rstrip())
                say(f"[{cell.name}] {lines[-1].strip()}")
        storage, log = Storage(cell.config.storage), f"{LOGS}/{cell.name}.log"
        storage.make_folder(LOGS)
        storage.write_text(log, "\n".join(lines))
        if process.returncode:
            errors = [line.removeprefix(OF_AN_ERROR) for line in lines if line.startswith(OF_AN_ERROR)]
            raise TrainingError(
                errors[-1] if errors else f"ended with exit code {process.returncode}",
                where=cell.name,
                remedy=f"Its log is {storage.uri(log)}; the same command runs what is left",
            )

    @contextmanager
    def _process(self, file: Path) -> Iterator["subprocess.Popen[str]"]:
        command = [sys.executable, "-m", "rcnn.cli", LAST, "--config", str(file)]
        with self._lock:
            if self._is_closed:
                raise TrainingError("was not started", where=str(file), remedy="The same command runs what is left")
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=_environment()
            )
            self._running.add(process)
        try:
            with process:  # waits for its end, and closes the pipe
                yield process
        finally:
            with self._lock:
                self._running.discard(process)


@contextmanager
def _config_file(cell: Cell) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rcnn-cell-") as folder:
        file = Path(folder, "config.json")
        file.write_text(cell.config.model_dump_json())
        yield file


def _environment() -> Mapping[str, str]:
    """Without `RCNN_...` variables: they are in the config already, and one such as RCNN_SEED would change each cell."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RCNN_")}
