"""z + plus, ReLU and LRN on an NVIDIA GPU, in one pass over channels-last memory, forward and backward.

In and out: (N, K, H, W), viewed here as a matrix of M = N H W positions by K maps. Each program processes some positions with
all their maps, so it reads each element once. The band sum is a product with the banded matrix on the tensor cores, split into
three TF32 products that together have float32 accuracy. The backward pass saves only x and recomputes the denominator.

Off unless a `LocalResponseNorm` is built with `triton=True`: tested only in Triton's interpreter, never run on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rcnn.model.lrn_equation import LARGEST_TRITON_K, band_matrix, reference_lrn

POSITIONS_PER_PROGRAM = 32
SMALLEST_BLOCK = 16  # the smallest side of a `tl.dot` operand


@triton.jit
def _negative_power(d, beta: tl.constexpr):  # type: ignore[no-untyped-def]
    if beta == 0.75:
        return tl.rsqrt(d * tl.sqrt(d))
    return tl.exp2(-beta * tl.log2(d))


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    z, plus, band, x_out, y_out, num_rows, num_maps,
    beta: tl.constexpr, has_plus: tl.constexpr, is_rectified: tl.constexpr, rows_per: tl.constexpr, maps_per: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * rows_per + tl.arange(0, rows_per)
    maps = tl.arange(0, maps_per)
    inside = (rows[:, None] < num_rows) & (maps[None, :] < num_maps)
    place = rows[:, None] * num_maps + maps[None, :]
    x = tl.load(z + place, mask=inside, other=0.0).to(tl.float32)
    if has_plus:
        x += tl.load(plus + place, mask=inside, other=0.0).to(tl.float32)
    if is_rectified:
        x = tl.maximum(x, 0.0)
    in_band = (maps[:, None] < num_maps) & (maps[None, :] < num_maps)
    band_to = tl.load(band + maps[None, :] * num_maps + maps[:, None], mask=in_band, other=0.0)  # from map j to map k
    d = 1.0 + tl.dot(x * x, band_to, input_precision="tf32x3")
    y = x * _negative_power(d, beta)
    tl.store(x_out + place, x.to(x_out.dtype.element_ty), mask=inside)
    tl.store(y_out + place, y.to(y_out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad, x_in, band, dz_out, num_rows, num_maps,
    beta: tl.constexpr, is_rectified: tl.constexpr, rows_per: tl.constexpr, maps_per: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * rows_per + tl.arange(0, rows_per)
    maps = tl.arange(0, maps_per)
    inside = (rows[:, None] < num_rows) & (maps[None, :] < num_maps)
    place = rows[:, None] * num_maps + maps[None, :]
    x = tl.load(x_in + place, mask=inside, other=0.0).to(tl.float32)
    in_band = (maps[:, None] < num_maps) & (maps[None, :] < num_maps)
    band_to = tl.load(band + maps[None, :] * num_maps + maps[:, None], mask=in_band, other=0.0)
    d = 1.0 + tl.dot(x * x, band_to, input_precision="tf32x3")
    direct = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * _negative_power(d, beta)
    band_back = tl.load(band + maps[:, None] * num_maps + maps[None, :], mask=in_band, other=0.0)
    spread = tl.dot(direct * x / d, band_back, input_precision="tf32x3")
    dz = direct - 2.0 * beta * spread * x
    if is_rectified:
        dz = tl.where(x > 0.0, dz, 0.0)
    tl.store(dz_out + place, dz.to(dz_out.dtype.element_ty), mask=inside)


class TritonLrn(torch.autograd.Function):
    """g(relu(z + plus)), or g(z) without the ReLU; see `lrn_cpu.CompiledLrn`."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, z_NKHW: Tensor, plus_NKHW: Tensor | None, band_KK: Tensor, beta: float, is_rectified: bool
    ) -> Tensor:
        """Saves x for the backward pass. `band_KK` holds alpha / N, in float32."""
        z = z_NKHW.contiguous(memory_format=torch.channels_last)
        plus = z if plus_NKHW is None else plus_NKHW.to(z.dtype).contiguous(memory_format=torch.channels_last)
        x, y = torch.empty_like(z), torch.empty_like(z)
        sizes, blocks, grid = _launch(z)
        _forward_kernel[grid](
            z, plus, band_KK, x, y, *sizes,
            beta=beta, has_plus=plus_NKHW is not None, is_rectified=is_rectified, **blocks,
        )  # fmt: skip
        ctx.save_for_backward(x, band_KK)
        ctx.beta, ctx.is_rectified, ctx.has_plus = beta, is_rectified, plus_NKHW is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NKHW: Tensor):  # type: ignore[no-untyped-def]
        """The gradient with respect to z, which is also the gradient with respect to plus."""
        x, band_KK = ctx.saved_tensors
        grad = grad_NKHW.contiguous(memory_format=torch.channels_last)
        dz = torch.empty_like(x)
        sizes, blocks, grid = _launch(x)
        _backward_kernel[grid](grad, x, band_KK, dz, *sizes, beta=ctx.beta, is_rectified=ctx.is_rectified, **blocks)
        return dz, dz if ctx.has_plus else None, None, None, None


def _launch(z_NKHW: Tensor) -> tuple[tuple[int, int], dict[str, Any], tuple[int]]:
    num_rows, num_maps = z_NKHW.numel() // z_NKHW.shape[1], z_NKHW.shape[1]
    blocks = {"rows_per": POSITIONS_PER_PROGRAM, "maps_per": max(SMALLEST_BLOCK, triton.next_power_of_2(num_maps))}
    return (num_rows, num_maps), blocks, (triton.cdiv(num_rows, POSITIONS_PER_PROGRAM),)


def largest_error(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of the output and the gradients against float64, over a few shapes."""
    errors = [0.0]
    for num_maps, beta in ((5, 0.75), (32, 0.5), (96, 0.75), (LARGEST_TRITON_K, 0.75)):
        window = num_maps // 8 + 1
        band = (band_matrix(num_maps, window) * (0.1 / window)).to(device)
        generator = torch.Generator().manual_seed(num_maps)
        z, plus, weight = (torch.randn(3, num_maps, 5, 7, generator=generator).to(device, dtype) for _ in range(3))
        z.requires_grad_()
        plus.requires_grad_()
        found = TritonLrn.apply(z, plus, band, beta, True)
        exact = [value.detach().double().requires_grad_() for value in (z, plus)]
        truth = reference_lrn((exact[0] + exact[1]).relu(), window=window, alpha=0.1, beta=beta)
        pairs = [(found, truth)]
        pairs += zip(torch.autograd.grad((found * weight).sum(), (z, plus)),
                     torch.autograd.grad((truth * weight).sum(), exact), strict=True)  # fmt: skip
        errors += [float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs]
    return max(errors)
