"""From a name in the table to a network, and what the network costs. Images are (H, W, C) here, as in the manifest."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from rcnn.model.networks import NETWORKS


@dataclass(frozen=True)
class Cost:
    """What a network costs, exactly."""

    parameters: int
    multiply_adds: int
    """Of one image's forward pass, in convolutions and linear layers."""


def build_network(
    name: str, image_shape: tuple[int, int, int], num_classes: int, settings: Mapping[str, Any] | None = None
) -> nn.Module:
    """A network with fresh weights: images (N, C, H, W) in, logits (N, num_classes) out.

    Args:
        name: a key of `NETWORKS`.
        image_shape: (H, W, C) of what the network sees.
        num_classes: logits per image.
        settings: values by name; those that the network does not read are left out.

    Raises:
        ValueError: there is no such network, or the images are too small for it.
    """
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}; there are {', '.join(NETWORKS)}")
    row = NETWORKS[name]
    chosen = {key: value for key, value in (settings or {}).items() if key in row.reads}
    network = getattr(import_module(row.module), row.build.partition(":")[2])(image_shape, num_classes, **chosen)
    assert isinstance(network, nn.Module), f"{row.build} returned {type(network).__name__}, not a module"
    return network


def cost_of(
    name: str, image_shape: tuple[int, int, int], num_classes: int, settings: Mapping[str, Any] | None = None
) -> Cost:
    """What `build_network` would build, without the memory of building it: on torch's meta device.

    The first call of a process takes a few seconds, since torch imports its compiler to compute shapes; so training does
    without it.

    Raises:
        ValueError: there is no such network, or the images are too small for it.
    """
    with torch.device("meta"):
        network = build_network(name, image_shape, num_classes, settings).eval()
    return Cost(count_parameters(network), count_multiply_adds(network, image_shape))


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers in the model."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_multiply_adds(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of one image's forward pass, in the `nn.Conv2d` and `nn.Linear` that it calls, each time it does.

    Counted during a pass of one image, on the network's device and in its mode. Biases, normalisations and pools are left
    out, as in the published counts. torch's `FlopCounterMode` would count LRN's band sum, which is a convolution on devices
    without a kernel of our own.
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
