"""Load of the machine while a stage runs, for the tab "System metrics" of its MLflow run.

MLflow's own sampler writes straight to MLflow, from a thread that gives up where MLflow is away. So its monitors are read
here, and what they measure goes to the outbox like every other note. They measure the whole machine on which the stage was
called. That is the one that trains, unless Ray has several; of a Ray job it is the head node.
"""

import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rcnn.errors import ClusterError
from rcnn.tracking import Tracker

SECONDS_BETWEEN_SAMPLES = 10.0
MOST_SHARE_BETWEEN_POINTS = 0.02
"""Of the time so far. A point is a note in the storage, and a day of them every 10 s would be 8,640; so it is some 300."""


@contextmanager
def sampling(tracker: Tracker, *, is_one_of_many: bool = False) -> Iterator[None]:
    """Logs the load of this machine while the body runs, with a last point at its end.

    Args:
        tracker: the run.
        is_one_of_many: whether Ray may have other machines: the names of the metrics then say which one this is.
    """
    stop = threading.Event()
    prefix = f"system/{platform.node()}/" if is_one_of_many else "system/"
    thread = threading.Thread(target=_sample, args=(tracker, prefix, stop), daemon=True, name="system metrics")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _sample(tracker: Tracker, prefix: str, stop: threading.Event) -> None:
    from rcnn.registry.mlflow_store import SystemMonitor  # in the thread: it takes seconds to import

    monitor, started = SystemMonitor(), time.monotonic()
    last = started
    while True:
        is_last = stop.wait(SECONDS_BETWEEN_SAMPLES)
        monitor.sample()
        now = time.monotonic()
        if is_last or now - last >= MOST_SHARE_BETWEEN_POINTS * (now - started):
            last = now
            try:
                # The second as the step: a stage that resumes goes on in the same run.
                tracker.log_metrics(monitor.take(prefix), step=int(time.time()))
            except ClusterError:
                return  # the storage cannot be written, which the stage itself reports
        if is_last:
            return
