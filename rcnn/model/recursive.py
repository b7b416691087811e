"""rCNN, the paper's recursive network: as the RCNN, but the feed-forward input is given at t = 0 only.

    z(0) = w_f * u + b        z(t) = w_r * x(t-1) + b        x(t) = g(relu(z(t)))

Its layers are T + 1 convolutions deep, the last T with one kernel. More steps make it worse on CIFAR-10, where they make the
RCNN better: this is what the comparison is for. It has the RCNN's parameters. That the bias stays at t > 0 is the paper's
equation with u = 0 there; no source says otherwise, and none confirms it.
"""

from typing import Any

from torch import Tensor, nn

from rcnn.model.layers import RecurrentConvLayer
from rcnn.model.rcnn import build as build_rcnn


class RecursiveConvLayer(RecurrentConvLayer):
    """A recurrent layer that sees its input at t = 0 only."""

    RECURRENT_GAIN = 1.0
    """Nothing else comes in at a step: a quarter per step left gradients of 1e-7 at T = 3."""

    def _static_input(self, z0_NKHW: Tensor) -> Tensor:
        bias_K = self.feed_forward.bias
        assert bias_K is not None, "the feed-forward kernel has a bias"
        return bias_K.to(z0_NKHW.dtype)[None, :, None, None].expand_as(z0_NKHW)


def build(image_shape: tuple[int, int, int], num_classes: int, **settings: Any) -> nn.Module:
    """rCNN-K with T recurrent steps; `settings` are the RCNN's."""
    return build_rcnn(image_shape, num_classes, layer=RecursiveConvLayer, **settings)
