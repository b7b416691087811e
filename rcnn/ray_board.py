"""A board between the workers and the driver: workers leave notes for the driver, and the driver a request for them.

What a person sees and what goes to MLflow then has one writer, and no worker needs a terminal or MLflow.
"""

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rcnn import ray_session  # noqa: F401  (sets what Ray reads when it is imported)  # isort: skip

import ray

from rcnn.errors import RcnnError

SECONDS_BETWEEN_READS = 0.3
SECONDS_FOR_AN_ANSWER = 30


class _Notes:
    """Where workers leave what the driver should see: the class of the actor that `new_board` starts."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, Any]] = []
        self.request = ""

    def ask(self, request: str) -> None:
        """Leaves a request for the workers; an empty one takes it back."""
        self.request = request

    def asked(self) -> str:
        """The driver's request."""
        return self.request

    def put(self, kind: str, value: Any) -> None:
        """Leaves a note."""
        self.notes.append((kind, value))

    def take(self) -> list[tuple[str, Any]]:
        """All notes since the last call."""
        notes, self.notes = self.notes, []
        return notes


def new_board() -> Any:
    """Starts the actor that holds the notes, on the driver's own node: another one may be lost without the driver."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=here)(_Notes).remote()


class Listener:
    """A worker's ear: reads the driver's request in a thread of its own, so that a step never waits for it."""

    def __init__(self, board: Any):
        self.request = ""
        self._board = board
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while not self.request:
            time.sleep(SECONDS_BETWEEN_READS)
            try:
                self.request = ray.get(self._board.asked.remote())
            except ray.exceptions.RayError:  # the driver is gone, and Ray ends this process
                return


@contextmanager
def following(board: Any, handlers: Mapping[str, Callable[[Any], None]]) -> Iterator[list[RcnnError]]:
    """Hands each note to the handler of its kind while the body runs. Yields the list of fatal errors, which grows.

    A note of kind "fault" holds an error that ended one worker, and "fatal" one that ended them all. A handler that fails
    for a reason that may pass (the storage cannot be written, say) gets the same note again a little later.

    Raises:
        RcnnError: where the body fails, the first error that a worker left, in place of what Ray made of it; where it
            does not, a fatal one, or that of a handler which still fails at the end.
    """
    reader = _Reader(board, handlers)
    # With the caller's context, in which Prefect keeps the run that the lines belong to.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(reader.run,), daemon=True)
    thread.start()
    try:
        yield reader.fatal
    except Exception as error:
        reader.finish(thread)
        raise next(iter([*reader.fatal, *reader.faults]), error) from error
    except BaseException:
        reader.finish(thread)
        raise
    reader.finish(thread)
    # A fault that did not stop the body was mended by a retry.
    for left in (*reader.fatal, *filter(None, [reader.handler_error])):
        raise left


class _Reader:
    """Reads a board in a thread of its own."""

    def __init__(self, board: Any, handlers: Mapping[str, Callable[[Any], None]]):
        self.board, self.handlers = board, handlers
        self.answer: Any = None  # asked for and not there yet: the board has let go of those notes
        self.notes: deque[tuple[str, Any]] = deque()
        self.faults: list[RcnnError] = []
        self.fatal: list[RcnnError] = []
        self.handler_error: Exception | None = None
        self.stop = threading.Event()

    def run(self) -> None:
        """Reads until `stop` is set."""
        while not self.stop.wait(SECONDS_BETWEEN_READS):
            self.read()

    def read(self) -> None:
        """Takes what is new, and hands out what is waiting."""
        try:
            self._take()
            while self.notes:
                kind, value = self.notes[0]
                self.handlers[kind](value)
                self.notes.popleft()
            self.handler_error = None
        except Exception as error:  # raised by `following` if it lasts: an error in a thread would be lost
            self.handler_error = error

    def _take(self) -> None:
        self.answer = self.answer or self.board.take.remote()
        taken = ray.get(self.answer, timeout=SECONDS_FOR_AN_ANSWER)
        self.answer = None
        for kind, value in taken:
            if kind == "fault":
                self.faults.append(value)
            elif kind == "fatal":
                self.fatal.append(value)
            else:
                self.notes.append((kind, value))

    def finish(self, thread: threading.Thread) -> None:
        """Stops the thread and reads what is left."""
        self.stop.set()
        thread.join()
        self.read()
        ray.kill(self.board)
