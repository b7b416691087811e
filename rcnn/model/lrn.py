"""Local response normalisation (LRN) over feature maps: the paper's g, equation (3).

    g(x)_k = x_k / (1 + (alpha / N) * sum of x_j^2 over the N maps j around k) ^ beta

In and out: (N, K, H, W). `LocalResponseNorm` agrees with the formula as it stands in `lrn_equation.py` and has a backward
written by hand, because autograd through the formula costs several times the convolutions beside it:

    d = 1 + (alpha / N) band(x^2)        y = x d^-beta        dx = g d^-beta - (2 alpha beta / N) x band'(g y / d)

How that is done depends on the device: `lrn_cpu.py` and `lrn_triton.py` do all in one pass over the memory, and for whatever
else there is, the sum over neighbouring maps is a 1x1 convolution with a banded kernel.

Shapes in names: N images, K feature maps, H, W.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from rcnn.model import lrn_cpu
from rcnn.model.lrn_equation import LARGEST_TRITON_K, band_matrix


class LocalResponseNorm(nn.Module):
    """LRN across `window` feature maps, centred like `torch.nn.functional.local_response_norm` with k = 1.

    Args:
        num_maps: K, the feature maps of the input.
        window: N, the feature maps that take part in a sum; the paper's is K / 8 + 1.
        alpha, beta: the paper's constants (0.001 and 0.75).
        triton: whether a kernel of our own works on GPUs, for K up to 128.

    The gradients are once differentiable.
    """

    band: Tensor

    def __init__(self, num_maps: int, *, window: int, alpha: float = 0.001, beta: float = 0.75, triton: bool = False):
        super().__init__()
        self.triton = triton
        self.num_maps, self.window, self.alpha, self.beta = num_maps, window, alpha, beta
        self.register_buffer("band", band_matrix(num_maps, window), persistent=False)

    def forward(self, x_NKHW: Tensor) -> Tensor:
        """g(x) of (N, K, H, W); the denominator is float32 or wider, whatever the input's type."""
        if form := self._fused(x_NKHW, is_rectified=False):
            return form(x_NKHW, None)
        return self._by_convolution(x_NKHW)

    def rectified(self, z_NKHW: Tensor, plus_NKHW: Tensor | None = None) -> Tensor:
        """g(relu(z + plus)), the step of a recurrent layer, in one go.

        Where there is a `plus`, `z` may be overwritten: it must be nobody else's, as what a convolution has just returned.
        """
        if form := self._fused(z_NKHW, is_rectified=True):
            return form(z_NKHW, plus_NKHW)
        return self._by_convolution(z_NKHW.relu() if plus_NKHW is None else (z_NKHW + plus_NKHW).relu_())

    def _fused(self, z: Tensor, *, is_rectified: bool) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """The form that does all in one pass on this device, if there is one."""
        if type(z) is not Tensor or z.dim() != 4 or z.shape[1] != self.num_maps:
            return None  # a stand-in without memory, as torch's fake tensors; or a mistake, for a convolution to refuse
        if self.triton and z.dtype != torch.float64 and self.num_maps <= LARGEST_TRITON_K and _runs_triton(z):
            from rcnn.model.lrn_triton import TritonLrn  # there is no Triton on every machine

            return lambda z, plus: TritonLrn.apply(z, plus, self._scaled_band(z), self.beta, is_rectified)
        if z.device.type != "cpu" or self.beta != lrn_cpu.EXPONENT or torch.compiler.is_compiling():
            return None
        if lrn_cpu.kernel(self.num_maps, self.window, z.dtype, is_rectified) is None:
            return None
        return lambda z, plus: lrn_cpu.CompiledLrn.apply(z, plus, self.window, self.alpha / self.window, is_rectified)

    def _by_convolution(self, x_NKHW: Tensor) -> Tensor:
        return _LocalResponseNorm.apply(x_NKHW, self._scaled_band(x_NKHW)[:, :, None, None], self.beta)

    def _scaled_band(self, like: Tensor) -> Tensor:
        """(K, K) with alpha / N on the band, as wide as the sums are."""
        return self.band.to(_wide(like)) * (self.alpha / self.window)

    def extra_repr(self) -> str:
        """What `print(model)` tells."""
        return f"window={self.window}, alpha={self.alpha}, beta={self.beta}"


class _LocalResponseNorm(torch.autograd.Function):
    """For any device and type; the band sum is a 1x1 convolution."""

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
        spread_NKHW = _band_sum(inner_NKHW, band_KK11.transpose(0, 1))  # transposed, since an even window leans
        dx_NKHW = direct_NKHW.addcmul_(spread_NKHW, x_NKHW.to(d_NKHW.dtype), value=-2 * ctx.beta)
        return dx_NKHW.to(x_NKHW.dtype), None, None


def _band_sum(values_NKHW: Tensor, band_KK11: Tensor) -> Tensor:
    # The meta device, where costs are counted, has no autocast.
    with nullcontext() if values_NKHW.is_meta else torch.autocast(values_NKHW.device.type, enabled=False):
        if values_NKHW.is_cuda:  # where a convolution would round to TF32, and a product does not
            return functional.linear(values_NKHW.permute(0, 2, 3, 1), band_KK11[:, :, 0, 0]).permute(0, 3, 1, 2)
        return functional.conv2d(values_NKHW, band_KK11)


def _runs_triton(z: Tensor) -> bool:
    return z.is_cuda or "TRITON_INTERPRET" in os.environ


def _wide(x: Tensor) -> torch.dtype:
    """float32 at least: at unit-scale activations d is 1.0008, which bfloat16 rounds to 1."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def negative_power(d: Tensor, beta: float) -> Tensor:
    """d^-beta; for the paper's 0.75 by two square roots, which are vectorised where `pow` is not."""
    return d.sqrt().mul_(d).rsqrt_() if beta == 0.75 else d.pow(-beta)
