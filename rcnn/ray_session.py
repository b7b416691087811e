"""Ray itself: started or joined, big enough, with a storage that all nodes see."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Ray reads these when it is imported. Reports take 0.1 s instead of 2; the others end noise on the driver's screen, and
# unused files of metrics.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Ray Train's own watcher of preemptions takes 10 s of each start; `train/elastic.py` does its work.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# Tune's own handler would end the search early and call that a result.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")

import ray
from ray._private import ray_constants

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError
from rcnn.progress import say
from rcnn.ray_nodes import require_alike, require_one_machine
from rcnn.ray_token import keep_token_private
from rcnn.storage import Storage

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def ensure_ray(config: PipelineConfig, storage: Storage, *, looks_at_nodes: bool = True) -> None:
    """Starts Ray on this machine, or joins the cluster that this process is in; a second call starts nothing.

    Args:
        config: `ray.address` says which.
        storage: what all nodes must see.
        looks_at_nodes: whether to check the nodes of a cluster; see `ray_nodes.require_alike`.

    Raises:
        ClusterError: there is no such cluster, or not all of its nodes see the storage.
        ConfigError: the cluster has several machines, and MLflow's store is a file.
    """
    if config.ray.address.startswith("http"):
        raise ClusterError(
            "this command works where it is called, and submits no Ray job",
            where=f"ray.address = {config.ray.address!r}",
            remedy='Set it to "" to start Ray here, or to "auto" on a node of the cluster',
        )
    if not ray.is_initialized():
        _join(config) if config.ray.address else _start(config)
    require_one_machine(config.tracking.uri)
    if looks_at_nodes:
        require_alike(storage)


def _join(config: PipelineConfig) -> None:
    with _reported(config, "reached", "Start it with `make up`, or leave the setting empty to start Ray here"):
        ray.init(address="auto", **QUIET)


def _start(config: PipelineConfig) -> None:
    say("  starting Ray on this machine ...")
    _stay_on_loopback()
    keep_token_private()
    with _reported(config, "started", "If it timed out (after 30 s), the machine is busy: run the same command again"):
        # The dashboard is 11 processes and 4 s; only the cleaner that `WorkersTrainer` leaves out asks it anything.
        ray.init(address="local", num_cpus=config.ray.num_cpus or None, include_dashboard=False, **QUIET)


@contextmanager
def _reported(config: PipelineConfig, what: str, remedy: str) -> Iterator[None]:
    """Turns what Ray raises into an error that the user can fix; it raises bare exceptions too."""
    try:
        yield
    except Exception as error:
        raise ClusterError(
            f"Ray cannot be {what} ({' '.join(str(error).split())})",
            where=f"ray.address = {config.ray.address!r}",
            remedy=remedy,
            retryable=True,
        ) from error


def _stay_on_loopback() -> None:
    """On Linux Ray opens its ports to the network, unless it thinks itself unable to form clusters, as on macOS."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from there when ray was imported


def node_here(config: PipelineConfig) -> dict[str, float]:
    """Cores, and bytes of memory without the object store, that Ray would count if it were started on this machine now."""
    available = ray._private.utils.estimate_available_memory()
    memory = available - ray._private.utils.resolve_object_store_memory(available)
    return {"CPU": config.ray.num_cpus or ray._private.utils.get_num_cpus(), "memory": memory}


def require_room(config: PipelineConfig, *, num_cpus: int, num_gpus: float, settings: str) -> None:
    """Checks that cores and GPUs can be had: a local Ray waits without end for what its machine does not have.

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
