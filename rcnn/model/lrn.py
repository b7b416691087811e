"""Local response normalisation (LRN) over feature maps: the paper's g, equation (3).

    g(x)_k = x_k / (1 + (alpha / N) * sum of x_j^2 over the N maps j around k) ^ beta

In and out: (N, K, H, W). Two forms that agree: `reference_lrn`, the formula as it stands, and `LocalResponseNorm`, whose
backward is written by hand, because autograd through the formula costs several times the convolutions beside it.

Shapes in names: N images, K feature maps, H, W.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def reference_lrn(x_NKHW: Tensor, *, window: int, alpha: float = 0.001, beta: float = 0.75) -> Tensor:
    """The equation as written, through autograd; slow, and the truth that the fast form is tested against."""
    squares_NKHW = functional.pad(x_NKHW.square(), (0, 0, 0, 0, window // 2, (window - 1) // 2))
    sums_NKHW = squares_NKHW.unfold(1, window, 1).sum(-1)
    return x_NKHW * (1 + alpha / window * sums_NKHW).pow(-beta)


class LocalResponseNorm(nn.Module):
    """LRN across `window` feature maps, centred like `torch.nn.functional.local_response_norm` with k = 1.

    Args:
        num_maps: K, the feature maps of the input.
        window: N, the feature maps that take part in a sum; the paper's is K / 8 + 1.
        alpha, beta: the paper's constants (0.001 and 0.75).
    """

    band: Tensor

    def __init__(self, num_maps: int, *, window: int, alpha: float = 0.001, beta: float = 0.75):
        super().__init__()
        self.num_maps, self.window, self.alpha, self.beta = num_maps, window, alpha, beta
        self.register_buffer("band", _band(num_maps, window), persistent=False)

    def forward(self, x_NKHW: Tensor) -> Tensor:
        """Normalises (N, K, H, W); the denominator is float32 or wider, whatever the input's type."""
        return _LocalResponseNorm.apply(x_NKHW, self.band, self.alpha / self.window, self.beta)

    def extra_repr(self) -> str:
        """What `print(model)` tells."""
        return f"window={self.window}, alpha={self.alpha}, beta={self.beta}"


class _LocalResponseNorm(torch.autograd.Function):
    """y = x d^-beta with d = 1 + scale * band(x^2); the band sum is a 1x1 convolution, which the BLAS does well."""

    @staticmethod
    def forward(ctx, x_NKHW: Tensor, band_KK11: Tensor, scale: float, beta: float) -> Tensor:  # type: ignore[no-untyped-def]
        wide_NKHW = x_NKHW.to(_wide(x_NKHW))
        d_NKHW = _band_sum(wide_NKHW.square(), band_KK11).mul_(scale).add_(1)
        power_NKHW = _negative_power(d_NKHW, beta)
        ctx.save_for_backward(x_NKHW, d_NKHW, power_NKHW, band_KK11)
        ctx.scale, ctx.beta = scale, beta
        return (wide_NKHW * power_NKHW).to(x_NKHW.dtype)

    @staticmethod
    def backward(ctx, grad_NKHW: Tensor):  # type: ignore[no-untyped-def]
        # dx = g d^-beta - 2 scale beta x band'(g x d^-beta / d); band' is the transpose, since an even window leans.
        x_NKHW, d_NKHW, power_NKHW, band_KK11 = ctx.saved_tensors
        direct_NKHW = grad_NKHW.to(d_NKHW.dtype) * power_NKHW
        inner_NKHW = (direct_NKHW * x_NKHW).div_(d_NKHW)
        spread_NKHW = _band_sum(inner_NKHW, band_KK11.transpose(0, 1))
        dx_NKHW = direct_NKHW.addcmul_(spread_NKHW.mul_(x_NKHW), spread_NKHW.new_tensor(-2 * ctx.scale * ctx.beta))
        return dx_NKHW.to(x_NKHW.dtype), None, None, None


def _band(num_maps: int, window: int) -> Tensor:
    """(K, K, 1, 1): one where map j lies in the window of map k, clipped at the first and the last map."""
    offset_KK = torch.arange(num_maps)[None, :] - torch.arange(num_maps)[:, None]
    inside_KK = (offset_KK >= -(window // 2)) & (offset_KK <= (window - 1) // 2)
    return inside_KK.to(torch.float32)[:, :, None, None]


def _band_sum(values_NKHW: Tensor, band_KK11: Tensor) -> Tensor:
    return functional.conv2d(values_NKHW, band_KK11.to(values_NKHW.dtype))


def _wide(x: Tensor) -> torch.dtype:
    """float32 at least: at unit-scale activations d is 1.0008, which bfloat16 rounds to 1."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _negative_power(d_NKHW: Tensor, beta: float) -> Tensor:
    """d^-beta; for the paper's 0.75 by two square roots, which are vectorised where `pow` is not."""
    if beta == 0.75:
        return (d_NKHW * d_NKHW.sqrt()).rsqrt_()
    return d_NKHW.pow(-beta)
