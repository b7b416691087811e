"""Compares two configs, wherever each stands: a recipe, a file, or the config that lies beside a trained model."""

import json
import os
from pathlib import Path

from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError
from rcnn.recipes import RECIPES, resolve_config
from rcnn.section import as_typed
from rcnn.settings import config_from_json, setting_names
from rcnn.storage import Storage
from rcnn.text import parse_json

DESCRIPTIONS = ("model.json", "model/model.json")
"""Paths of a model's description: in the folder of a checkpoint or model, and in that of a run."""


def find_config(name: str, storage: Storage) -> PipelineConfig:
    """The config that a recipe's name, a config file, or a run names.

    Args:
        name: of a recipe; a path to a file or to a folder with a model; or a run, as `train-4502709c7e72` in the storage.
        storage: where runs are.

    Raises:
        ConfigError: there is nothing of this name, or it holds no config that can be read.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if os.path.isfile(name):
        return resolve_config(file=name)
    if os.path.isdir(name):
        return _of_model({str(Path(name, file)): _text_of(Path(name, file)) for file in DESCRIPTIONS}, name)
    folder = name if "/" in name else f"runs/{name}"
    config = _of_storage(storage, folder) if name and not os.path.isabs(name) else None
    if config is None:
        raise ConfigError(
            f"there is no recipe, file or run {name!r}",
            where="--diff",
            remedy="`rcnn recipes` lists the recipes; runs are folders of the storage, such as runs/train-...",
        )
    return config


def differences(ours: PipelineConfig, theirs: PipelineConfig) -> list[tuple[str, str, str]]:
    """Each setting that differs: its dotted name and both values, as they would be typed."""
    pairs = ((name, ours.value_of(name), theirs.value_of(name)) for name in setting_names())
    return [(name, as_typed(our), as_typed(their)) for name, our, their in pairs if our != their]


def _of_storage(storage: Storage, folder: str) -> PipelineConfig | None:
    if not storage.exists(folder):
        return None
    texts = {}
    for file in DESCRIPTIONS:
        place = f"{folder}/{file}"
        texts[storage.uri(place)] = storage.read_text(place) if storage.exists(place) else None
    return _of_model(texts, folder)


def _of_model(texts: dict[str, str | None], folder: str) -> PipelineConfig:
    for place, text in texts.items():
        if text is not None:
            try:
                tree = parse_json(text)["config"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError("holds no config", where=place, remedy="Train the model again") from error
            return config_from_json(json.dumps(tree), origin=place)
    raise ConfigError(
        "holds no model, beside which its config would lie",
        where=folder,
        remedy="Name the folder of a training run that has finished, or of one of its checkpoints",
    )


def _text_of(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot be read", where=str(file), remedy="Check its permissions") from error
