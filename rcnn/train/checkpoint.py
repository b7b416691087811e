"""The state of a training, as a checkpoint holds it, and the trained model.

A checkpoint is one file that `torch.load(weights_only=True)` opens: tensors and plain values; `checkpoint_store.py` keeps them.
A model folder is `model.safetensors` with `model.json`, which describes how to build the network. It has no pickle, so it is
safe to share.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rcnn.config import ExecutionConfig, PipelineConfig
from rcnn.data.manifest import Manifest
from rcnn.errors import ConfigError, DataError, TrainingError
from rcnn.model.build import build_network
from rcnn.model.classifier import Classifier, MeanRemoval
from rcnn.model.ensemble import Ensemble
from rcnn.model.networks import unread_settings
from rcnn.text import parse_json
from rcnn.train.optim import Schedule, build_optimizer

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


@dataclass
class TrainState:
    """Everything that the next step depends on. Shuffling, augmentation and dropout follow from (seed, epoch, step, share), so
    no state of a random generator needs to be saved."""

    config: PipelineConfig
    manifest: Manifest
    model: Classifier
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    averaged: AveragedModel | None
    loss_sum: Tensor
    """Of the steps of the unfinished epoch, a scalar on the training device."""
    epoch: int = 0
    """Finished epochs."""
    step: int = 0
    """Finished steps of the epoch after those."""
    learning_rate: float = 0.0
    """At the start of that epoch."""
    seconds: float = 0.0
    """Of training, up to here."""
    roll_backs: int = 0
    """How often training diverged and went back (see `roll_back.py`)."""
    history: list[dict[str, float]] = field(default_factory=list)
    """The metrics of each finished epoch."""
    best: dict[str, Any] = field(default_factory=dict)
    """The epoch with the lowest validation error, or with `train.with_validation` the last one: its "epoch", its "val_error"
    and the "weights" that had it."""

    @property
    def best_model(self) -> Classifier:
        """The model to evaluate: the averaged weights if averaging is on."""
        return self.averaged.module if self.averaged is not None else self.model  # type: ignore[return-value]

    @property
    def num_bytes(self) -> int:
        """About what a checkpoint takes: the weights, their momentum, the best ones, and the average."""
        weights: int = sum(tensor.numel() * tensor.element_size() for tensor in self.model.state_dict().values())
        return weights * (4 if self.averaged is not None else 3)

    def note_metrics(self, metrics: dict[str, float]) -> None:
        """Adds an epoch's metrics to the history; keeps the weights if they are the best so far."""
        self.history.append(metrics)
        is_latest = self.config.train.with_validation  # then the error is that of rows that were learned
        if not self.best or is_latest or metrics["val/error"] < self.best["val_error"]:
            weights = copied(self.best_model.state_dict())
            self.best = {"epoch": metrics["epoch"], "val_error": metrics["val/error"], "weights": weights}

    def save_best(self, folder: Path) -> None:
        """Writes the best model, as `load_model` reads it, to a folder."""
        save_model(self.best["weights"], self.config, self.manifest, folder)

    def snapshot(self) -> dict[str, Any]:
        """A checkpoint: a copy, in memory, that later steps do not change."""
        return copied(  # type: ignore[no-any-return]
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "averaged": self.averaged.state_dict() if self.averaged is not None else None,
                "loss_sum": self.loss_sum,
                "epoch": self.epoch,
                "step": self.step,
                "learning_rate": self.learning_rate,
                "seconds": self.seconds,
                "roll_backs": self.roll_backs,
                "history": self.history,
                "best": self.best,
                "config": self.config.model_dump_json(),
                "data_digest": self.manifest.digest,
            }
        )

    def load(self, saved: dict[str, Any]) -> None:
        """Takes up what `snapshot` returned.

        Raises:
            TrainingError: it was made with another data set.
        """
        if saved["data_digest"] != self.manifest.digest:
            raise TrainingError(
                "the checkpoint was made with another data set",
                where=self.manifest.name,
                remedy="Train again with --fresh",
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if self.averaged is not None:
            self.averaged.load_state_dict(saved["averaged"])
        self.loss_sum = saved["loss_sum"].to(self.loss_sum.device)
        self.epoch, self.step, self.learning_rate = saved["epoch"], saved["step"], saved["learning_rate"]
        self.seconds, self.roll_backs = saved["seconds"], saved["roll_backs"]
        self.history, self.best = saved["history"], saved["best"]


def copied(value: Any) -> Any:
    """Plain values and tensors as they are now, the tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: copied(each) for name, each in value.items()}
    return [copied(each) for each in value] if isinstance(value, list) else value


def new_state(config: PipelineConfig, manifest: Manifest, *, device: torch.device, num_steps: int) -> TrainState:
    """A model initialised with the config's seed, and what is needed to train it for `num_steps` steps."""
    torch.manual_seed(config.seed)
    model = build_classifier(config, manifest).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.train, fused=config.execution.use_gpu)
    averaged = None
    if config.train.ema_decay:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.train.ema_decay))
    schedule = Schedule(optimizer, config.train, num_steps=num_steps)
    return TrainState(config, manifest, model, optimizer, schedule, averaged, loss_sum=torch.zeros((), device=device))


def build_classifier(config: PipelineConfig, manifest: Manifest) -> Classifier:
    """Builds the network of the config for the data set's image shape and classes.

    Raises:
        ConfigError: model.crop is larger than the images; the images are too small for the network; or the network does not
            read a setting.
    """
    height, width, channels = manifest.image_shape
    if config.model.crop > min(height, width):
        raise ConfigError(
            f"is larger than the images of {manifest.name}, which are {width}x{height}",
            where=f"model.crop = {config.model.crop}",
            remedy="Lower it, or set it to 0",
        )
    mean, std = list(manifest.pixel_mean), [manifest.pixel_std] * channels
    if config.model.normalise == "channel":
        mean = [sum(mean[channel::channels]) / (height * width) for channel in range(channels)] * (height * width)
        std = list(manifest.channel_std)
    normalise = MeanRemoval(mean, std, manifest.image_shape)
    how = {name: getattr(config.execution, name) for name in ("convolution", "recompute")}
    _require_read(config.model.network, how)
    try:
        return _assembled(config.model.model_dump() | how, normalise, manifest.image_shape, len(manifest.classes))
    except ValueError as error:
        raise ConfigError(
            f"cannot be used with the images of {manifest.name}, {width}x{height}: {error}",
            where=f"model.network = {config.model.network}",
            remedy="Choose another network, larger images, or a larger model.crop",
        ) from error


def _require_read(network: str, how: dict[str, Any]) -> None:
    usual = ExecutionConfig().model_dump()
    for name, value in unread_settings(network, how).items():
        if value != usual[name]:
            raise ConfigError(
                f"is not read by model.network = {network!r}",
                where=f"execution.{name} = {str(value).lower()}",
                remedy=f"Set it to {str(usual[name]).lower()}",
            )


def _assembled(
    settings: dict[str, Any], normalise: MeanRemoval, image_shape: tuple[int, int, int], num_classes: int
) -> Classifier:
    """The classifier for the settings of `model`; without `network`, as in older models, it is the RCNN.

    Raises:
        ValueError: there is no such network, or the images are too small for it.
    """
    crop, name = settings["crop"], settings.get("network", "rcnn")
    seen = (crop, crop, image_shape[2]) if crop else image_shape
    num_members = settings.get("members", 1) if settings.get("combine") == "probabilities" else 1
    networks = [build_network(name, seen, num_classes, settings) for _ in range(num_members)]
    return Classifier(normalise, networks[0] if num_members == 1 else Ensemble(networks), crop=crop)


def save_model(weights: Mapping[str, Tensor], config: PipelineConfig, manifest: Manifest, folder: Path) -> None:
    """Writes the weights of a classifier, its `state_dict`, and the description that `load_model` reads."""
    from safetensors.torch import save_file  # late: the training core must run without safetensors

    save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, folder / WEIGHTS)
    description = {
        "network": config.model.model_dump(),
        "classes": list(manifest.classes),
        "image_shape": list(manifest.image_shape),
        "source": manifest.name,
        "data_digest": manifest.digest,
        "config": config.model_dump(mode="json"),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path) -> tuple[Classifier, dict[str, Any]]:
    """A trained model in evaluation mode, and its description (classes, image_shape (H, W, C), config).

    Raises:
        DataError: the folder does not hold a model, or its files do not match each other.
    """
    from safetensors.torch import load_file

    remedy = "Give a folder that `rcnn train` wrote"
    try:
        description = parse_json((folder / DESCRIPTION).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors has its own error type, json another
        raise DataError(f"does not hold a model ({error})", where=str(folder), remedy=remedy) from error
    try:
        _require_keys(description)
        model = _rebuilt(description)
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        fault = " ".join(str(error).split())[:300]
        raise DataError(
            f"the weights do not match the description ({fault})", where=str(folder), remedy=remedy
        ) from error
    return model.to(memory_format=torch.channels_last).eval(), description


def _require_keys(description: dict[str, Any]) -> None:
    missing = {"network", "classes", "image_shape", "source", "config"} - description.keys()
    if missing:
        raise ValueError(f"{DESCRIPTION} lacks {', '.join(sorted(missing))}")


def _rebuilt(description: dict[str, Any]) -> Classifier:
    """A classifier of the described shape, before its weights are loaded."""
    height, width, channels = description["image_shape"]
    normalise = MeanRemoval([0.0] * (height * width * channels), [1.0] * channels, (height, width, channels))
    return _assembled(description["network"], normalise, (height, width, channels), len(description["classes"]))
