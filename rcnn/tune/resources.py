"""How many trials fit on a cluster at once, its memory included.

In: what a trial needs, and the nodes. Out: a number, and a line that says what it follows from. Memory is computed for the
largest point of the space before anything starts: Ray would otherwise start as many trials as there are cores, and end the
ones that the machine has no memory for.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rcnn.config import PipelineConfig
from rcnn.data.manifest import Manifest
from rcnn.ranges import Scalar
from rcnn.results import Choice
from rcnn.train.checkpoint import build_classifier
from rcnn.tune.space import Domain, Interval, Space, trial_config

PROCESS_BYTES = 950_000_000
"""A worker that has imported torch, Ray and pyarrow and holds next to nothing. Measured: 0.96 GB of
resident memory on Linux, with the CUDA build of torch; some of it is code that processes share."""
COPIES_OF_WEIGHTS = 4
"""Weights, gradients, momentum, and the gradients as one step clips them."""
ROOM_FOR_GRADIENTS = 1.5
"""The backward pass makes gradients of the activations while it frees the activations."""


@dataclass(frozen=True)
class Room:
    """What one worker of a trial takes, and how many trials that leaves room for."""

    num_trials: int
    memory_bytes: int
    """Of one worker; never more than the largest node has, or Ray would never start one."""
    reason: str


def room_for_trials(config: PipelineConfig, manifest: Manifest, nodes: Iterable[Mapping[str, float]]) -> Room:
    """The number of trials that run at once, at least one.

    Args:
        config: `tune` says what a trial takes, and may cap the number.
        manifest: the data set.
        nodes: the resources of each node as Ray counts them: `CPU`, `GPU`, `memory` in bytes.
    """
    tune, nodes = config.tune, list(nodes)
    needed = memory_of_trial(config, manifest)
    memory = min(needed, int(max(node.get("memory", 0) for node in nodes))) or needed
    wants = {"CPU": tune.cpus_per_trial, "GPU": tune.gpus_per_trial, "memory": memory}
    num_by_kind = {
        kind: _slots(nodes, {kind: amount}) // tune.workers_per_trial for kind, amount in wants.items() if amount
    }
    room = max(1, _slots(nodes, wants) // tune.workers_per_trial)
    scarce = min(num_by_kind, key=lambda kind: num_by_kind[kind])
    num_trials = min(room, tune.max_concurrent_trials or room)
    by = "tune.max_concurrent_trials" if num_trials < room else {"CPU": "CPU cores", "GPU": "GPUs"}.get(scarce, scarce)
    short = f", and no node has that much: {memory / 1e9:.1f} GB" if needed > memory else ""
    return Room(
        num_trials,
        memory,
        f"{num_trials} at a time, limited by {by}; a trial takes up to {needed * tune.workers_per_trial / 1e9:.1f} GB{short}",
    )


def _slots(nodes: Iterable[Mapping[str, float]], wants: Mapping[str, float]) -> int:
    """Workers that fit on the nodes: none is spread over two."""
    return sum(
        min(math.floor(node.get(kind, 0) / amount + 1e-9) for kind, amount in wants.items() if amount) for node in nodes
    )


def memory_of_trial(config: PipelineConfig, manifest: Manifest) -> int:
    """Bytes of one worker of the largest trial: its process, rows, weights, and what a step keeps for the backward pass.

    On a GPU the activations are in its own memory, of which Ray keeps no account; they are counted here all the same.
    """
    points = largest_points(config)
    return max(_memory_of(trial_config(config, point, seed=config.seed), manifest) for point in points)


def _memory_of(config: PipelineConfig, manifest: Manifest) -> int:
    classifier = build_classifier(config, manifest).to(memory_format=torch.channels_last)
    weights = sum(parameter.nbytes for parameter in classifier.parameters())
    rows = min(config.train.num_rows or math.inf, manifest.splits["train"].rows) + manifest.splits["val"].rows
    kept = min(rows * manifest.image_bytes, 2 * config.execution.resident_megabytes * 1_000_000)
    batch = max(config.train.batch_size // config.execution.num_workers, 1)
    activations = batch * saved_bytes_per_image(classifier, manifest.image_shape)
    return int(PROCESS_BYTES + kept + COPIES_OF_WEIGHTS * weights + ROOM_FOR_GRADIENTS * activations)


def largest_points(config: PipelineConfig) -> list[Choice]:
    """The points with the largest value of each number, and every combination of the texts: no order says which is largest.

    Of the texts, those outside `model` take no memory, and the first stands for all.
    """
    candidates = {name: _candidates(name, domain) for name, domain in Space(config).domains.items()}
    return [Choice(dict(zip(candidates, point, strict=True))) for point in itertools.product(*candidates.values())]


def _candidates(name: str, domain: Domain) -> Sequence[Scalar]:
    if name == "model.crop" and 0 in domain:
        return [0]  # the whole image
    if isinstance(domain, Interval):
        return [domain.nearest(domain.high)]
    values = domain.values() or []
    if any(isinstance(value, str) for value in values):
        return values if name.startswith("model.") else values[:1]
    return [max(values)]


def saved_bytes_per_image(network: nn.Module, image_shape: tuple[int, int, int], *, num_images: int = 2) -> int:
    """What a forward pass keeps for the backward pass, counted by torch itself: each block of memory once, no weights.

    Args:
        network: takes uint8 images (N, C, H, W).
        image_shape: (H, W, C).
        num_images: of the pass that is counted.
    """
    height, width, channels = image_shape
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    blocks: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            blocks[storage.data_ptr()] = storage  # held, so that no other block gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.train()(torch.zeros(num_images, channels, height, width, dtype=torch.uint8))
    return int(sum(block.nbytes() for block in blocks.values())) // num_images
