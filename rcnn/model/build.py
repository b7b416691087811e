"""Builds a network by its name in the table, and counts its cost. Image shapes are (H, W, C) here, as in the manifest."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from rcnn.model.networks import NETWORKS


@dataclass(frozen=True)
class Cost:
    """The exact cost of a network."""

    parameters: int
    multiply_adds: int
    """In the convolutions and linear layers of one image's forward pass."""


def build_network(
    name: str, image_shape: tuple[int, int, int], num_classes: int, settings: Mapping[str, Any] | None = None
) -> nn.Module:
    """Builds a network with newly initialised weights: images (N, C, H, W) in, logits (N, num_classes) out.

    Args:
        name: a key of `NETWORKS`.
        image_shape: (H, W, C) of the network's input.
        num_classes: logits per image.
        settings: values by name; settings that the network does not read are ignored.

    Raises:
        ValueError: there is no such network, or the images are too small for it.
    """
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}; choose one of {', '.join(NETWORKS)}")
    row = NETWORKS[name]
    chosen = {key: value for key, value in (settings or {}).items() if key in row.reads}
    network = getattr(import_module(row.module), row.build.partition(":")[2])(image_shape, num_classes, **chosen)
    assert isinstance(network, nn.Module), f"{row.build} returned {type(network).__name__}, not a module"
    return network


def cost_of(
    name: str, image_shape: tuple[int, int, int], num_classes: int, settings: Mapping[str, Any] | None = None
) -> Cost:
    """The cost of the network that `build_network` would build, counted on torch's meta device, without allocating weights.

    The first call in a process takes a few seconds, because torch imports its compiler to compute shapes. Training therefore
    does not call this.

    Raises:
        ValueError: there is no such network, or the images are too small for it.
    """
    with torch.device("meta"):
        network = build_network(name, image_shape, num_classes, settings).eval()
    return Cost(count_parameters(network), count_multiply_adds(network, image_shape))


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_multiply_adds(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds in the `nn.Conv2d` and `nn.Linear` calls of one image's forward pass, counting every call.

    Runs a forward pass of one image, on the network's device and in its mode. Biases, normalisation and pooling are excluded,
    as in the published counts. torch's `FlopCounterMode` would include LRN's band sum, which is a convolution on devices for
    which we have no kernel.
    """
    counted = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal counted
        counted += output.numel() * module.weight[0].numel()

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        height, width, channels = image_shape
        network(torch.zeros(1, channels, height, width, device=next(network.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return counted
