"""MLflow runs as stages see them: a `Tracker` whose every call is a note in the outbox."""

import platform
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rcnn.config import PipelineConfig
from rcnn.registry.outbox import Outbox, outbox_of, require_store
from rcnn.results import StageResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import experiment_name, points_of

OF_A_TRAINING = ("recipe", "data", "model", "train", "augment", "seed", "execution", "-train.max_minutes")
"""The settings that a training shows, and a trial of a search too, so that both can be compared."""
REGISTERED_TAG = "rcnn.registered"  # of a pipeline: NAME/VERSION; its alias may change
NAME_TAG, TEXT_TAG = "mlflow.runName", "mlflow.note.content"
MAX_TEXT = 7900
"""Characters of a description; MLflow cuts a tag at 8,000."""


class OutboxTracker:
    """A `Tracker` that survives MLflow's absence. A call raises ClusterError only where the storage cannot be written."""

    def __init__(self, outbox: Outbox, experiment: str, parent: str, *, is_child: bool):
        self.id, self.parent = uuid.uuid4().hex[:16], parent
        """Our own ids of the run and of the one above it."""
        self._outbox, self._experiment, self._is_child = outbox, experiment, is_child
        self._data: list[dict[str, Any]] = []

    @property
    def run_id(self) -> str:
        """The run's id in MLflow; empty as long as MLflow has not made the run."""
        return self._outbox.run_ids.get(self.id, "")

    def log_params(self, params: Mapping[str, object]) -> None:
        """Stores settings by name."""
        self._note("params", params=_as_text(params))

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Stores numbers at an absolute step."""
        self._note("metrics", points=[(name, float(value), step) for name, value in metrics.items()])

    def log_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Stores the metrics of all epochs, in case some were lost with a driver that was killed."""
        self._note("metrics", points=points_of(history))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Labels the run."""
        self._note("tags", tags=dict(tags))

    def log_data(self, summary: Mapping[str, Any], uri: str, *, context: str) -> None:
        """Notes a data set as an input of the run."""
        self._data.append({"summary": dict(summary), "uri": uri, "context": context})
        self._note("data", summary=dict(summary), uri=uri, context=context)

    def log_files(self, folder: Path) -> None:
        """Stores each file of a local folder."""
        self._note("files", files=folder)

    def describe(self, text: str, *, name: str = "") -> None:
        """Describes the run, in Markdown, and gives it another name if there is one."""
        self.set_tags({TEXT_TAG: text[:MAX_TEXT]} | ({NAME_TAG: name} if name else {}))

    def log_model(self, model_id: str) -> None:
        """Names a model that MLflow has as the outcome of the run."""
        self._note("model", model_id=model_id)

    def child(self, name: str, config: PipelineConfig | None = None) -> "OutboxTracker":
        """The run of that name under this one, made if it is not there: a resumed search continues in the same runs."""
        child = OutboxTracker(self._outbox, self._experiment, self.id, is_child=True)
        child.open(name, params=config.applicable(*OF_A_TRAINING) if config else {})
        for data in self._data:
            child.log_data(**data)
        return child

    def close_children(self, ended: Mapping[str, Mapping[str, str]]) -> None:
        """Ends the runs under this one that have not ended: as finished, with tags, those in `ended`; as failed the others."""
        self._note("children", ended={name: dict(tags) for name, tags in ended.items()})

    def finish(self, *, failed: bool = False, killed: bool = False) -> None:
        """Ends the run; unless it is a child, waits a few seconds for MLflow to have its notes."""
        self._note("end", status="KILLED" if killed else "FAILED" if failed else "FINISHED")
        if not self._is_child:
            self._outbox.flush()

    def open(
        self,
        name: str,
        *,
        key: str = "",
        fresh: bool = False,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, object] | None = None,
    ) -> None:
        """Makes the run, or resumes the unfinished one with this key, or the child of this name."""
        labels, settings = dict(tags or {}), _as_text(_flat(params or {}))
        self._note("open", name=name, parent=self.parent, key=key, fresh=fresh, tags=labels, params=settings)

    def _note(self, kind: str, *, files: Path | None = None, **content: Any) -> None:
        about = {"kind": kind, "run": self.id, "experiment": self._experiment}
        self._outbox.append({**about, **content}, files)


def open_run(
    config: PipelineConfig,
    name: str,
    *,
    key: str,
    parent: str = "",
    tags: Mapping[str, str] | None = None,
    settings: Sequence[str] = (*OF_A_TRAINING, "tune", "evaluate", "audit"),
    text: str = "",
    fresh: bool = False,
) -> OutboxTracker:
    """The run of a stage, with settings as its parameters.

    Resumes an unfinished run with this key unless `fresh`. A server may be away, and gets its notes later; what is not a server
    is asked at once, since a damaged file or a wrong address of a database stays as it is.

    Args:
        config: the whole config.
        name: what people see.
        key: names the work, over all attempts.
        parent: our own id (`OutboxTracker.id`) of the run above it.
        tags: more labels.
        settings: sections and settings to show, as `PipelineConfig.values_of` takes them; those without effect are left out.
        text: what the run is about, in Markdown.
        fresh: makes a new run.

    Raises:
        ClusterError: the store is damaged, or the storage cannot be written.
    """
    from rcnn.registry.mlflow_store import KEY_TAG, STORAGE_TAG

    require_store(config)
    labels = {
        KEY_TAG: key,
        STORAGE_TAG: Storage(config.storage).root,
        "rcnn.config_hash": config.hash(),
        "rcnn.recipe": config.recipe,
        "mlflow.source.name": f"rcnn {name.partition(' ')[0]}",
        "mlflow.source.type": "LOCAL",
    }
    if commit := git_commit():
        labels["mlflow.source.git.commit"] = commit
    labels |= ({TEXT_TAG: text} if text else {}) | dict(tags or {})
    tracker = OutboxTracker(outbox_of(config), experiment_name(config), parent, is_child=False)
    tracker.open(name, key=key, fresh=fresh, tags=labels, params=config.applicable(*settings))
    return tracker


def described(about: str, target: StageFolder, result: StageResult) -> str:
    """What a finished stage's run is about, in Markdown: what it did, its figures, and where they come from."""
    sentence = about.partition(" (after")[0]  # as `rcnn --help` has it
    return f"{sentence[:1].upper()}{sentence[1:]}.\n\n{as_list(result.figures())}\n\nIn the storage: `{target.name}`"


def as_list(rows: Mapping[str, str]) -> str:
    """Labels and values in Markdown. Not as a table: MLflow draws its cells without any space between them."""
    return "\n".join(f"- {label}: {value}" for label, value in rows.items())


def git_commit() -> str:
    """The commit of the code that runs, with "-dirty" where files differ from it; empty outside a checkout.

    Installed from a wheel, this file may lie in somebody else's checkout (in `.venv/`), whose commit says nothing of it.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        return subprocess.run([*git, *describe], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment() -> dict[str, str]:
    """What the bits of a training depend on besides config and data."""
    import torch

    return {
        "git_commit": git_commit(),
        "torch": version("torch"),
        "python": platform.python_version(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def _as_text(params: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in params.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
