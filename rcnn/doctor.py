"""`rcnn doctor`: looks at all that a run depends on, and says what is wrong before hours are spent.

In: a config. Out: a finding per part: the storage, Ray and its nodes, MLflow, Prefect, and what killed runs left. To add a
check, add a function to `CHECKS`.
"""

import json
import os
import shutil
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, ConfigError, RcnnError
from rcnn.lease import all_holders, break_lease
from rcnn.registry.outbox import num_waiting, outbox_of
from rcnn.storage import Storage
from rcnn.text import counted
from rcnn.tracking import has_store, tracking_uri

SECONDS_TO_ANSWER = 10
SCARCE = 2_000_000_000
"""Bytes free in the storage below which a warning is due: a few checkpoints of the paper's largest network, and a data set."""


@dataclass(frozen=True)
class Finding:
    """What was found of one part.

    Attributes:
        part: what was looked at.
        text: how it is.
        remedy: what to do; empty: it is sound.
        mend: does it, where `--mend` can.
    """

    part: str
    text: str
    remedy: str = ""
    mend: Callable[[], None] | None = None


def examine(config: PipelineConfig, more: "Mapping[str, Check] | None" = None) -> Iterator[Finding]:
    """Looks at one part after another, `more` being further checks. A check that fails is a finding too."""
    for part, check in (CHECKS | dict(more or {})).items():
        try:
            for finding in check(config):
                yield Finding(part, *finding)
        except RcnnError as error:
            where = f"{error.where}: " if error.where else ""
            yield Finding(part, f"{where}{error.what}", error.remedy or "See the message")


Facts = Iterator[tuple[Any, ...]]
"""The fields of findings after `part`."""
Check = Callable[[PipelineConfig], Facts]


def _storage(config: PipelineConfig) -> Facts:
    storage = Storage(config.storage)
    storage.write_text(".doctor", "")
    storage.delete_file(".doctor")
    if not storage.is_local:
        yield (f"{storage.root} can be written",)
        return
    free = shutil.disk_usage(storage.root).free
    remedy = "Free some space, or set storage elsewhere" if free < SCARCE else ""
    yield f"{storage.root} can be written; {free / 1e9:,.0f} GB are free", remedy


def _ray(config: PipelineConfig) -> Facts:
    address, how = config.ray.address, config.execution
    cores = how.num_workers * how.cpus_per_worker
    wanted = f"{counted(cores, 'core')} are wanted for training"
    if address.startswith("http"):
        version = _get(f"{address}/api/version", "ray.address", "Start it with `make up`, or correct the address")
        yield (f"{address} answers (Ray {version.get('ray_version', '?')}); its nodes: ray job submit -- rcnn doctor",)
        return
    if address == "":
        from rcnn.ray_session import node_here

        here = node_here(config)
        remedy = "Lower execution.num_workers or execution.cpus_per_worker" if cores > here["CPU"] else ""
        yield f"will be started on this machine, with {here['CPU']:g} cores; {wanted}", remedy
        return
    from rcnn.ray_session import ensure_ray
    from rcnn.ray_nodes import look_at_nodes  # isort: skip

    ensure_ray(config, Storage(config.storage), looks_at_nodes=False)
    nodes = look_at_nodes(Storage(config.storage))
    for node in nodes:
        has = f"{node.cpus:g} cores, {node.gpus:g} GPUs"
        yield f"node {node.name}: {node.fault or 'sound'}; {has}", node.remedy
    there = sum(node.cpus for node in nodes if not node.fault)
    yield f"{there:g} cores on sound nodes; {wanted}", "Lower execution.num_workers" if cores > there else ""


def _mlflow(config: PipelineConfig) -> Facts:
    if not has_store(config):
        yield (f"{tracking_uri(config)} will be created",)
        return
    _require_mlflow(config)
    from rcnn.registry.mlflow_store import list_models

    yield (f"{tracking_uri(config)} answers; {counted(len(list_models(config)), 'registered model')}",)


def _require_mlflow(config: PipelineConfig) -> None:
    """Asks by itself, since MLflow's own client would try for minutes."""
    if config.tracking.uri.startswith("http"):
        _answers(f"{config.tracking.uri}/health", "tracking.uri", "Start the server, or correct the address")


def _prefect(config: PipelineConfig) -> Facts:
    uri = os.environ.get("PREFECT_API_URL", "")
    if not uri:
        yield ("PREFECT_API_URL is not set: `rcnn pipeline` starts a server of its own",)
        return
    _answers(f"{uri}/health", "PREFECT_API_URL", "Start the server (`make up`), or unset it")
    yield (f"{uri} answers",)


def _left_over(config: PipelineConfig) -> Facts:
    yield from [*_left_leases(config), *_left_runs(config), *_left_notes(config)] or [("nothing",)]


def _left_leases(config: PipelineConfig) -> Facts:
    storage = Storage(config.storage)
    for holder in all_holders(storage):
        if not holder.seems_alive:
            text = f"the lease of {holder.work} is held by {holder}, which has ended"
            yield text, _MEND, partial(break_lease, storage, holder)


def _left_runs(config: PipelineConfig) -> Facts:
    if not has_store(config):
        return
    _require_mlflow(config)
    from rcnn.registry.mlflow_store import end_run, runs_without_a_process

    for run in runs_without_a_process(config):
        text = f"the MLflow run {run.name} of {run.key} ({run.run_id[:8]}) is running, and no process holds its lease"
        yield text, _MEND, partial(end_run, config, run.run_id)


def _left_notes(config: PipelineConfig) -> Facts:
    if num_notes := num_waiting(config):
        yield f"{counted(num_notes, 'note')} for MLflow wait in {outbox_of(config).place}", "The next run sends them"


_MEND = "`rcnn doctor --mend` ends it"
CHECKS: dict[str, Check] = {
    "storage": _storage,
    "Ray": _ray,
    "MLflow": _mlflow,
    "Prefect": _prefect,
    "left over": _left_over,
}


def _answers(url: str, setting: str, remedy: str) -> bytes:
    """What a server answers.

    Raises:
        ClusterError: it does not, in 10 seconds.
        ConfigError: that is no address.
    """
    try:
        with urllib.request.urlopen(url, timeout=SECONDS_TO_ANSWER) as answer:  # noqa: S310  (http, from the settings)
            return bytes(answer.read())
    except ValueError as error:
        raise ConfigError(str(error), where=f"{setting} = {url}", remedy=remedy) from error
    except OSError as error:
        cause = getattr(error, "reason", error)  # urllib wraps it
        reason = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else cause
        raise ClusterError(f"does not answer ({reason})", where=f"{setting}, {url}", remedy=remedy) from error


def _get(url: str, setting: str, remedy: str) -> dict[str, Any]:
    try:
        return dict(json.loads(_answers(url, setting, remedy)))
    except ValueError as error:
        raise ClusterError("is not the dashboard of Ray", where=f"{setting}, {url}", remedy=remedy) from error
