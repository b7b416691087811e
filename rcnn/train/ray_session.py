"""Ray itself: started or joined, big enough, with a storage that all nodes see, and a board for news from workers.

Workers leave notes on the board, and the driver reads them: what a person sees and what goes to MLflow then has one
writer, and no worker needs a terminal or MLflow.
"""

import contextvars
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Ray reads these when it is imported. Reports take 0.1 s instead of 2; the others end noise on the driver's screen, and
# files of metrics that nobody reads.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")

import ray

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, RcnnError
from rcnn.progress import say
from rcnn.storage import Storage

SECONDS_BETWEEN_READS = 0.3


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


def _require_shared(storage: Storage) -> None:
    """Every node must see what another one writes; asked before anything long starts."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 or not storage.is_local:
        return
    mark = f".seen-by-all-{os.getpid()}"
    storage.write_text(mark, "")
    try:
        sees = ray.remote(num_cpus=0)(os.path.exists)
        answers = {
            node["NodeManagerHostname"]: sees.options(label_selector={"ray.io/node-id": node["NodeID"]}).remote(
                storage.path(mark)
            )
            for node in nodes
        }
        blind = [name for name, answer in answers.items() if not ray.get(answer, timeout=60)]
    finally:
        storage.local_path(mark).unlink()
    if blind:
        raise ClusterError(
            f"node {blind[0]} does not see it ({len(blind)} of {len(nodes)} nodes do not)",
            where=f"storage = {storage.root}",
            remedy="Set storage to a folder that all nodes mount, or to a URI such as s3://bucket/prefix",
        )


def require_room(config: PipelineConfig, num_cpus: int, setting: str) -> None:
    """Checks that `num_cpus` cores can be had: Ray would wait for ever for them on a machine of its own.

    Raises:
        ClusterError: they cannot; where Ray runs on a cluster, which may still grow, a line says so instead.
    """
    there = int(ray.cluster_resources().get("CPU", 0))
    if num_cpus <= there:
        return
    what = f"{num_cpus} CPU cores are wanted and Ray has {there}"
    if config.ray.address == "":
        raise ClusterError(what, where=setting, remedy="Lower it, or set ray.address to a larger cluster")
    say(f"  {what}: waiting for the cluster to grow")


@ray.remote(num_cpus=0)
class Board:
    """Where workers leave what the driver should see."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, Any]] = []

    def put(self, kind: str, value: Any) -> None:
        """Leaves a note."""
        self.notes.append((kind, value))

    def take(self) -> list[tuple[str, Any]]:
        """All notes since the last call."""
        notes, self.notes = self.notes, []
        return notes


@contextmanager
def following(board: Any, handlers: Mapping[str, Callable[[Any], None]]) -> Iterator[None]:
    """Hands each note to the handler of its kind while the body runs; a note of kind "fault" holds an error.

    Raises:
        RcnnError: the first error that a worker left, in place of what Ray made of it.
    """
    faults: list[RcnnError] = []
    stop = threading.Event()

    def read() -> None:
        for kind, value in ray.get(board.take.remote()):
            faults.append(value) if kind == "fault" else handlers[kind](value)

    def read_until_stopped() -> None:
        while not stop.wait(SECONDS_BETWEEN_READS):
            read()

    # With the caller's context, in which Prefect keeps the run that the lines belong to.
    reader = threading.Thread(target=contextvars.copy_context().run, args=(read_until_stopped,), daemon=True)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()
        if ray.is_initialized():
            read()
            ray.kill(board)
        if faults:
            raise faults[0]
