"""What MLflow answered about our own store, kept while that store does not change: importing MLflow takes seconds.

Asked and answered by `rcnn predict`. Every write to the store (a run, a promotion, an alias set in MLflow's UI) makes the
answers void, since they name the state of the database file that they hold for. A server is asked each time.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, RcnnError
from rcnn.storage import Storage
from rcnn.tracking import STORE, has_store

ANSWERS = "registry-answers.json"
CHANGE_COUNTER = slice(24, 28)
"""Bytes of the header of a SQLite file that differ after every transaction."""


@contextmanager
def model_folder(config: PipelineConfig, wanted: str) -> Iterator[tuple[str, Path]]:
    """A name for people, and the folder, of a model: one that training wrote, or one from the registry.

    Raises:
        ConfigError, DataError, ClusterError: as `fetched_model`; whether a folder holds a model is for the caller to find out.
    """
    if os.path.lexists(wanted) or re.match(r"[./~]|[^/]*/[^/]*/", wanted):  # else `name`, `name@alias` or `name/3`
        of_stage = Path(wanted, "model")  # the folder that `rcnn train` prints holds it
        yield wanted, of_stage if of_stage.is_dir() else Path(wanted)
        return
    with fetched_model(config, wanted) as found:
        yield found


@contextmanager
def fetched_model(config: PipelineConfig, wanted: str = "") -> Iterator[tuple[str, Path]]:
    """A name for people, and the local folder, of the version that `wanted` names (see `mlflow_store.find_version`).

    Raises:
        ConfigError: there is none, or more than one.
        DataError: the registry knows the version, and its files are gone.
        ClusterError: MLflow is out of reach.
    """
    found = _find(config, wanted)
    if Path(found["folder"] or "/", "model.json").is_file():
        yield found["title"], Path(found["folder"])
        return
    from rcnn.registry.mlflow_store import download_model, find_version

    version = find_version(config, wanted)
    with TemporaryDirectory() as folder:
        yield str(version), download_model(config, version, Path(folder))


def versions_of(config: PipelineConfig, name: str) -> list[int]:
    """The numbers of the versions of a model in our own store.

    Raises:
        ClusterError: the store is damaged.
    """

    def ask() -> list[int]:
        from rcnn.registry.mlflow_store import version_numbers

        return version_numbers(config, name)

    return remembered(config, f"versions of {name}", ask)  # type: ignore[no-any-return]


def remember_model(config: PipelineConfig, name: str) -> None:
    """Asks now, while MLflow is imported, what a rerun and `rcnn predict` will ask next."""
    if not config.tracking.uri:
        with suppress(RcnnError):
            versions_of(config, name)
        for wanted in ("", name):
            with suppress(RcnnError):  # with several models, the first question has no answer
                _find(config, wanted)


def _find(config: PipelineConfig, wanted: str) -> Any:
    def ask() -> dict[str, str]:
        from rcnn.registry.mlflow_store import find_version, local_folder

        version = find_version(config, wanted)
        return {"title": str(version), "folder": str(local_folder(config, version) or "")}

    return remembered(config, f"model {wanted or config.tracking.model_name}", ask)


def remembered(config: PipelineConfig, question: str, ask: Callable[[], Any]) -> Any:
    """The answer to a question about our own store: what `ask` returned before, if the store is as it was then.

    Args:
        config: says where the store is; if it is a server or another database, `ask` is called each time.
        question: names the answer.
        ask: returns the answer, a JSON value, without writing to the store.
    """
    state = None if config.tracking.uri or not has_store(config) else _state(Storage(config.storage).local_path(STORE))
    if state is None:
        return ask()
    known = _answers(config, state)
    if question not in known:
        known[question] = ask()
        # A write while MLflow was asked leaves a state that no later call sees.
        with suppress(ClusterError):  # a storage that cannot be written is slow, not wrong
            Storage(config.storage).write_json(ANSWERS, {"store": state, "answers": known})
    return known[question]


def _answers(config: PipelineConfig, state: list[int]) -> dict[str, Any]:
    try:
        tree = Storage(config.storage).read_json(ANSWERS) or {}
        return dict(tree["answers"]) if tree["store"] == state else {}
    except (ValueError, KeyError, TypeError, OSError):
        return {}


def _state(store: Path) -> list[int] | None:
    """What differs after a write to a SQLite file, or after its exchange; None while a write is under way."""
    if any(store.with_name(f"{store.name}{suffix}").exists() for suffix in ("-journal", "-wal")):
        return None
    try:
        with store.open("rb") as file:
            counter = int.from_bytes(file.read(CHANGE_COUNTER.stop)[CHANGE_COUNTER])
        found = store.stat()
    except OSError:
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns, counter]
