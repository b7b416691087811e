"""Ray itself: started or joined, big enough, with a storage that all nodes see, and a board for news from workers.

Workers leave notes on the board, and the driver reads them: what a person sees and what goes to MLflow then has one
writer, and no worker needs a terminal or MLflow.
"""

import contextvars
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Ray reads these when it is imported. Reports take 0.1 s instead of 2; the others end noise on the driver's screen, and
# files of metrics that nobody reads.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Tune's own handler would end the search early and call that a result.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")

import ray
from ray._private import ray_constants

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, RcnnError
from rcnn.progress import say
from rcnn.storage import Storage

SECONDS_BETWEEN_READS = 0.3
SECONDS_FOR_AN_ANSWER = 30


def ensure_ray(config: PipelineConfig, storage: Storage) -> None:
    """Starts Ray on this machine, or joins the cluster that this process is in; a second call does nothing.

    Raises:
        ClusterError: there is no such cluster, or not all of its nodes see the storage.
    """
    if config.ray.address.startswith("http"):
        raise ClusterError(
            "a stage by itself runs where it is called",
            where=f"ray.address = {config.ray.address!r}",
            remedy='Use `rcnn pipeline` to submit Ray jobs, or set ray.address to "auto" on a node of the cluster',
        )
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if config.ray.address == "auto":
                ray.init(address="auto", **quiet)
            else:
                say("  starting Ray on this machine ...")
                _stay_on_loopback()
                # Nobody preempts a machine of one's own, and watching for it takes 10 s of each training's start.
                os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
                # Without its dashboard, Ray complains every few seconds that its State API is away.
                ray.init(address="local", num_cpus=config.ray.num_cpus or None, include_dashboard=True, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"Ray cannot be reached ({' '.join(str(error).split())})",
                where=f"ray.address = {config.ray.address!r}",
                remedy="Start it with `make up`, or leave the setting empty to start Ray here",
                retryable=True,
            ) from error
    _require_shared(storage)


def _stay_on_loopback() -> None:
    """On Linux Ray opens its ports to the network, unless it thinks itself unable to form clusters, as on macOS."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from there when ray was imported


def _require_shared(storage: Storage) -> None:
    """Every node must see what another one writes; asked before anything long starts."""
    if not storage.is_local or len(_nodes()) == 1:
        return
    mark = f".seen-by-all-{os.getpid()}"
    storage.write_text(mark, "")
    try:
        require_seen(storage.local_path(mark), setting="storage")
    finally:
        storage.local_path(mark).unlink()


def require_seen(path: Path, *, setting: str) -> None:
    """Checks that every node sees a path.

    Raises:
        ClusterError: one does not, or does not answer.
    """
    nodes = _nodes()
    if len(nodes) == 1:
        return
    sees = ray.remote(num_cpus=0)(os.path.exists)
    answers = {
        f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})": sees.options(
            label_selector={"ray.io/node-id": node["NodeID"]}
        ).remote(str(path))
        for node in nodes
    }
    ready, _ = ray.wait(list(answers.values()), num_returns=len(answers), timeout=60)
    blind = [name for name, answer in answers.items() if answer not in ready or not ray.get(answer)]
    if blind:
        raise ClusterError(
            f"node {blind[0]} does not see it ({len(blind)} of {len(nodes)} nodes do not)",
            where=f"{setting} = {path}",
            remedy=f"Set {setting} to a folder that all nodes mount, or to a URI such as s3://bucket/prefix",
            retryable=True,
        )


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def require_room(config: PipelineConfig, *, num_cpus: int, num_gpus: float, settings: str) -> None:
    """Checks that cores and GPUs can be had: Ray would wait for ever for what its own machine does not have.

    Raises:
        ClusterError: they cannot; where Ray runs on a cluster, which may still grow, a line says so instead.
    """
    there = ray.cluster_resources()
    for wanted, kind, name in ((num_cpus, "CPU", "CPU cores"), (num_gpus, "GPU", "GPUs")):
        if wanted <= there.get(kind, 0):
            continue
        what = f"{wanted:g} {name} are wanted and Ray has {there.get(kind, 0):g}"
        if config.ray.address == "":
            raise ClusterError(what, where=settings, remedy="Lower them, or set ray.address to a larger cluster")
        say(f"  {what}: waiting for the cluster to grow")


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes Ctrl-C in the body what it is everywhere else: Ray Train would exit with 0, and keep its handler."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)


class _Notes:
    """Where workers leave what the driver should see: the class of the actor that `new_board` starts."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, Any]] = []

    def put(self, kind: str, value: Any) -> None:
        """Leaves a note."""
        self.notes.append((kind, value))

    def take(self) -> list[tuple[str, Any]]:
        """All notes since the last call."""
        notes, self.notes = self.notes, []
        return notes


def new_board() -> Any:
    """Starts the actor that holds the notes."""
    return ray.remote(num_cpus=0)(_Notes).remote()


@contextmanager
def following(board: Any, handlers: Mapping[str, Callable[[Any], None]]) -> Iterator[None]:
    """Hands each note to the handler of its kind while the body runs.

    A note of kind "fault" holds an error that ended one worker, and "fatal" one that ended them all. A handler that fails
    for a reason that may pass (MLflow is away, say) gets the same note again a little later.

    Raises:
        RcnnError: where the body fails, the first error that a worker left, in place of what Ray made of it; where it
            does not, a fatal one, or that of a handler which still fails at the end.
    """
    reader = _Reader(board, handlers)
    # With the caller's context, in which Prefect keeps the run that the lines belong to.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(reader.run,), daemon=True)
    thread.start()
    try:
        yield
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
        """Reads until told to stop."""
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
