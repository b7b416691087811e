"""All that touches MLflow: runs, models, and the registry with its aliases.

Only the driver calls this module. Without a server, the store is `mlflow.db` (SQLite) in the storage, with artifacts beside it.
"""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import sqlite3
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

# MLflow reads these when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# Its 7 retries of 120 s each take four minutes where a server refuses connections, and a quarter of an hour where it hangs. The
# outbox sends a note again, Prefect runs `register` again, and a person sees at once what is wrong.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos import databricks_pb2
from sqlalchemy.exc import SQLAlchemyError

from rcnn.conditional import can_swap
from rcnn.config import PipelineConfig
from rcnn.data.manifest import Manifest
from rcnn.errors import ClusterError, ConfigError, DataError
from rcnn.lease import all_holders
from rcnn.registry.gate import CHAMPION, Standing
from rcnn.storage import Storage
from rcnn.tracking import STORE, VIEW, experiment_name, has_store, model_name, tracking_uri, with_pages

PARENT_TAG = "mlflow.parentRunId"
KEY_TAG, STORAGE_TAG = "rcnn.stage_key", "rcnn.storage"
NOTES_TAG = "rcnn.outbox_runs"
DATA_SET_TAG = "rcnn.data_set"  # of a registered model: marks those of this project
PROMOTION_TAG, UNDER_WAY = "rcnn.newest_when_promoted", "under way"  # of a version
BY_HAND_TAG = "rcnn.by_hand"  # of a version: what a person decided last
CHAMPIONS_TAG = "rcnn.champions"  # of a registered model: the numbers of its champions so far, the newest last
MOST_CHAMPIONS = 500  # some 2,500 of the 5,000 characters that a tag holds
LEDGER_TAG = "rcnn.looks_at"  # of a registered model that counts the looks at a set of test rows
LEDGER_TEXT = (
    "Not a model: counts how often models were compared on one set of test rows. Each version is one comparison. Deleting it "
    "would void what `rcnn registry` says of the error budget."
)
ANSWERS_FOLDER = "test-predictions"  # in the training run, a file for each set of test rows
EXPORTS_FOLDER = "exports"  # in the training run
MODEL_FOLDER = "model"  # MLflow keeps the last part of the path of what it stores
MAX_DIGEST = 36  # MLflow's limit; the whole digest is in the profile and the tag
MAX_PARAMS, MAX_METRICS = 100, 1000  # MLflow's limits for one call
MAX_REASON = 1000  # characters
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
VIEW_OF_RUNS = {
    # By another column, MLflow would list stages and trials beside pipelines, not under them.
    "orderByKey": "attributes.start_time",
    "orderByAsc": False,
    "selectedColumns": [
        *(f"attributes.`{name}`" for name in ("Dataset", "Models")),
        *(f"metrics.`{name}`" for name in ("test/error", "test/error_low", "test/error_high", "best/val/error")),
        *(f"metrics.`{name}`" for name in ("model/parameters", "cost/seconds", "cost/cpu_hours")),
        *(f"params.`{name}`" for name in ("model.network", "model.k", "model.t", "recipe")),
        "tags.`rcnn.registered`",
    ],
}
"""As MLflow's UI itself keeps a view that is shared: not documented, and tried with the pinned version."""
ABOUT_RUNS = (
    "A row is a pipeline, named after its network and test error (`RCNN-32 T=1 2.40 %`): open it to see how certain that is, "
    "and how to load the model; expand it for its stages and trials. `test/error_low` and `test/error_high` are the ends of "
    "the 95 % interval: models whose intervals overlap may be equally good, and only those on the same data set (with its "
    "digest) compare at all. The model to use has the alias `champion` in the registry."
)
MAX_IDS = 100  # of resumptions: a tag has a limit too
REFUSALS = ("INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")


class RunWriter:
    """Writes the notes of an outbox (see `outbox.py`) to MLflow. A note that is written twice has the effect of one.

    What the outbox calls a run has an id of ours, since MLflow gives its own only when it makes a run. The tag `NOTES_TAG`
    holds that id; of a run that was resumed, all of them. MLflow itself drops a metric only if its time is equal too, and a
    resumed training repeats epochs at other times: a point is not written where the run has one of its name and step.
    """

    def __init__(self, config: PipelineConfig):
        self._config = config
        with _reachable(config):
            self._client = _connect(config)
        self._run_ids: dict[str, str] = {}
        self._shown: set[str] = set()
        """Experiments that have a view."""
        self._points: dict[str, set[tuple[str, int]]] = {}
        """By MLflow's id, the name and step of each metric that the run has."""
        self._writers: dict[str, Callable[[str, Mapping[str, Any]], None]] = {
            "params": self._write_params,
            "metrics": self._write_metrics,
            "tags": self._write_tags,
            "data": self._write_data,
            "model": self._write_model,
            "children": self._write_children,
            "end": self._write_end,
        }

    def write(self, note: Mapping[str, Any], files: Path | None = None) -> str:
        """Does what a note says; returns MLflow's id of its run.

        Args:
            note: as `outbox.py` describes it.
            files: the local folder of its files, if it has some.

        Raises:
            DataError: MLflow does not accept the note, and never will.
            ClusterError: MLflow is out of reach, or the store is damaged.
        """
        with _reachable(self._config):
            if note["kind"] == "open":
                with self._accepted(note):
                    return self._open(note)
            run_id = self._find(note["run"], note["experiment"])
            with self._accepted(note):
                if not run_id:
                    raise MlflowException("its run is not there", error_code=databricks_pb2.RESOURCE_DOES_NOT_EXIST)
                if note["kind"] == "files":
                    self._client.log_artifacts(run_id, str(files))
                else:
                    self._writers[note["kind"]](run_id, note)
        return run_id

    @contextlib.contextmanager
    def _accepted(self, note: Mapping[str, Any]) -> Iterator[None]:
        """Tells a note that MLflow refuses from one that it could not take: a proxy's 404, say, is not MLflow's."""
        try:
            yield
        except MlflowException as error:
            is_mlflows = isinstance(error, RestException) or not tracking_uri(self._config).startswith("http")
            if error.error_code not in REFUSALS or not is_mlflows:
                raise
            raise DataError(
                f"MLflow refuses it ({_first_line(error)})", where=f"a note of {note['kind']} for run {note['run']}"
            ) from error

    def _open(self, note: Mapping[str, Any]) -> str:
        """Makes the run that a note opens, or resumes an earlier one."""
        experiment_id = _experiment(self._client, self._config, note["experiment"])
        self._give_view(experiment_id)
        run_id = self._find(note["run"], note["experiment"]) or self._resume(note, experiment_id)
        if not run_id:
            tags = {**note["tags"], NOTES_TAG: note["run"], **self._parent_tag(note)}
            made = self._client.create_run(experiment_id, start_time=note["time"], run_name=note["name"], tags=tags)
            run_id = self._run_ids[note["run"]] = made.info.run_id
            self._points[run_id] = set()
        # A resumed run keeps its parameters: of how and where it runs, they may be others now.
        known = self._client.get_run(run_id).data.params
        self._write_params(
            run_id, {"params": {name: value for name, value in note["params"].items() if name not in known}}
        )
        return run_id

    def _give_view(self, experiment_id: str) -> None:
        """Describes an experiment, and makes the view that our links open: MLflow's own table shows no figures and settings."""
        if experiment_id in self._shown:
            return
        there = self._client.get_experiment(experiment_id).tags
        for name, value in ((VIEW_TAG, json.dumps(VIEW_OF_RUNS)), ("mlflow.note.content", ABOUT_RUNS)):
            if name not in there:  # people may change both
                self._client.set_experiment_tag(experiment_id, name, value)
        self._shown.add(experiment_id)

    def _resume(self, note: Mapping[str, Any], experiment_id: str) -> str:
        """The run that an earlier attempt left unfinished, or a child of this name; empty if there is none."""
        if note["fresh"]:
            return ""
        if note["key"]:
            # A finished run is history: work that is done once more, since its files are gone, is another run.
            where = f"tags.`{KEY_TAG}` = '{note['key']}' and attributes.status != 'FINISHED'"
        else:
            parent = self._find(note["parent"], note["experiment"])
            where = f"tags.`{PARENT_TAG}` = '{parent}' and attributes.run_name = '{note['name']}'"
        found = self._client.search_runs([experiment_id], where, max_results=1)
        if not found:
            return ""
        run_id = str(found[0].info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        ids = [*found[0].data.tags.get(NOTES_TAG, "").split(), note["run"]]
        self._write_tags(
            run_id, {"tags": {**note["tags"], **self._parent_tag(note), NOTES_TAG: " ".join(ids[-MAX_IDS:])}}
        )
        self._run_ids[note["run"]] = run_id
        return run_id

    def _parent_tag(self, note: Mapping[str, Any]) -> dict[str, str]:
        parent = self._find(note["parent"], note["experiment"]) if note["parent"] else ""
        return {PARENT_TAG: parent} if parent else {}

    def _find(self, run: str, experiment: str) -> str:
        """MLflow's id of an outbox's run; empty where MLflow has none."""
        if run not in self._run_ids:
            experiment_id = _experiment(self._client, self._config, experiment)
            found = self._client.search_runs([experiment_id], f"tags.`{NOTES_TAG}` LIKE '%{run}%'", max_results=1)
            if not found:
                return ""
            self._run_ids[run] = found[0].info.run_id
        return self._run_ids[run]

    def _write_params(self, run_id: str, note: Mapping[str, Any]) -> None:
        entries = [Param(name, value) for name, value in note["params"].items()]
        for start in range(0, len(entries), MAX_PARAMS):
            self._client.log_batch(run_id, params=entries[start : start + MAX_PARAMS])

    def _write_metrics(self, run_id: str, note: Mapping[str, Any]) -> None:
        if run_id not in self._points:
            names = self._client.get_run(run_id).data.metrics
            histories = [self._client.get_metric_history(run_id, name) for name in names]
            self._points[run_id] = {(metric.key, metric.step) for history in histories for metric in history}
        known = self._points[run_id]
        missing = {(name, step): value for name, value, step in note["points"] if (name, step) not in known}
        entries = [Metric(name, value, note["time"], step) for (name, step), value in missing.items()]
        for start in range(0, len(entries), MAX_METRICS):
            self._client.log_batch(run_id, metrics=entries[start : start + MAX_METRICS])
        known |= set(missing)

    def _write_tags(self, run_id: str, note: Mapping[str, Any]) -> None:
        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in note["tags"].items()])

    def _write_data(self, run_id: str, note: Mapping[str, Any]) -> None:
        """Notes a data set as an input of the run."""
        summary, uri = note["summary"], note["uri"]
        noted = Dataset(
            name=summary["name"],
            digest=summary["digest"][:MAX_DIGEST],
            source_type="s3" if uri.startswith("s3://") else "local",
            source=json.dumps({"uri": uri, **summary["source"]}),
            schema=json.dumps({"image": ["uint8", *summary["image_shape"]], "classes": summary["classes"]}),
            profile=json.dumps({key: summary[key] for key in ("rows", "skipped", "split_digests", "digest")}),
        )
        context = InputTag("mlflow.data.context", note["context"])
        self._client.log_inputs(run_id, datasets=[DatasetInput(noted, tags=[context])])

    def _write_model(self, run_id: str, note: Mapping[str, Any]) -> None:
        """Names a logged model as the outcome of the run; MLflow itself would list it twice."""
        outputs = self._client.get_run(run_id).outputs
        known = {model.model_id for model in outputs.model_outputs} if outputs else set()
        if note["model_id"] not in known:
            self._client.log_outputs(run_id, [LoggedModelOutput(note["model_id"], 0)])

    def _write_children(self, run_id: str, note: Mapping[str, Any]) -> None:
        """Ends the runs under this one that a killed attempt left."""
        where = f"tags.`{PARENT_TAG}` = '{run_id}' and attributes.status = 'RUNNING'"
        experiment_id = self._client.get_run(run_id).info.experiment_id
        while found := self._client.search_runs([experiment_id], where):
            for child in found:
                tags = note["ended"].get(child.info.run_name)
                self._write_tags(child.info.run_id, {"tags": tags or {}})
                status = "FAILED" if tags is None else "FINISHED"
                self._write_end(child.info.run_id, {"status": status, "time": note["time"]})

    def _write_end(self, run_id: str, note: Mapping[str, Any]) -> None:
        self._client.set_terminated(run_id, note["status"], end_time=note["time"])


class SystemMonitor:
    """MLflow's monitors of this machine: processor, memory, disk, network, and GPUs where `nvidia-ml-py` is installed."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # there is no GPU, or nothing to ask it with
            self._monitors.append(GPUMonitor())
        self.sample()  # psutil measures the processor from one call to the next
        self.take()

    def sample(self) -> None:
        """Measures."""
        for monitor in self._monitors:
            monitor.collect_metrics()

    def take(self, prefix: str = "") -> dict[str, float]:
        """The means of the samples since the last call, by name."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            values |= {f"{prefix}{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values


def require_answer(config: PipelineConfig) -> None:
    """Checks that MLflow can take notes.

    Raises:
        ClusterError: the MLflow server is out of reach, or the store is damaged.
    """
    with _reachable(config):
        _experiment(_connect(config), config, experiment_name(config))


@dataclass(frozen=True)
class StageRun:
    """A run of a stage: its id, its name, the stage's folder, and when it ended, in seconds since 1970."""

    run_id: str
    name: str
    key: str
    ended: float = 0.0


def runs_of(config: PipelineConfig, storage: Storage) -> list[StageRun]:
    """The runs of stages in this storage that have ended, without those that a registered version came from."""
    with _reachable(config):
        client = _connect(config)
        experiments = [each.experiment_id for each in client.search_experiments()]
        where = f"tags.`{STORAGE_TAG}` = '{storage.root}' and attributes.status != 'RUNNING'"
        found = client.search_runs(experiments, where) if experiments else []
        kept = {
            version.run_id
            for name in list_models(config)
            for version in client.search_model_versions(f"name = '{name}'")
        }
    return [
        StageRun(
            run.info.run_id,
            run.info.run_name,
            run.data.tags[KEY_TAG],
            (run.info.end_time or run.info.start_time) / 1000,
        )
        for run in found
        if run.info.run_id not in kept and "/" in run.data.tags[KEY_TAG]
    ]


def delete_run(config: PipelineConfig, run_id: str) -> None:
    """Deletes a run, which MLflow's own tools can restore until `mlflow gc`."""
    with _reachable(config):
        _connect(config).delete_run(run_id)


def runs_without_a_process(config: PipelineConfig) -> list[StageRun]:
    """The runs of stages and pipelines in this storage that are marked as running while no process holds their lease."""
    storage = Storage(config.storage)
    if not can_swap(storage):  # nor are there leases
        return []
    with _reachable(config):
        client = _connect(config)
        experiments = [each.experiment_id for each in client.search_experiments()]
        where = f"tags.`{STORAGE_TAG}` = '{storage.root}' and attributes.status = 'RUNNING'"
        running = client.search_runs(experiments, where) if experiments else []
    # After the runs: a process takes the lease before it opens its run.
    at_work = {holder.work for holder in all_holders(storage) if holder.seems_alive}
    return [
        StageRun(run.info.run_id, run.info.run_name, key)
        for run in running
        if (key := run.data.tags.get(KEY_TAG)) and key not in at_work
    ]


def end_run(config: PipelineConfig, run_id: str) -> None:
    """Marks a run without a process as killed, and the runs under it, unless these have leases of their own."""
    with _reachable(config):
        client = _connect(config)
        run = client.get_run(run_id)
        if run.info.status != "RUNNING":  # it has ended since it was found
            return
        where = f"tags.`{PARENT_TAG}` = '{run_id}' and attributes.status = 'RUNNING'"
        for child in client.search_runs([run.info.experiment_id], where):
            if KEY_TAG not in child.data.tags:
                client.set_terminated(child.info.run_id, "KILLED")
        client.set_terminated(run_id, "KILLED")


def find_run(config: PipelineConfig, run_id: str, *, key: str) -> str:
    """A run's id in MLflow: `run_id`, or that of the newest run with this key; empty if the store has neither.

    A result names no run if MLflow was away when its stage ended, and results outlive a store that was deleted or exchanged.
    """
    with _reachable(config):
        client = _connect(config)
        if run_id and _or_none(lambda: client.get_run(run_id)) is not None:
            return run_id
        experiment_id = _experiment(client, config, experiment_name(config))
        where, newest = f"tags.`{KEY_TAG}` = '{key}'", ["attributes.start_time DESC"]
        found = client.search_runs([experiment_id], where, max_results=1, order_by=newest)
        return str(found[0].info.run_id) if found else ""


def register_model(
    config: PipelineConfig,
    model_folder: Path,
    description: Mapping[str, Any],
    *,
    run_id: str,
    weights_sha256: str,
    figures: Standing,
    answers: Path,
    environment: Mapping[str, str],
) -> Standing:
    """Logs a finished model to its training run and registers it, with the figures and predictions that it is judged by.

    Args:
        config: names the registered model.
        model_folder: holds `model.safetensors` and `model.json`, and is itself named `MODEL_FOLDER`.
        description: the content of `model.json`.
        run_id: the training run.
        weights_sha256: identity of the weights; a version that has them is not registered twice.
        figures: test error and test digest; the version in it does not count.
        answers: the file of its predictions (see `predictions.write_answers`), which goes to the run too.
        environment: more tags: what the bits of the weights depend on besides.

    Returns:
        The figures with the new version.
    """
    with _reachable(config):
        client = _connect(config)
        mlflow.set_tracking_uri(tracking_uri(config))
        name = model_name(config)
        found = client.search_model_versions(f"name = '{name}' and tags.weights_sha256 = '{weights_sha256}'")
        if found:  # an earlier attempt came as far as this, or the model was evaluated on other rows now
            _log_answers(client, found[0].run_id or run_id, answers, figures.test_digest)
            return Standing(int(found[0].version), figures.test_error, figures.test_digest)
        _log_answers(client, run_id, answers, figures.test_digest)
        info = _log_pyfunc(model_folder, description, run_id)
        with _made_by_somebody():
            client.create_registered_model(name)
        client.set_registered_model_tag(name, DATA_SET_TAG, config.data.dataset)
        version = client.create_model_version(
            name,
            info.model_uri,
            run_id=run_id,
            model_id=info.model_id,  # a server refuses the source without it
            tags={
                "test_error": repr(figures.test_error),
                "test_digest": figures.test_digest,
                "weights_sha256": weights_sha256,
                "data_digest": str(description["data_digest"]),
                "config_hash": config.hash(),
                "network": config.model.title,
                **environment,
                **{name: str(getattr(config.model, name)) for name in config.model.reads if name in ("k", "t")},
            },
        )
        return Standing(int(version.version), figures.test_error, figures.test_digest)


@dataclass(frozen=True)
class Place:
    """Where MLflow has a registered version: its number, and the ids of its training run, experiment and model."""

    version: int
    run_id: str
    experiment_id: str
    model_id: str


def place_of(config: PipelineConfig, version: int) -> Place:
    """Where MLflow has a version of the config's model."""
    with _reachable(config):
        client = _connect(config)
        found = client.get_model_version(model_name(config), str(version))
        experiment = client.get_run(found.run_id).info.experiment_id
    # The version itself leaves the id of its model out.
    return Place(version, str(found.run_id), str(experiment), str(found.source).removeprefix("models:/"))


def publish_card(
    config: PipelineConfig, place: Place, card: str, *, figures: Mapping[str, float], data: Manifest
) -> None:
    """Shows a model's card and its figures on the test rows, at the version, its model and its training run.

    Args:
        config: names the registered model.
        place: of the version.
        card: in Markdown.
        figures: metrics.
        data: the data set that they belong to.
    """
    name = model_name(config)
    with _reachable(config):
        client = _connect(config)
        client.update_model_version(name, str(place.version), card)
        client.update_registered_model(name, description=_about_versions(data))
        run, now = client.get_run(place.run_id).data, time.time_ns() // 1_000_000
        client.set_tag(place.run_id, "mlflow.note.content", with_pages(card, run.tags))
        of_data = {"dataset_name": data.name, "dataset_digest": data.digest[:MAX_DIGEST]}
        entries = [
            Metric(key, value, now, 0, model_id=place.model_id, run_id=place.run_id, **of_data)
            for key, value in figures.items()
            if run.metrics.get(key) != value  # registered again
        ]
        if entries:
            client.log_batch(place.run_id, metrics=entries)


def _about_versions(data: Manifest) -> str:
    return (
        f"Recurrent convolutional networks for {data.name}, {len(data.classes):,} classes. The version to use has the alias "
        "`champion`, which changes only by a paired test on the same test rows (`rcnn registry explain VERSION`), or by hand "
        "with a reason. Each version has a card."
    )


def _log_answers(client: MlflowClient, run_id: str, answers: Path, test_digest: str) -> None:
    with TemporaryDirectory() as folder:
        named = Path(folder, _answers_file(test_digest))
        shutil.copy(answers, named)
        client.log_artifact(run_id, str(named), ANSWERS_FOLDER)


def _answers_file(test_digest: str) -> str:
    return f"{test_digest[:16]}.parquet"


def fetch_answers(config: PipelineConfig, version: int, test_digest: str, folder: Path) -> Path | None:
    """Fetches the predictions of a version on some test rows into a local folder; None where the registry has none."""
    name, file = model_name(config), _answers_file(test_digest)
    with _reachable(config):
        client = _connect(config)
        run_id = client.get_model_version(name, str(version)).run_id
        if not run_id or _or_none(lambda: client.get_run(run_id)) is None:
            return None
        there = [Path(each.path).name for each in client.list_artifacts(run_id, ANSWERS_FOLDER)]
        if file not in there:
            return None
        return Path(client.download_artifacts(run_id, f"{ANSWERS_FOLDER}/{file}", str(folder)))


def log_file(config: PipelineConfig, run_id: str, file: Path, *, folder: str = "") -> None:
    """Stores a file in a folder of a run (default: the outermost)."""
    with _reachable(config):
        _connect(config).log_artifact(run_id, str(file), folder or None)


def tags_of_versions(config: PipelineConfig, name: str = "") -> dict[int, dict[str, str]]:
    """The tags of all versions of a model (default: the config's), by number."""
    with _reachable(config):
        found = _all_versions(_connect(config), name or model_name(config))
    return {int(version.version): dict(version.tags) for version in found}


def tag_version(config: PipelineConfig, version: int, tags: Mapping[str, str], *, name: str = "") -> None:
    """Sets tags of a version of a model (default: the config's)."""
    with _reachable(config):
        client = _connect(config)
        for key, value in tags.items():
            client.set_model_version_tag(name or model_name(config), str(version), key, value)


def next_look(config: PipelineConfig, test_digest: str, version: int) -> int:
    """The number of the next look at these test rows, from 1; no other caller gets it.

    The looks at a set of test rows are the versions of a registered model of their own, whichever models are compared. MLflow
    has no other counter for processes that run at once: it gives each version number to one caller, and never again.

    Args:
        config: names the registered model that is compared.
        test_digest: names the test rows.
        version: of the model that is compared with the champion.
    """
    ledger, name = _ledger_name(test_digest), model_name(config)
    with _reachable(config):
        client = _connect(config)
        with _made_by_somebody():
            client.create_registered_model(ledger, description=LEDGER_TEXT)
        client.set_registered_model_tag(ledger, LEDGER_TAG, test_digest)
        compared = client.get_model_version(name, str(version))
        look = client.create_model_version(
            ledger,
            compared.source,
            run_id=compared.run_id,
            model_id=compared.source.removeprefix("models:/"),  # which the version itself leaves out
            description=f"{name} version {version} was compared with the champion",
        )
    return int(look.version)


def num_looks(config: PipelineConfig, test_digest: str) -> int:
    """How many looks there were at these test rows, as far as none was deleted at the end."""
    return max(version_numbers(config, _ledger_name(test_digest)), default=0)


def _ledger_name(test_digest: str) -> str:
    return f"rcnn-looks-{test_digest[:16]}"


def as_share(tag: str) -> float:
    """The number in a tag, or NaN: a version that was registered by hand may have none, or text."""
    try:
        return float(tag)
    except ValueError:
        return math.nan


def champion_of(config: PipelineConfig) -> Standing | None:
    """The figures of the version with the alias `champion`, if there is one.

    Raises:
        ClusterError: MLflow is out of reach; that is not the same as no champion.
    """
    with _reachable(config):
        client = _connect(config)
        version = _or_none(lambda: client.get_model_version_by_alias(model_name(config), CHAMPION))
    return None if version is None else _standing(version)


def _standing(version: Any) -> Standing:
    """The figures of a version. One that was registered by hand has no such tags: nothing can be compared with it."""
    error = as_share(version.tags.get("test_error", ""))
    return Standing(int(version.version), error, version.tags.get("test_digest", "unknown"))


@contextlib.contextmanager
def promotion(config: PipelineConfig, version: int) -> Iterator[None]:
    """Marks a version while the body makes it champion, and afterwards with the version that was the newest then."""
    tag_version(config, version, {PROMOTION_TAG: UNDER_WAY})
    try:
        yield
    finally:
        tag_version(config, version, {PROMOTION_TAG: str(max(version_numbers(config, model_name(config))))})


def champions_so_far(config: PipelineConfig) -> list[int]:
    """The champions of the model, the newest last, without those that were rolled back."""
    with _reachable(config):
        tags = _connect(config).get_registered_model(model_name(config)).tags
    return [int(number) for number in tags.get(CHAMPIONS_TAG, "").split()]


def note_champions(config: PipelineConfig, versions: Sequence[int]) -> None:
    """Makes these the champions of the model so far."""
    with _reachable(config):
        written = " ".join(map(str, versions[-MOST_CHAMPIONS:]))
        _connect(config).set_registered_model_tag(model_name(config), CHAMPIONS_TAG, written)


def promoted_since(config: PipelineConfig, version: int) -> list[Standing]:
    """The other versions that are becoming champion, or became it when this one was registered already."""
    name = model_name(config)
    with _reachable(config):
        found = _all_versions(_connect(config), name)
    marked = [(each, each.tags.get(PROMOTION_TAG, "0")) for each in found if int(each.version) != version]
    return [_standing(each) for each, mark in marked if mark == UNDER_WAY or int(mark) >= version]


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model; as text `name version 3 (champion)`."""

    name: str
    version: int
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        aliases = f" ({', '.join(self.aliases)})" if self.aliases else ""
        return f"{self.name} version {self.version}{aliases}"


def find_version(config: PipelineConfig, wanted: str = "") -> ModelVersion:
    """The version that `name`, `name@alias` or `name/3` names; of a bare name, the champion.

    Without `wanted`, the model that the config names (`tracking.model_name`), or else the only one there is.

    Raises:
        ConfigError: there is none, or more than one.
    """
    if not has_store(config):
        raise _no_model(config)
    wanted = wanted or config.tracking.model_name or _only_model(config)
    name, alias_mark, alias = wanted.partition("@")
    name, version_mark, version = name.partition("/") if not alias_mark else (name, "", "")
    with _reachable(config):
        client = _connect(config)
        if version_mark:
            found = _or_none(lambda: client.get_model_version(name, version))
        else:
            found = _or_none(lambda: client.get_model_version_by_alias(name, alias or CHAMPION))
    if found is None:
        raise _no_version(config, name, f"version {version!r}" if version_mark else f"alias {alias or CHAMPION!r}")
    return ModelVersion(name, int(found.version), tuple(found.aliases))


def _no_version(config: PipelineConfig, name: str, what: str) -> ConfigError:
    where, models = f"tracking.uri = {tracking_uri(config)}", list_models(config)
    if name in models:
        remedy = f"`rcnn registry --model {name}` lists its versions"
        return ConfigError(f"the model {name!r} has no {what}", where=where, remedy=remedy)
    return ConfigError(
        f"there is no registered model {name!r}, and no such folder",
        where=where,
        remedy=f"Registered models: {', '.join(models)}" if models else "Run `rcnn pipeline` first",
    )


def _only_model(config: PipelineConfig) -> str:
    names = list_models(config)
    if not names:
        raise _no_model(config)
    if len(names) > 1:
        raise ConfigError(
            f"there are {len(names)} registered models: {', '.join(names)}",
            where="--model",
            remedy=f"Choose one, e.g. --model {names[0]}",
        )
    return names[0]


def _no_model(config: PipelineConfig) -> ConfigError:
    return ConfigError(
        "there is no registered model",
        where=f"tracking.uri = {tracking_uri(config)}",
        remedy="Run `rcnn pipeline` first, or name a model folder with --model",
    )


def list_models(config: PipelineConfig) -> list[str]:
    """The names of the registered models: all of our own store's, and of a server's those that this project made."""
    with _reachable(config):
        found = _all_pages(_connect(config).search_registered_models)
    ours = [model for model in found if not config.tracking.uri or _is_ours(model)]
    return sorted(model.name for model in ours if LEDGER_TAG not in model.tags)


def _is_ours(model: Any) -> bool:
    return DATA_SET_TAG in model.tags or str(model.name).startswith("rcnn-")


def local_folder(config: PipelineConfig, version: ModelVersion) -> Path | None:
    """The model folder of a version, where its files are on this machine."""
    with _reachable(config):
        place = _connect(config).get_model_version_download_uri(version.name, str(version.version))
    scheme = urlsplit(place).scheme
    path = Path(url2pathname(urlsplit(place).path)) if scheme == "file" else Path(place)
    folder = path / "artifacts" / MODEL_FOLDER
    return folder if scheme in ("", "file") and path.is_absolute() and folder.is_dir() else None


def download_model(config: PipelineConfig, version: ModelVersion, folder: Path) -> Path:
    """Fetches the model folder of a version to this machine.

    Raises:
        DataError: the registry knows the version, and its files are gone or were not logged by this project.
    """
    mlflow.set_tracking_uri(tracking_uri(config))
    uri = f"models:/{version.name}/{version.version}"
    with _reachable(config):
        place = _connect(config).get_model_version_download_uri(version.name, str(version.version))
        try:
            fetched = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)), "artifacts", MODEL_FOLDER)
        except OSError:
            fetched = folder / MODEL_FOLDER
    if not fetched.is_dir():
        raise DataError(
            f"its files are not in {place}", where=str(version), remedy="Restore them, or train and register again"
        )
    return fetched


def set_alias(config: PipelineConfig, alias: str, version: int, *, name: str = "") -> None:
    """Points an alias of a model (default: the config's) at a version."""
    with _reachable(config):
        _connect(config).set_registered_model_alias(name or model_name(config), alias, str(version))


def version_numbers(config: PipelineConfig, name: str) -> list[int]:
    """The numbers of a model's versions; of a model that is not registered, none."""
    with _reachable(config):
        return [int(version.version) for version in _all_versions(_connect(config), name)]


def _all_versions(client: MlflowClient, name: str) -> list[Any]:
    return _all_pages(lambda page_token: client.search_model_versions(f"name = '{name}'", page_token=page_token))


def _all_pages(search: Callable[..., Any]) -> list[Any]:
    """What one of MLflow's searches finds, on all of its pages."""
    found, page = [], search(page_token=None)
    while True:
        found += page
        if not page.token:
            return found
        page = search(page_token=page.token)


def list_versions(config: PipelineConfig, name: str = "") -> list[dict[str, str]]:
    """Every version of a model (default: the config's), the newest first: version, aliases, run_id, and its tags."""
    with _reachable(config):
        client = _connect(config)
        found = _all_versions(client, name or model_name(config))
        # The search leaves the aliases out.
        versions = [client.get_model_version(version.name, version.version) for version in found]
    rows = [
        dict.fromkeys(("test_error", "k", "t", "config_hash", "test_digest"), "")
        | dict(whole.tags)
        | {"version": str(whole.version), "aliases": ", ".join(whole.aliases), "run_id": whole.run_id or ""}
        for whole in versions
    ]
    return sorted(rows, key=lambda row: -int(row["version"]))


def _experiment(client: MlflowClient, config: PipelineConfig, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":  # MLflow takes no run there, and no other experiment of this name
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    location = None if config.tracking.uri else str(_artifacts(config) / name)
    with _made_by_somebody():
        client.create_experiment(name, artifact_location=location)
    return str(client.get_experiment_by_name(name).experiment_id)


@contextlib.contextmanager
def _made_by_somebody() -> Iterator[None]:
    """What the body creates may be there already: two first runs at once both create it."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _artifacts(config: PipelineConfig) -> Path:
    """Where artifacts of our own store go."""
    return Storage(config.storage).local_path("mlflow-artifacts")


def _connect(config: PipelineConfig) -> MlflowClient:
    """A client; our own SQLite store is created first where it is missing."""
    create_store(config)
    return MlflowClient(tracking_uri(config))


def create_store(config: PipelineConfig) -> None:
    """Creates our own SQLite store, whole or not at all, unless it is there or a server is set.

    MLflow's migrations take seconds and are not atomic: killed halfway, they leave a store that fails forever, and two
    creators at once crash one of them. So a draft is migrated under a lock, and renamed.

    Raises:
        ClusterError: the store cannot be written, or is not a database.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # our own error has what it logs at length
    if config.tracking.uri:
        return
    storage = Storage(config.storage)
    store = storage.local_path(STORE)
    if store.exists():
        _require_database(config, store)
        return
    storage.make_folder(".locks")
    with _reachable(config), FileLock(storage.local_path(f".locks/{STORE}.lock")):
        for stale in store.parent.glob(f"{STORE}.*.part*"):  # of killed creators: the lock is ours
            stale.unlink()
        if not store.exists():
            draft = store.with_name(f"{STORE}.{uuid.uuid4().hex[:8]}.part")
            _migrate(draft, _artifacts(config))
            draft.rename(store)


def _migrate(draft: Path, artifacts: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    try:
        SqlAlchemyStore(f"sqlite:///{draft}", str(artifacts)).engine.dispose()
    except BaseException:
        for file in draft.parent.glob(f"{draft.name}*"):  # the journal too
            file.unlink()
        raise


def _require_database(config: PipelineConfig, store: Path) -> None:
    """MLflow would try to open a file that is not a database for an hour."""
    if not store.is_file():
        raise _store_error(config, IsADirectoryError("a folder is in its place"))
    try:
        with contextlib.closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as connection:
            [num_tables] = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # SQLite's own table
            if not num_tables:
                raise sqlite3.DatabaseError("it holds no tables")
    except sqlite3.Error as error:
        raise _store_error(config, error) from error


def _log_pyfunc(model_folder: Path, description: Mapping[str, Any], run_id: str) -> Any:
    """A pyfunc made of a script and safetensors, with this package's own code inside; see `served_model.py`."""
    package = Path(__file__).parents[1]
    # MLflow warns of type hints that are no list, and of a method without any; no list admits both arrays and files. A filter
    # does not help, since MLflow sets its own.
    with mlflow.start_run(run_id=run_id), warnings.catch_warnings(record=True):
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package / "registry" / "served_model.py"),
            artifacts={"model": str(model_folder)},
            signature=False,  # it would admit either pixels or image files
            metadata={"classes": list(description["classes"]), "image_shape": list(description["image_shape"])},
            code_paths=[str(package)],
            pip_requirements=_requirements(),  # left out, MLflow spends 15 s on guessing them
        )


def _requirements() -> list[str]:
    from importlib.metadata import version

    return [
        f"{name}=={version(name)}"
        for name in ("torch", "numpy", "pydantic", "pyarrow", "pillow", "safetensors", "tqdm")
    ]


def _or_none(call: Callable[[], Any]) -> Any:
    """What the call returns, or None where MLflow says that there is no such thing; other errors stay errors."""
    try:
        return call()
    except MlflowException as error:
        # An alias that is not set comes as an invalid value, everything else as a resource that is not there.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


@contextlib.contextmanager
def _reachable(config: PipelineConfig) -> Iterator[None]:
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise _store_error(config, error) from error


def _inner_fault(error: Exception) -> str:
    """What SQLite or the network said, which SQLAlchemy and MLflow put somewhere into a longer text."""
    found = re.search(
        r"\(sqlite3\.\w+\) ([^\n\[]+)|\[Errno -?\d+\] ([^'\")\n]+)|Error\(\d+, '([^']+)'|(Read timed out|timed out)",
        str(error),
    )
    return next(filter(None, found.groups())).strip() if found else ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _store_error(config: PipelineConfig, error: Exception) -> ClusterError:
    uri = tracking_uri(config)
    fault = _inner_fault(error) or _first_line(error)
    is_busy = "database is locked" in fault
    if uri.startswith("http"):
        remedy = "Check that the server runs and the address is right"
    elif "out-of-date database schema" in fault:
        fault = "the store was written by an older MLflow"
        remedy = f"Copy it, then run `mlflow db upgrade {uri}`"
    elif "disk is full" in fault or "disk I/O" in fault:
        remedy = "Free some space, and run the same command again"
    elif is_busy:
        remedy = "Another process writes to it: run the same command again"
    elif "readonly" in fault:
        remedy = "Check its permissions"
    elif not config.tracking.uri:
        remedy = (
            f"If it is damaged, restore a copy, or move {STORE} away: data sets and trained models stay, and runs and "
            "registered versions are lost"
        )
    else:
        remedy = "Check the address, and that the database is sound"
    return ClusterError(
        f"MLflow failed ({fault})",
        where=f"tracking.uri = {uri}",
        remedy=remedy,
        retryable=is_busy or uri.startswith("http"),
    )
