"""What a Ray pod does before Kubernetes ends it, as its preStop hook: training writes a checkpoint, and the work leaves.

    python leave.py worker    # drains this node; returns when nothing of a run is left on it
    python leave.py head      # stops the running jobs; returns when they have ended

Training answers a drained node with a checkpoint and a restart on the other nodes (`rcnn/train/elastic.py`), and the SIGTERM of
a job that is stopped with a checkpoint (`rcnn/signals.py`). Without this hook it would resume at its last checkpoint, which may
be ten minutes old. A ConfigMap brings the file into the pod, so it imports nothing of rcnn.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable

import psutil
from ray._private.services import find_node_ids
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # a compiled module
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.job_submission import JobSubmissionClient

SECONDS = 75.0
"""Less than the pod's terminationGracePeriodSeconds, of which Ray's own end needs a few."""


def main() -> int:
    """Runs one of the two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("role", choices=["worker", "head"])
    parser.add_argument("--node-id", help="a node of this machine (default: the only one)")
    parser.add_argument("--dashboard", default="http://127.0.0.1:8265", help="the head's, on this machine")
    options = parser.parse_args()
    if options.role == "head":
        return 0 if stop_jobs(options.dashboard) else 1
    return 0 if drain(options.node_id or find_node_ids().pop()) else 1


def drain(node_id: str) -> bool:
    """Tells Ray that this node will be gone; returns whether everything has left it in time."""
    deadline = int(1000 * (time.time() + SECONDS))
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    gcs = GcsClient(address=os.environ["RAY_ADDRESS"])  # KubeRay sets it
    accepted, why_not = gcs.drain_node(node_id, reason, "Kubernetes ends the pod", deadline)
    if not accepted:
        print(f"leave: Ray refuses to drain node {node_id}: {why_not}", file=sys.stderr)
        return False
    raylets = [process for process in psutil.process_iter() if _is_raylet(process, node_id)]
    return _wait(lambda: not any(_is_at_work(child) for raylet in raylets for child in _children(raylet)))


def stop_jobs(dashboard: str) -> bool:
    """Stops the jobs of the cluster; returns whether all have ended in time."""
    client = JobSubmissionClient(dashboard)
    running = [job.submission_id for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()]
    for job in running:
        client.stop_job(job)
    return _wait(lambda: all(client.get_job_status(job).is_terminal() for job in running))


def _wait(is_done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS
    while not is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _is_raylet(process: psutil.Process, node_id: str) -> bool:
    try:
        return process.name() == "raylet" and any(node_id in word for word in process.cmdline())
    except psutil.Error:
        return False


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children())
    except psutil.NoSuchProcess:
        return []  # a drained raylet ends when nothing is left on it


def _is_at_work(process: psutil.Process) -> bool:
    """Whether a process runs a task or an actor; Ray gives its workers titles: `ray::IDLE`, or what they run."""
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return title.startswith("ray::") and not title.startswith("ray::IDLE")


if __name__ == "__main__":
    sys.exit(main())
