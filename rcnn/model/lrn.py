"""Local response normalisation (LRN) over feature maps: the paper's g, equation (3).

    g(x)_k = x_k / (1 + (alpha / N) * sum of x_j^2 over the N maps j around k) ^ beta

In and out: (N, K, H, W). `LocalResponseNorm` computes the formula of `lrn_equation.py` with a hand-written backward pass,
because autograd through the formula takes several times as long as the convolutions around it:

    d = 1 + (alpha / N) band(x^2)        y = x d^-beta        dx = g d^-beta - (2 alpha beta / N) x band'(g y / d)

On a CPU with a compiler, `lrn_cpu.py` does everything in one pass over memory. Everywhere else, the sum over neighbouring maps
is a 1x1 convolution with a banded kernel.

Shapes in names: N images, K feature maps, H, W.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from rcnn.model import lrn_cpu
from rcnn.model.lrn_equation import band_matrix


class LocalResponseNorm(nn.Module):
    """LRN across `window` feature maps, centred like `torch.nn.functional.local_response_norm` with k = 1.

    Args:
        num_maps: K, the feature maps of the input.
        window: N, the number of feature maps in a sum; K / 8 + 1 in the paper.
        alpha, beta: the paper's constants (0.001 and 0.75).

    The result can be differentiated once: there is no double backward.
    """

    band: Tensor

    def __init__(self, num_maps: int, *, window: int, alpha: float = 0.001, beta: float = 0.75):
        super().__init__()
        self.num_maps, self.window, self.alpha, self.beta = num_maps, window, alpha, beta
        self.register_buffer("band", band_matrix(num_maps, window), persistent=False)

    def forward(self, x_NKHW: Tensor) -> Tensor:
        """g(x) for (N, K, H, W); the denominator is computed in float32 or wider, whatever the input's dtype."""
        if form := self._fused(x_NKHW, is_rectified=False):
            return form(x_NKHW, None)
        return self._by_convolution(x_NKHW)

    def rectified(self, z_NKHW: Tensor, plus_NKHW: Tensor | None = None) -> Tensor:
        """g(relu(z + plus)), the step of a recurrent layer, fused.

        With a `plus`, `z` may be overwritten: the caller must own it, as it owns a convolution's fresh output.
        """
        if form := self._fused(z_NKHW, is_rectified=True):
            return form(z_NKHW, plus_NKHW)
        return self._by_convolution(z_NKHW.relu() if plus_NKHW is None else (z_NKHW + plus_NKHW).relu_())

    def _fused(self, z: Tensor, *, is_rectified: bool) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """The fused implementation for this device and input, or None."""
        if type(z) is not Tensor or z.dim() != 4 or z.shape[1] != self.num_maps:
            return None  # torch's FakeTensor has no storage; a wrong shape is reported by the convolution
        if z.device.type != "cpu" or self.beta != lrn_cpu.EXPONENT or torch.compiler.is_compiling():
            return None
        if lrn_cpu.kernel(self.num_maps, self.window, z.dtype, is_rectified) is None:
            return None
        return lambda z, plus: lrn_cpu.CompiledLrn.apply(z, plus, self.window, self.alpha / self.window, is_rectified)

    def _by_convolution(self, x_NKHW: Tensor) -> Tensor:
        return _LocalResponseNorm.apply(x_NKHW, self._scaled_band(x_NKHW)[:, :, None, None], self.beta)

    def _scaled_band(self, like: Tensor) -> Tensor:
        """(K, K) with alpha / N on the band, in the dtype of the sums."""
        return self.band.to(_wide(like)) * (self.alpha / self.window)

    def extra_repr(self) -> str:
        """The constants, for `print(model)`."""
        return f"window={self.window}, alpha={self.alpha}, beta={self.beta}"


class _LocalResponseNorm(torch.autograd.Function):
    """LRN on any device and for any dtype; the band sum is a 1x1 convolution."""

    @staticmethod
    def forward(ctx, x_NKHW: Tensor, band_KK11: Tensor, beta: float) -> Tensor:  # type: ignore[no-untyped-def]
        wide_NKHW = x_NKHW.to(_wide(x_NKHW))
        d_NKHW = _band_sum(wide_NKHW.square(), band_KK11).add_(1)
        ctx.save_for_backward(x_NKHW, d_NKHW, band_KK11)
        ctx.beta = beta
        return (wide_NKHW * negative_power(d_NKHW, beta)).to(x_NKHW.dtype)

    @staticmethod
    def backward(ctx, grad_NKHW: Tensor):  # type: ignore[no-untyped-def]
        x_NKHW, d_NKHW, band_KK11 = ctx.saved_tensors
        direct_NKHW = grad_NKHW.to(d_NKHW.dtype) * negative_power(d_NKHW, ctx.beta)
        inner_NKHW = (direct_NKHW * x_NKHW).div_(d_NKHW)
        spread_NKHW = _band_sum(inner_NKHW, band_KK11.transpose(0, 1))  # transposed: an even window is off-centre
        dx_NKHW = direct_NKHW.addcmul_(spread_NKHW, x_NKHW.to(d_NKHW.dtype), value=-2 * ctx.beta)
        return dx_NKHW.to(x_NKHW.dtype), None, None


def _band_sum(values_NKHW: Tensor, band_KK11: Tensor) -> Tensor:
    # torch has no autocast for the meta device, on which `cost_of` runs.
    with nullcontext() if values_NKHW.is_meta else torch.autocast(values_NKHW.device.type, enabled=False):
        if values_NKHW.is_cuda:  # convolutions round to TF32 by default, matrix products do not
            return functional.linear(values_NKHW.permute(0, 2, 3, 1), band_KK11[:, :, 0, 0]).permute(0, 3, 1, 2)
        return functional.conv2d(values_NKHW, band_KK11)


def _wide(x: Tensor) -> torch.dtype:
    """At least float32: with unit-scale activations d is 1.0008, which bfloat16 rounds to 1."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def negative_power(d: Tensor, beta: float) -> Tensor:
    """d^-beta; two square roots for the paper's 0.75, because torch vectorises `sqrt` and not `pow`."""
    return d.sqrt().mul_(d).rsqrt_() if beta == 0.75 else d.pow(-beta)
