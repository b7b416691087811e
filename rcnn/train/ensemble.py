"""Several trainings, which differ in their seed, as one model: the mean of their probabilities, or of their weights.

In: the results of the members' trainings. Out: a model folder like any other, which is evaluated, registered and served alike.
"""

import hashlib
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rcnn.config import PipelineConfig
from rcnn.data.loader import open_rows
from rcnn.data.manifest import Manifest, require_manifest
from rcnn.model.build import count_parameters
from rcnn.progress import say
from rcnn.results import IngestResult, TrainResult
from rcnn.storage import StageFolder
from rcnn.tracking import Tracker
from rcnn.train.checkpoint import WEIGHTS, load_model, save_model
from rcnn.train.step import score

Weights = Mapping[str, Tensor]


def run_ensemble(
    config: PipelineConfig, data: IngestResult, members: Sequence[TrainResult], target: StageFolder, tracker: Tracker
) -> TrainResult:
    """Makes one model of several; the figures are those of the members, but for the validation error, which is its own.

    Raises:
        DataError: a member's model or the data set is incomplete.
        ClusterError: the storage cannot be written.
    """
    manifest, storage = require_manifest(target.storage, data.folder), target.storage
    tracker.log_data(manifest.summary(), storage.uri(data.folder), context="training")
    weights = [_weights_of(target, member) for member in members]
    join = of_mean_weights if config.model.combine == "weights" else of_all_members
    with tempfile.TemporaryDirectory() as folder:
        save_model(join(weights), config, manifest, Path(folder))
        model, _ = load_model(Path(folder))
        sha256 = hashlib.sha256(Path(folder, WEIGHTS).read_bytes()).hexdigest()
        target.require_held()
        storage.upload(Path(folder), target.path("model"))
    histories = [storage.read_json(f"{member.folder}/history.json") for member in members]
    storage.write_json(target.path("history.json"), mean_history(histories))
    result = TrainResult(
        folder=target.name,
        weights_sha256=sha256,
        val_error=_val_error(config, data, manifest, model, target),
        with_validation=config.train.with_validation,
        best_epoch=statistics.fmean(member.best_epoch for member in members),
        epochs=min(member.epochs for member in members),
        num_parameters=count_parameters(model),
        images_per_second=statistics.median_high(member.images_per_second for member in members),
        peak_bytes=max(member.peak_bytes for member in members),
        seconds=round(sum(member.seconds for member in members), 1),
    )
    mean = statistics.fmean(member.val_error for member in members)
    tracker.log_params({"num_parameters": result.num_parameters})
    tracker.log_metrics({"best/val/error": result.val_error, "members/val/error": mean, "perf/seconds": result.seconds})
    _say_gain(config, result, mean)
    return result


def of_all_members(weights: Sequence[Weights]) -> dict[str, Tensor]:
    """The weights of an ensemble from those of its members, which all remove the same mean."""
    shared = {name: value for name, value in weights[0].items() if not name.startswith("network.")}
    return shared | {
        name.replace("network.", f"network.members.{number}.", 1): value
        for number, each in enumerate(weights)
        for name, value in each.items()
        if name.startswith("network.")
    }


def of_mean_weights(weights: Sequence[Weights]) -> dict[str, Tensor]:
    """The mean of each weight. Networks from different initial weights do not, in general, lie in one basin of the loss."""
    return {name: torch.stack([each[name] for each in weights]).mean(0) for name in weights[0]}


def mean_history(histories: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """The members' metrics after each epoch that all of them have, averaged."""
    return [
        {name: statistics.fmean(each[name] for each in rows) for name in rows[0] if all(name in each for each in rows)}
        for rows in zip(*histories, strict=False)
    ]


def _weights_of(target: StageFolder, member: TrainResult) -> Weights:
    with tempfile.TemporaryDirectory() as folder:
        target.storage.download(f"{member.folder}/model", Path(folder))
        model, _ = load_model(Path(folder))
    weights: Weights = model.state_dict()
    return weights


def _val_error(
    config: PipelineConfig, data: IngestResult, manifest: Manifest, model: torch.nn.Module, target: StageFolder
) -> float:
    megabytes = config.execution.resident_megabytes
    rows = open_rows(target.storage, data.folder, manifest, "val", resident_megabytes=megabytes)
    scores = score(
        model,
        rows,
        num_classes=len(manifest.classes),
        batch_size=config.evaluate.batch_size,
        device=torch.device("cpu"),
    )
    return float(scores.metrics()["error"])


def _say_gain(config: PipelineConfig, result: TrainResult, mean: float) -> None:
    """What the whole is worth, and what it costs."""
    model = config.model
    if config.train.with_validation:
        say(f"  {model.members} networks as one; the evaluation says what that gains")
        return
    cost = f"at {model.members} times the arithmetic" if model.combine == "probabilities" else "at no cost"
    say(f"  validation error {100 * result.val_error:.2f} %, {cost}; the members' mean is {100 * mean:.2f} %")
    if result.val_error > mean and not math.isclose(result.val_error, mean):
        say("  that is no gain: set model.combine to probabilities, or model.members to 1")
