"""rCNN, the paper's recursive network: an RCNN whose feed-forward input is given only at t = 0.

    z(0) = w_f * u + b        z(t) = w_r * x(t-1) + b        x(t) = g(relu(z(t)))

Its layers are T + 1 convolutions deep; the last T share one kernel. On CIFAR-10 more steps make it worse, while they improve
the RCNN: the comparison exists to show this. It has as many parameters as the RCNN. Keeping the bias at t > 0 follows from the
paper's equation with u = 0; no source confirms or contradicts it.
"""

from typing import Any

from torch import nn

from rcnn.model.layers import RecurrentConvLayer
from rcnn.model.rcnn import build as build_rcnn


class RecursiveConvLayer(RecurrentConvLayer):
    """A recurrent layer that receives its input only at t = 0."""

    RECURRENT_GAIN = 1.0
    """He's deviation, since the recurrent kernel is a step's only input: a quarter of it left gradients of 1e-7 at T = 3."""

    ADDS_INPUT = False


def build(image_shape: tuple[int, int, int], num_classes: int, **settings: Any) -> nn.Module:
    """rCNN-K with T recurrent steps; `settings` are the RCNN's."""
    return build_rcnn(image_shape, num_classes, layer=RecursiveConvLayer, **settings)
