"""The outbox: notes for MLflow, kept in the storage until MLflow has them.

In: notes, as stages report them. Out: what they say, in MLflow, once each and in order. Only the disk is in a stage's way:
a thread sends the notes, and where MLflow is away, they stay, for this process or any later one on the same storage.

A note is a JSON file `outbox/<time>-<random>.json`: sorted by name, notes are in the order in which they were written. It is
deleted when MLflow has it. A sender that is killed between the two leaves a note that is sent again, so
`mlflow_store.RunWriter` makes a second time change nothing. Of each note:

    kind        open, params, metrics, tags, data, model, files, children or end
    run         our own id of the run that it is about: MLflow gives one only when it makes the run
    experiment  in which the run is
    time        of the note, in milliseconds, whenever it is sent

The notes go to the server that `tracking.uri` names when they are sent: a corrected address gets them, and a server that moved.
"""

import contextvars
import os
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, DataError
from rcnn.lease import held
from rcnn.progress import say
from rcnn.storage import StageFolder, Storage
from rcnn.text import counted

FOLDER = "outbox"
NOTE = re.compile(r"\d{20}-[0-9a-f]{8}\.json")
SECONDS_TO_TAKE_A_NOTE = 5.0
"""As long as MLflow takes a note in this time, `flush` waits for it."""
SECONDS_BETWEEN_ATTEMPTS = (5.0, 60.0)
"""To reach a server that is away: at first, and at most."""
SECONDS_BETWEEN_LINES = 60.0
_outboxes: dict[tuple[Any, ...], "Outbox"] = {}


def outbox_of(config: PipelineConfig) -> "Outbox":
    """This process's outbox for the config's storage and MLflow."""
    place = (os.getpid(), config.storage, config.tracking.uri)  # a fork has no thread of its own
    if place not in _outboxes:
        _outboxes[place] = Outbox(config)
    return _outboxes[place]


def num_waiting(config: PipelineConfig) -> int:
    """How many notes MLflow does not have yet."""
    return len(_names(Storage(config.storage)))


def send_waiting(config: PipelineConfig) -> None:
    """Sends what waits for MLflow, and says what still does: to be called at the end of a command.

    Raises:
        ClusterError: the storage cannot be read.
    """
    if not num_waiting(config):
        return
    failure = _failure_of(require_store, config) or _failure_of_notes(config)
    if failure is not None:
        left, place = counted(num_waiting(config), "note"), outbox_of(config).place
        say(f"{left} for MLflow wait in {place} ({failure.what}): the next command on this storage sends them")


def wait_for_mlflow(config: PipelineConfig) -> None:
    """Returns when MLflow answers and has every note; waits for that, up to `tracking.wait_minutes`.

    Raises:
        ClusterError: it does not, or the store is damaged.
    """
    deadline, next_line = time.monotonic() + 60 * config.tracking.wait_minutes, 0.0
    while (failure := _failure_of(_require_answer, config) or _failure_of_notes(config)) is not None:
        if not failure.retryable or time.monotonic() > deadline:
            raise ClusterError(
                failure.what,
                where=failure.where,
                remedy=f"{failure.remedy}, and run the same command again: what is done stays done, and what MLflow missed is "
                f"in {outbox_of(config).place}. tracking.wait_minutes = {config.tracking.wait_minutes:g} is how long to wait",
                retryable=failure.retryable,
            ) from failure
        if time.monotonic() > next_line:
            next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            minutes = (deadline - time.monotonic()) / 60
            say(f"  waiting for MLflow, for up to {minutes:.0f} min ({failure.where}: {failure.what})")
        time.sleep(min(SECONDS_BETWEEN_ATTEMPTS[0], max(0.1, deadline - time.monotonic())))


def require_store(config: PipelineConfig) -> None:
    """Checks what is not a server, and creates it where it is missing: a damaged file, say, is not a matter of waiting.

    Raises:
        ClusterError: it is damaged.
    """
    if not config.tracking.uri.startswith("http"):
        _require_answer(config)


def _require_answer(config: PipelineConfig) -> None:
    from rcnn.registry.mlflow_store import require_answer  # late: MLflow takes seconds to import

    require_answer(config)


def _failure_of(check: Callable[[PipelineConfig], None], config: PipelineConfig) -> ClusterError | None:
    try:
        check(config)
    except ClusterError as error:
        return error
    return None


def _failure_of_notes(config: PipelineConfig) -> ClusterError | None:
    """Why MLflow has not every note; None where it has."""
    outbox = outbox_of(config)
    if outbox.flush():
        return None
    return outbox.failure or ClusterError(
        "MLflow has not taken all notes yet",
        where=f"tracking.uri = {config.tracking.uri}",
        remedy="Check the server",
        retryable=True,
    )


class Outbox:
    """The notes in one storage, and the thread that sends them to one MLflow."""

    def __init__(self, config: PipelineConfig):
        self.run_ids: dict[str, str] = {}
        """MLflow's ids of the runs that this process has sent notes of."""
        self.failure: ClusterError | None = None
        """Why MLflow takes no notes now."""
        self._config, self._storage = config, Storage(config.storage)
        self._writer: Any = None
        self._last_time = 0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        """Guards the counts below, the last time and the thread."""
        self._num_asked = self._num_answered = self._num_failures = self._num_sent = 0

    @property
    def place(self) -> str:
        """Where the notes are, for people."""
        return self._storage.uri(FOLDER)

    def append(self, note: Mapping[str, Any], files: Path | None = None) -> None:
        """Keeps a note, and the files of a local folder with it. They survive a power cut as soon as this returns.

        Raises:
            ClusterError: the storage cannot be written.
        """
        with self._changed:
            name = self._next_name()
            if files is not None:  # first: a note is sent as soon as it is there
                self._storage.upload(files, f"{FOLDER}/{name}")
            stamped = {**note, "time": time.time_ns() // 1_000_000}
            self._storage.write_json(f"{FOLDER}/{name}.json", stamped, durable=True)
            self._num_asked += 1
            self._start()
            if self.failure is None:  # else the thread asks again in its own time
                self._wake.set()

    def flush(self) -> bool:
        """Has all notes sent now. False where MLflow fails, or takes no note for `SECONDS_TO_TAKE_A_NOTE`."""
        import rcnn.registry.mlflow_store  # noqa: F401  (not in the thread: it takes seconds, and they would count)

        with self._changed:
            self._num_asked += 1
            asked, failures = self._num_asked, self._num_failures
            self._start()
            self._wake.set()

            def is_settled() -> bool:
                return self._num_answered >= asked or self._num_failures > failures

            sent = -1
            while not is_settled() and self._num_sent > sent:
                sent = self._num_sent
                self._changed.wait_for(lambda: is_settled() or self._num_sent > sent, SECONDS_TO_TAKE_A_NOTE)  # noqa: B023
            return self._num_answered >= asked

    def _next_name(self) -> str:
        """A name behind those of all notes that are there: clocks of other machines may be ahead."""
        if not self._last_time:
            names = _names(self._storage)
            self._last_time = int(names[-1].partition("-")[0]) if names else 0
        self._last_time = max(self._last_time + 1, time.time_ns())
        return f"{self._last_time:020d}-{uuid.uuid4().hex[:8]}"

    def _start(self) -> None:
        if self._thread is None:
            # With the caller's context, in which Prefect keeps the run that the lines belong to.
            run = contextvars.copy_context().run
            self._thread = threading.Thread(target=run, args=(self._run,), daemon=True, name="outbox")
            self._thread.start()

    def _run(self) -> None:
        """Sends notes when there are some, or, after a failure, when it is time to ask again."""
        shortest, longest = SECONDS_BETWEEN_ATTEMPTS
        delay = 0.0
        while True:
            self._wake.wait(delay or None)
            self._wake.clear()
            delay = 0.0 if self._send_all() else min(2 * delay or shortest, longest)

    def _send_all(self) -> bool:
        """Sends all notes; whether MLflow took them."""
        with self._changed:
            asked, sent_before = self._num_asked, self._num_sent
        try:
            with _only_sender(self._storage):
                while names := _names(self._storage):
                    for name in names:
                        self._send(name)
        except Exception as error:  # an error in a thread would be lost
            self._fail(error)
            return False
        if self.failure is not None:
            say(f"  MLflow answers again: {counted(self._num_sent - sent_before, 'note')} sent")
        with self._changed:
            self.failure, self._num_answered = None, asked
            self._changed.notify_all()
        return True

    def _send(self, name: str) -> None:
        file, folder = f"{FOLDER}/{name}.json", f"{FOLDER}/{name}"
        try:
            note = self._read(file)
            if note is None:  # another process has sent it, where the storage has no leases
                return
            self._write(note, folder)
        except DataError as error:
            say(f"  {self._storage.uri(file)} is dropped: {error}")
        self._storage.delete_file(file)
        self._storage.delete(folder)
        with self._changed:
            self._num_sent += 1
            self._changed.notify_all()

    def _read(self, file: str) -> Any:
        try:
            note = self._storage.read_json(file)
        except ValueError as error:
            raise DataError(f"it is not a note ({error})") from error
        if note is not None and not (isinstance(note, dict) and note.keys() >= {"kind", "run", "experiment", "time"}):
            raise DataError("it is not a note")
        return note

    def _write(self, note: Mapping[str, Any], folder: str) -> None:
        from rcnn.registry.mlflow_store import RunWriter

        self._writer = self._writer or RunWriter(self._config)
        with tempfile.TemporaryDirectory() as files:
            if note["kind"] == "files":
                self._storage.download(folder, Path(files))
            self.run_ids[note["run"]] = self._writer.write(note, Path(files))

    def _fail(self, error: Exception) -> None:
        self._writer = None  # what it knows of MLflow may not hold any more
        if not isinstance(error, ClusterError):
            what = f"sending notes to MLflow failed ({type(error).__name__}: {error})"
            error = ClusterError(what, where=self.place, remedy="Look into MLflow's log")
        if self.failure is None:
            say(
                f"  {error.where}: {error.what}. Notes for MLflow are kept in {self.place} and sent when it answers; only "
                "`register` waits for it"
            )
        with self._changed:
            self.failure = error
            self._num_failures += 1
            self._changed.notify_all()


def _names(storage: Storage) -> list[str]:
    """The names of the notes, in their order."""
    return [file.removesuffix(".json") for file in storage.list_files(FOLDER) if NOTE.fullmatch(file)]


@contextmanager
def _only_sender(storage: Storage) -> Iterator[None]:
    """Lets one process send at a time."""
    if not storage.is_local:
        with held(StageFolder(storage, FOLDER), says_so=False):
            yield
        return
    path = storage.local_path(f".locks/{FOLDER}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):  # cheaper than a lease
        yield
