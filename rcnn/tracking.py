"""How a stage reports progress, whatever records it.

Stages get a `Tracker` handed in and never import MLflow; `registry/runs.py` holds the one that leads there. The
driver is the only writer: workers send their numbers to it (so SQLite is enough, and no credential leaves the driver).
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, ConfigError
from rcnn.progress import say
from rcnn.storage import Storage

STORE = "mlflow.db"
"""Our own store in the storage (SQLite), where no server is set."""
UI_ADDRESS = "http://127.0.0.1:5000"
"""Where `mlflow ui` answers unless told otherwise."""
TRAINING = "workflowType=machine_learning"
"""In a link to MLflow's UI: which of its two menus it shows."""
VIEW = "rcnn"
"""The name of a view in each experiment of MLflow: what the table of runs shows."""

FLOW_PAGE_TAG, JOB_PAGE_TAG = "rcnn.prefect_page", "rcnn.ray_page"
PAGES = {FLOW_PAGE_TAG: "Prefect run", JOB_PAGE_TAG: "Ray job"}
"""Tags that hold addresses of pages, and what the pages show."""


def tracking_uri(config: PipelineConfig) -> str:
    """Where MLflow keeps runs: the setting, or a SQLite file in the storage.

    Raises:
        ConfigError: there is no setting, and the storage is not a local folder, or Ray is on other machines: several of
            them would write one SQLite file, which shared folders do not protect.
    """
    if not config.tracking.uri and is_elsewhere(config.ray.address):
        raise needs_server(f"ray.address = {config.ray.address}")
    return config.tracking.uri or f"sqlite:///{Storage(config.storage).local_path(STORE)}"


def runs_page(address: str, experiment_id: str) -> str:
    """The page of MLflow's UI with an experiment's training runs; the bare page is for agents, and empty."""
    page = f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs"
    return f"{page}?{TRAINING}&viewStateShareKey={VIEW}"


def file_page(address: str, experiment_id: str, run_id: str, file: str) -> str:
    """The page of MLflow's UI that shows a file of a run."""
    return f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}/artifacts/{file}?{TRAINING}"


def version_page(address: str, model: str, version: int) -> str:
    """The page of MLflow's UI that shows a registered version."""
    return f"{address.rstrip('/')}/#/models/{quote(model, safe='')}/versions/{version}"


def with_pages(text: str, tags: Mapping[str, str]) -> str:
    """A run's description in Markdown, with links to what else shows the same work, which are among its tags."""
    links = "\n".join(f"- {label}: [{tags[tag]}]({tags[tag]})" for tag, label in PAGES.items() if tag in tags)
    return f"{text}\n\n{links}" if links else text


def is_elsewhere(address: str) -> bool:
    """Whether an address of Ray jobs is on another machine."""
    host = urlsplit(address).hostname or ""
    return address.startswith("http") and host != "localhost" and not host.startswith("127.") and host != "::1"


def needs_server(what: str) -> ConfigError:
    """The error where several machines would write our own SQLite file."""
    return ConfigError(
        "is empty, so MLflow's store would be a SQLite file in the storage, written by several machines",
        where=f"tracking.uri, with {what}",
        remedy="Set tracking.uri to an MLflow server, e.g. http://mlflow:5000",
    )


def has_store(config: PipelineConfig) -> bool:
    """False if the store is our own SQLite file and does not exist."""
    return bool(config.tracking.uri) or Storage(config.storage).exists(STORE)


def experiment_name(config: PipelineConfig) -> str:
    """The MLflow experiment."""
    return config.tracking.experiment or f"rcnn/{config.data.dataset}"


def model_name(config: PipelineConfig) -> str:
    """The registered model."""
    return config.tracking.model_name or f"rcnn-{config.data.dataset}"


def points_of(history: Sequence[Mapping[str, float]]) -> list[tuple[str, float, int]]:
    """Name, value and absolute step of each metric of each epoch; the step of an epoch that was cut short is the next one."""
    return [
        (name, value, math.ceil(metrics["epoch"]))
        for metrics in history
        for name, value in metrics.items()
        if name != "epoch"
    ]


class Tracker(Protocol):
    """A run that takes parameters, metrics, tags and files, and may have children.

    Where the run has a value of a metric at a step, it keeps that value: what is logged again changes nothing.
    """

    @property
    def run_id(self) -> str:
        """The run's id in MLflow; empty as long as MLflow has not made the run."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Stores settings by name."""

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Stores numbers at an absolute step (an epoch)."""

    def log_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Stores the metrics of all epochs, in case some were lost with a driver that was killed."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Labels the run."""

    def log_data(self, summary: Mapping[str, Any], uri: str, *, context: str) -> None:
        """Notes the data set (see `Manifest.summary`) that the run reads or makes; `context` says for what."""

    def log_files(self, folder: Path) -> None:
        """Stores each file of a local folder."""

    def describe(self, text: str, *, name: str = "") -> None:
        """Describes the run, in Markdown, and gives it another name if there is one."""

    def child(self, name: str, config: PipelineConfig | None = None) -> "Tracker":
        """A run under this one: a training with this config, on the data that this run has noted."""

    def close_children(self, ended: Mapping[str, Mapping[str, str]]) -> None:
        """Ends the runs under this one that have not ended: as finished, with tags, those in `ended`; as failed the others."""

    def finish(self, *, failed: bool = False, killed: bool = False) -> None:
        """Ends the run: as finished, as failed, or as stopped from outside."""


def finish_failed(tracker: Tracker) -> None:
    """Ends a run whose work failed, in the handler of its error; what is not an `Exception` is a signal, which stopped it.

    If the storage cannot be written, the failure itself is still the error to raise.
    """
    why = sys.exception()
    killed = not isinstance(why, Exception | None)
    try:
        if why is not None:
            tracker.describe(f"{'Stopped' if killed else 'Failed'}: {why or type(why).__name__}")
        tracker.finish(failed=not killed, killed=killed)
    except ClusterError as error:
        say(f"  the failure could not be noted: {error}")


class NoTracker:
    """Listens to nothing: for `fit()` by itself, and for benchmarks."""

    @property
    def run_id(self) -> str:
        """None."""
        return ""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Drops them."""

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Drops them."""

    def log_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Drops it."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Drops them."""

    def log_data(self, summary: Mapping[str, Any], uri: str, *, context: str) -> None:
        """Drops it."""

    def log_files(self, folder: Path) -> None:
        """Drops them."""

    def describe(self, text: str, *, name: str = "") -> None:
        """Drops it."""

    def child(self, name: str, config: PipelineConfig | None = None) -> "NoTracker":
        """Itself."""
        return self

    def close_children(self, ended: Mapping[str, Mapping[str, str]]) -> None:
        """Does nothing."""

    def finish(self, *, failed: bool = False, killed: bool = False) -> None:
        """Does nothing."""
