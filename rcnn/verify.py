"""Trains a registered version again, from its recorded config, data and code, and compares the weights.

A result is named by what makes it, and training is deterministic on one kind of machine: the same config, data and code give
the same bits. What differs from the time of its registration is named: commit, torch, Python, processor.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rcnn.config import PipelineConfig
from rcnn.errors import DataError
from rcnn.progress import say
from rcnn.registry import mlflow_store
from rcnn.registry.champions import tags_of
from rcnn.registry.runs import environment
from rcnn.results import IngestResult, TrainResult
from rcnn.settings import config_from_json
from rcnn.stages import run_stage
from rcnn.storage import Storage
from rcnn.text import parse_json
from rcnn.tracking import model_name


@dataclass(frozen=True)
class Reproduction:
    """A version beside its repetition."""

    recorded_sha256: str
    found_sha256: str
    differences: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether the weights are the same, bit for bit."""
        return self.recorded_sha256 == self.found_sha256


def verify(config: PipelineConfig, version: int) -> Reproduction:
    """Trains a version again, in a folder of its own in the storage, and compares the SHA-256 of the weights.

    Args:
        config: says where the registry, the storage and Ray are.
        version: of the model that the config names.

    Raises:
        ConfigError: there is no such version.
        DataError: the version does not say how it was made.
    """
    tags = tags_of(config, version)
    name = f"{model_name(config)} version {version}"
    if "weights_sha256" not in tags:
        raise DataError(
            "it has no weights_sha256", where=name, remedy="Only versions that `rcnn` registered can be verified"
        )
    differences = tuple(_differences(tags))
    for difference in differences:
        say(f"  not as recorded: {difference}")
    recorded, place = _recorded_config(config, version), f"verify/{model_name(config)}-{version}"
    storage = Storage(config.storage)
    if recorded.train.max_minutes:
        say(f"  train.max_minutes = {recorded.train.max_minutes:g} may have ended it, and may end it elsewhere now")
    again = recorded.model_copy(update={"ray": config.ray, "tracking": config.tracking}).with_settings(
        {"storage": storage.below(place).root, "tracking.experiment": "rcnn/verify", "tune.enabled": False}
    )
    if recorded.train.shares:  # then the bits do not depend on the workers
        again = again.model_copy(update={"execution": config.execution})
    say(f"{name}: training it again")
    data: IngestResult = run_stage(again, "ingest", {})  # type: ignore[assignment]
    if data.digest != tags.get("data_digest"):
        raise DataError(
            f"the data set is another one today ({data.digest[:16]}, not {tags.get('data_digest', '')[:16]})",
            where=name,
            remedy="Restore the source that it was trained on",
        )
    trained: TrainResult = run_stage(again, "train", {"ingest": data})  # type: ignore[assignment]
    storage.delete(place)  # kept where it failed: the next attempt resumes
    return Reproduction(tags["weights_sha256"], trained.weights_sha256, differences)


def _recorded_config(config: PipelineConfig, version: int) -> PipelineConfig:
    """The config in the model's own description."""
    with tempfile.TemporaryDirectory() as folder:
        found = mlflow_store.find_version(config, f"{model_name(config)}/{version}")
        model = mlflow_store.download_model(config, found, Path(folder))
        description = parse_json((model / "model.json").read_text(encoding="utf-8"))
    return config_from_json(json.dumps(description["config"]), origin=f"{found} (model.json)")


def _differences(tags: Mapping[str, str]) -> list[str]:
    """What differs between the machine that made the version and this one, as far as the version says."""
    here = environment()
    return [
        f"{what}: {tags[what]} then, {value} now"
        for what, value in here.items()
        if what in tags and tags[what] != value
    ]
