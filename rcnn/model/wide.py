"""WCNN, the paper's wide network: the RCNN without recurrence, widened to the size of a recurrent network.

Each recurrent layer becomes convolution + ReLU + LRN. WCNN-128 has 0.60 M parameters on CIFAR-10.
"""

from typing import Any

from torch import nn

from rcnn.model.rcnn import build as build_rcnn


def build(image_shape: tuple[int, int, int], num_classes: int, **settings: Any) -> nn.Module:
    """WCNN-K; `settings` are the RCNN's, without t and recompute."""
    return build_rcnn(image_shape, num_classes, t=0, **settings)
