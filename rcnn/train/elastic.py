"""Adapts the workers to the cluster: their number where `execution.num_workers` is a range, and nodes that are being drained.

In: the settings and Ray's nodes. Out: the number of workers for an attempt, and a call when they should restart.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from rcnn import ray_session  # noqa: F401  (sets what Ray reads when it is imported)  # isort: skip

import ray

from rcnn.config import ExecutionConfig
from rcnn.errors import ClusterError
from rcnn.progress import say

SECONDS_BETWEEN_LOOKS = 5.0
LOOKS_TO_BE_SURE = 2
SECONDS_TO_SETTLE = 1.0
SECONDS_BETWEEN_LINES = 60.0
MINUTES_TO_WAIT = 30.0


def workers_to_start(how: ExecutionConfig) -> int:
    """The number for the next attempt; where the range's lower end does not fit, waits for room, and says so.

    Raises:
        ClusterError: there is no room for 30 minutes.
    """
    if not how.min_workers:
        return how.num_workers
    waiting = Waiting(how)
    while (room := _settled_room(how)) < how.min_workers:
        waiting.say_and_check(how.min_workers)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return min(room, how.num_workers)


def _settled_room(how: ExecutionConfig) -> int:
    """The room, when it no longer changes: what an earlier attempt held comes back bit by bit."""
    room, before = room_for_workers(how), -1
    while room != before:
        time.sleep(SECONDS_TO_SETTLE)
        before, room = room, room_for_workers(how)
    return room


def room_for_workers(how: ExecutionConfig) -> int:
    """How many workers would fit on the nodes that stay, beside what runs there."""
    leaving = nodes_that_leave()
    nodes = [free for node, free in ray._private.state.available_resources_per_node().items() if node not in leaving]
    return sum(
        min(
            int(node.get("CPU", 0) // how.cpus_per_worker),
            int(node.get("GPU", 0)) if how.use_gpu else how.num_workers,
        )
        for node in nodes
    )


def nodes_that_leave() -> set[str]:
    """The ids of nodes that Ray is draining: spot instances that will be reclaimed, for example."""
    return set(ray._private.state.state.get_draining_nodes())


class Waiting:
    """A wait for room on the cluster: a line a minute, and an end to it."""

    def __init__(self, how: ExecutionConfig):
        self._how, self._started, self._last_line = how, time.monotonic(), -SECONDS_BETWEEN_LINES

    def say_and_check(self, num_workers: int) -> None:
        """Says what is waited for, if the last line is a minute old.

        Raises:
            ClusterError: it has taken too long.
        """
        now, how = time.monotonic(), self._how
        each = f"{how.cpus_per_worker} CPU cores" + (" and a GPU" if how.use_gpu else "")
        what = f"{num_workers} workers of {each} are wanted, and there is room for {room_for_workers(how)}"
        if now - self._started > 60 * MINUTES_TO_WAIT:
            raise ClusterError(
                f"{what}, after {MINUTES_TO_WAIT:.0f} minutes",
                where="execution.num_workers, execution.cpus_per_worker, execution.use_gpu",
                remedy="Lower them, give num_workers a range such as 1..4, or add nodes; the same command resumes",
                retryable=True,
            )
        if now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            say(f"  waiting for the cluster: {what}; nodes: {_nodes_in_words()}")


def _nodes_in_words() -> str:
    free = ray._private.state.available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    cores = [(free.get(node["NodeID"], {}).get("CPU", 0), node["Resources"].get("CPU", 0)) for node in alive]
    names = [node["NodeManagerHostname"] for node in alive]
    return ", ".join(f"{name} {left:g} of {all_:g} cores" for name, (left, all_) in zip(names, cores, strict=True))


@contextmanager
def watching_nodes(
    how: ExecutionConfig, running: int, nodes: Collection[str], ask: Callable[[], None]
) -> Iterator[None]:
    """Calls `ask` once in the body, in a thread, when workers should write a checkpoint and restart.

    That is when one of their nodes is being drained or, if their number is a range, when there is room for more.

    Args:
        how: the settings.
        running: the number of workers.
        nodes: the ids of the nodes where they run; empty until they have started, since the room is theirs until then.
        ask: called in the thread.
    """
    may_grow = bool(how.min_workers) and running < how.num_workers
    ended = threading.Event()

    def watch() -> None:
        looks = 0
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            if nodes_that_leave().intersection(nodes):
                say("  a node with workers is being drained: writing a checkpoint, then restarting on the other nodes")
                ask()
                return
            looks = looks + 1 if may_grow and nodes and room_for_workers(how) > 0 else 0
            if looks == LOOKS_TO_BE_SURE:
                ask()
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
