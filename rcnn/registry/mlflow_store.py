"""All that touches MLflow: runs, models, and the registry with its aliases.

Only the driver calls this module. Without a server, the store is `mlflow.db` (SQLite) in the storage, with artifacts beside it.
"""

import contextlib
import json
import logging
import math
import os
import re
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

# MLflow reads these when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import mlflow
import numpy as np
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, ConfigError, DataError
from rcnn.lease import all_holders
from rcnn.registry.gate import CHAMPION, Standing
from rcnn.storage import Storage
from rcnn.tracking import STORE, experiment_name, has_store, model_name, tracking_uri

PARENT_TAG = "mlflow.parentRunId"
KEY_TAG, STORAGE_TAG = "rcnn.stage_key", "rcnn.storage"
DATA_SET_TAG = "rcnn.data_set"  # of a registered model: marks those of this project
PROMOTION_TAG, UNDER_WAY = "rcnn.newest_when_promoted", "under way"  # of a version
MODEL_FOLDER = "model"  # MLflow keeps the last part of the path of what it stores
MAX_DIGEST = 36  # MLflow's limit; the whole digest is in the profile and the tag
MAX_PARAMS = 100  # MLflow's limit for one call


class MlflowTracker:
    """A `Tracker` that writes to one MLflow run; every call raises ClusterError where MLflow is out of reach."""

    def __init__(self, config: PipelineConfig, client: MlflowClient, experiment_id: str, run_id: str):
        self.config, self.client, self.experiment_id, self.run_id = config, client, experiment_id, run_id

    def log_params(self, params: Mapping[str, object]) -> None:
        """Stores settings by name."""
        entries = [Param(name, str(value)) for name, value in params.items()]
        with _reachable(self.config):
            for start in range(0, len(entries), MAX_PARAMS):
                self.client.log_batch(self.run_id, params=entries[start : start + MAX_PARAMS])

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Stores numbers at an absolute step."""
        now = int(time.time() * 1000)
        entries = [Metric(name, value, now, step) for name, value in metrics.items()]
        with _reachable(self.config):
            self.client.log_batch(self.run_id, metrics=entries)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Labels the run."""
        with _reachable(self.config):
            self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_data(self, summary: Mapping[str, Any], uri: str, *, context: str) -> None:
        """Notes a data set as an input of the run."""
        noted = Dataset(
            name=summary["name"],
            digest=summary["digest"][:MAX_DIGEST],
            source_type="s3" if uri.startswith("s3://") else "local",
            source=json.dumps({"uri": uri, **summary["source"]}),
            schema=json.dumps({"image": ["uint8", *summary["image_shape"]], "classes": summary["classes"]}),
            profile=json.dumps({key: summary[key] for key in ("rows", "skipped", "split_digests", "digest")}),
        )
        with _reachable(self.config):
            self.client.log_inputs(
                self.run_id, datasets=[DatasetInput(noted, tags=[InputTag("mlflow.data.context", context)])]
            )

    def log_files(self, folder: Path) -> None:
        """Stores each file of a local folder."""
        with _reachable(self.config):
            self.client.log_artifacts(self.run_id, str(folder))

    def child(self, name: str) -> "MlflowTracker":
        """The run of that name under this one, made if it is not there: a resumed search continues in the same runs."""
        where = f"tags.`{PARENT_TAG}` = '{self.run_id}' and attributes.run_name = '{name}'"
        with _reachable(self.config):
            found = self.client.search_runs([self.experiment_id], where, max_results=1)
            run = found[0] if found else self._create(name)
            if run.info.status != "RUNNING":
                self.client.update_run(run.info.run_id, status="RUNNING")
        return MlflowTracker(self.config, self.client, self.experiment_id, run.info.run_id)

    def unfinished_children(self) -> list[str]:
        """The names of the runs under this one that have not ended."""
        where = f"tags.`{PARENT_TAG}` = '{self.run_id}' and attributes.status = 'RUNNING'"
        with _reachable(self.config):
            return [run.info.run_name for run in self.client.search_runs([self.experiment_id], where)]

    def finish(self, *, failed: bool = False) -> None:
        """Ends the run."""
        with _reachable(self.config):
            self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")

    def _create(self, name: str) -> Any:
        return self.client.create_run(self.experiment_id, run_name=name, tags={PARENT_TAG: self.run_id})


def open_run(
    config: PipelineConfig,
    name: str,
    *,
    key: str,
    parent_run_id: str = "",
    tags: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> MlflowTracker:
    """The run of a stage, with the full config as its parameters.

    Resumes an unfinished run with this key unless `fresh`.

    Raises:
        ClusterError: the MLflow server is out of reach, or the store is damaged.
    """
    with _reachable(config):
        client = _connect(config)
        experiment_id = _experiment(client, config)
        labels = {
            KEY_TAG: key,
            STORAGE_TAG: config.storage,
            "rcnn.config_hash": config.hash(),
            "rcnn.recipe": config.recipe,
            **(tags or {}),
        }
        if parent_run_id:
            labels[PARENT_TAG] = parent_run_id
        if commit := git_commit():
            labels["mlflow.source.git.commit"] = commit
        # A finished run is history: work that is done once more, on purpose or since its files are gone, is another run.
        unfinished = f"tags.`{KEY_TAG}` = '{key}' and attributes.status != 'FINISHED'"
        found = [] if fresh else client.search_runs([experiment_id], unfinished, max_results=1)
        if found:
            tracker = MlflowTracker(config, client, experiment_id, found[0].info.run_id)
            client.update_run(tracker.run_id, status="RUNNING")
            tracker.set_tags(labels)
            return tracker
        run = client.create_run(experiment_id, run_name=name, tags=labels)
        tracker = MlflowTracker(config, client, experiment_id, run.info.run_id)
        tracker.log_params(_flat(config.model_dump(mode="json", exclude={"ray", "tracking"})))
        return tracker


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
    """The runs of stages that are marked as running while nobody holds the stage's lease, and those above them."""
    storage = Storage(config.storage)
    at_work = {holder.work for holder in all_holders(storage) if holder.seems_alive}
    with _reachable(config):
        client = _connect(config)
        experiments = [each.experiment_id for each in client.search_experiments() if each.name.startswith("rcnn/")]
        running = client.search_runs(experiments, "attributes.status = 'RUNNING'") if experiments else []
    keyed = [
        StageRun(run.info.run_id, run.info.run_name, run.data.tags[KEY_TAG])
        for run in running
        if KEY_TAG in run.data.tags
    ]
    # The run of a pipeline has no lease of its own: it is left to itself while any stage is at work.
    return [run for run in keyed if (run.key not in at_work if "/" in run.key else not at_work)]


def end_run(config: PipelineConfig, run_id: str) -> None:
    """Marks a run that nobody works on, and those under it, as killed."""
    with _reachable(config):
        client = _connect(config)
        experiment = client.get_run(run_id).info.experiment_id
        where = f"tags.`{PARENT_TAG}` = '{run_id}' and attributes.status = 'RUNNING'"
        for run in client.search_runs([experiment], where):
            client.set_terminated(run.info.run_id, "KILLED")
        client.set_terminated(run_id, "KILLED")


def has_run(config: PipelineConfig, run_id: str) -> bool:
    """Whether the store knows the run: results outlive a store that was deleted or exchanged."""
    with _reachable(config):
        return _or_none(lambda: _connect(config).get_run(run_id)) is not None


def register_model(
    config: PipelineConfig,
    model_folder: Path,
    description: Mapping[str, Any],
    *,
    run_id: str,
    weights_sha256: str,
    figures: Standing,
) -> Standing:
    """Logs a finished model to its training run and registers it, with the figures that it is judged by.

    Args:
        config: names the registered model.
        model_folder: holds `model.safetensors` and `model.json`, and is itself named `MODEL_FOLDER`.
        description: the content of `model.json`.
        run_id: the training run.
        weights_sha256: identity of the weights; a version that has them is not registered twice.
        figures: test error and test digest; the version in it does not count.

    Returns:
        The figures with the new version.
    """
    with _reachable(config):
        client = _connect(config)
        mlflow.set_tracking_uri(tracking_uri(config))
        name = model_name(config)
        found = client.search_model_versions(f"name = '{name}' and tags.weights_sha256 = '{weights_sha256}'")
        if found:  # an earlier attempt came as far as this
            return Standing(int(found[0].version), figures.test_error, figures.test_digest)
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
                **{name: str(getattr(config.model, name)) for name in config.model.reads if name in ("k", "t")},
            },
        )
        return Standing(int(version.version), figures.test_error, figures.test_digest)


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
    name = model_name(config)

    def mark(value: str) -> None:
        with _reachable(config):
            _connect(config).set_model_version_tag(name, str(version), PROMOTION_TAG, value)

    mark(UNDER_WAY)
    yield
    mark(str(max(version_numbers(config, name))))


def promoted_since(config: PipelineConfig, version: int) -> list[Standing]:
    """The other versions that are becoming champion, or became it when this one was registered already."""
    name = model_name(config)
    with _reachable(config):
        found = _connect(config).search_model_versions(f"name = '{name}'")
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
    found: list[str] = []
    with _reachable(config):
        token: str | None = ""
        client = _connect(config)
        while token is not None:
            page = client.search_registered_models(page_token=token or None)
            found += [model.name for model in page if not config.tracking.uri or _is_ours(model)]
            token = page.token or None
    return sorted(found)


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
        numbers: list[int] = []
        token: str | None = ""
        client = _connect(config)
        while token is not None:
            page = client.search_model_versions(f"name = '{name}'", page_token=token or None)
            numbers += [int(version.version) for version in page]
            token = page.token or None
    return numbers


def list_versions(config: PipelineConfig, name: str = "") -> list[dict[str, str]]:
    """Every version of a model (default: the config's), the newest first: version, aliases, test_error, k, t, run_id."""
    with _reachable(config):
        client = _connect(config)
        found = client.search_model_versions(f"name = '{name or model_name(config)}'")
        # The search leaves the aliases out.
        versions = [client.get_model_version(version.name, version.version) for version in found]
    rows = []
    for whole in versions:
        rows.append(
            {"version": str(whole.version), "aliases": ", ".join(whole.aliases), "run_id": whole.run_id or ""}
            | {name: whole.tags.get(name, "") for name in ("test_error", "k", "t", "config_hash", "test_digest")}
        )
    return sorted(rows, key=lambda row: -int(row["version"]))


def git_commit() -> str:
    """The commit of the code that runs, with "-dirty" where files differ from it; empty outside a checkout."""
    call = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _experiment(client: MlflowClient, config: PipelineConfig) -> str:
    name = experiment_name(config)
    found = client.get_experiment_by_name(name)
    if found is not None:
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
    """A pyfunc made of a script and safetensors, with this package's own code inside."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    height, width, channels = description["image_shape"]
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, channels, height, width))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(description["classes"])))]),
    )
    package = Path(__file__).parents[1]
    example = np.random.default_rng(0).integers(0, 256, (2, channels, height, width), dtype=np.uint8)
    with mlflow.start_run(run_id=run_id):
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package / "registry" / "served_model.py"),
            artifacts={"model": str(model_folder)},
            signature=signature,
            input_example=example,
            code_paths=[str(package)],
            pip_requirements=_requirements(),  # left out, MLflow spends 15 s on guessing them
        )


def _requirements() -> list[str]:
    from importlib.metadata import version

    return [f"{name}=={version(name)}" for name in ("torch", "numpy", "pydantic", "pyarrow", "safetensors", "tqdm")]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


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


def _database_fault(error: Exception) -> str:
    """What SQLite said, which SQLAlchemy and MLflow put somewhere into a longer text."""
    found = re.search(r"\(sqlite3\.\w+\) ([^\n\[]+)", str(error))
    return found[1].strip() if found else ""


def _store_error(config: PipelineConfig, error: Exception) -> ClusterError:
    uri = tracking_uri(config)
    fault = _database_fault(error) or next(iter(str(error).splitlines()), type(error).__name__)
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
