"""A whole recurrent layer on the CPU, its 3x3 convolutions by Winograd's F(4x4, 3x3): `rcl_cpu.c`, compiled on first use.

Direct convolutions run at the speed of a matrix product, so only less arithmetic is faster: a tile of 4x4 outputs takes 36
multiplications per pair of maps instead of 144. Kernels are transformed once per step, and their gradients transformed back
once, for all time steps together. The states between a convolution, the normalisation and the next convolution stay in the
cache, and the backward pass computes x(t) again from z(t), so half as much is stored as by one operation after the other.

Rounding errors are about five times those of a direct convolution in float32 (`tests/bench/NOTES.md` has the table).

Shapes in names: N images, K feature maps, H, W; F = 36 planes, one for each pair of interpolation points.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rcnn.model.compiled import compiled
from rcnn.model.dropout import Name

POINTS, PLANES = 6, 36
A, B = 0.625, 1.5
"""The interpolation points are 0, +-A, +-B and infinity. 0, +-1 and +-2 have twice the rounding error."""
DIVISOR = 8
"""Of the number of maps that the kernel is written for."""
SMALLEST_SAVING = 2.0
"""Direct multiplications per multiplication of F(4x4), from which it pays: 4 at 16x16, 3.1 at 7x7, 2.3 at 3x3, 1 at 2x2.
Measured where it is 2 or more: 0.93 (96 maps of 3x3, the only one below 1) to 3.1 times as fast (`tests/bench/NOTES.md`)."""


@dataclass(frozen=True)
class Step:
    """What a layer computes with, besides its weights.

    Attributes:
        num_steps: T.
        window: N, maps in a normalisation sum.
        scale: alpha / N.
        adds_input: whether each time step adds z(0), or only the bias.
        recompute: whether the backward pass computes all z(t) again instead of storing them.
        name, rate: of the dropout after the last time step; rate 0: none.
    """

    num_steps: int
    window: int
    scale: float
    adds_input: bool
    recompute: bool
    name: Name = (0, 0, 0, 0)
    rate: int = 0


def can_compute(u_NKHW: Tensor, kernel_KK33: Tensor) -> bool:
    """Whether the compiled layer takes this input, an image's maps being those of the layer."""
    num_maps = len(kernel_KK33)
    is_plain = type(u_NKHW) is Tensor and u_NKHW.device.type == "cpu" and u_NKHW.dim() == 4
    fits = num_maps % DIVISOR == 0 and u_NKHW.shape[1] == num_maps and u_NKHW.numel() > 0
    is_narrowed = torch.is_autocast_enabled("cpu") and u_NKHW.dtype != torch.float64
    has_type = kernel_KK33.dtype == (torch.float32 if is_narrowed else u_NKHW.dtype)
    return is_plain and fits and has_type and not torch.compiler.is_compiling()


def pays(height: int, width: int) -> bool:
    """Whether F(4x4) is faster than direct convolution on maps of this size: it wastes what a tile covers beyond the border.

    The rule depends on nothing but the shape, so that all workers choose alike; and under autocast on the processor. In
    bfloat16, direct convolution is slower than this is in float32 (`tests/bench/NOTES.md`), unless there is a unit for
    products of bfloat16 matrices (AMX), with some eight times the speed. That one is not measured.
    """
    if torch.is_autocast_enabled("cpu") and torch.cpu.get_capabilities().get("amx_bf16", False):
        return False
    tiles = -(-height // 4) * -(-width // 4)
    return 9 * height * width >= SMALLEST_SAVING * PLANES * tiles


class CompiledLayer(torch.autograd.Function):
    """x(T), after dropout, from u and the layer's weights; under autocast in float32.

    Args of `apply`:
        u_NKHW: the input.
        feed_KK33, bias_K: the feed-forward kernel and bias.
        recurrent_KK33: the recurrent kernel; None if T = 0.
        step: everything else.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(  # type: ignore[no-untyped-def]
        ctx, u_NKHW: Tensor, feed_KK33: Tensor, bias_K: Tensor, recurrent_KK33: Tensor | None, step: Step
    ) -> Tensor:
        """Saves u and z(0) to z(T), or only u if the step is to recompute."""
        u_NHWK = _maps_last(u_NKHW)
        x_NHWK = torch.empty_like(u_NHWK)
        is_stored = any(ctx.needs_input_grad) and not step.recompute
        z_TNHWK = u_NHWK.new_empty(step.num_steps + 1, *u_NHWK.shape) if is_stored else None
        planes = [_planes(weight) for weight in (feed_KK33, recurrent_KK33) if weight is not None]
        layer = _layer(u_NHWK, bias_K, step, planes=planes)
        _require_memory(
            _library(u_NHWK, step).rcl_forward(ctypes.byref(layer), *map(_address, (u_NHWK, z_TNHWK, x_NHWK)))
        )
        ctx.save_for_backward(u_NHWK, feed_KK33, bias_K, recurrent_KK33, z_TNHWK)
        ctx.step = step
        return x_NHWK.permute(0, 3, 1, 2)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx, grad_NKHW: Tensor):  # type: ignore[no-untyped-def]
        """The gradients of u, the two kernels and the bias."""
        u_NHWK, feed_KK33, bias_K, recurrent_KK33, z_TNHWK = ctx.saved_tensors
        kernels = [weight for weight in (feed_KK33, recurrent_KK33) if weight is not None]
        grad_NHWK, du_NHWK = _maps_last(grad_NKHW), torch.empty_like(u_NHWK)
        num_maps = len(bias_K)
        kernel_size = PLANES * num_maps**2
        sums = u_NHWK.new_empty(len(kernels) * kernel_size + num_maps)
        planes = [_planes(weight) for weight in kernels] if z_TNHWK is None else []
        layer = _layer(
            u_NHWK, bias_K, ctx.step, planes=planes, turned=[_planes(weight, turned=True) for weight in kernels]
        )
        _require_memory(
            _library(u_NHWK, ctx.step).rcl_backward(
                ctypes.byref(layer), *map(_address, (u_NHWK, z_TNHWK, grad_NHWK, du_NHWK, sums))
            )
        )
        *dkernels, dbias_K = sums.split([kernel_size] * len(kernels) + [num_maps])
        dfeed, *drecurrent = [_kernel_gradient(dplanes.view(PLANES, num_maps**2)) for dplanes in dkernels]
        return du_NHWK.permute(0, 3, 1, 2), dfeed, dbias_K, drecurrent[0] if drecurrent else None, None


class _Layer(ctypes.Structure):
    """`layer` of rcl_cpu.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("images", "height", "width", "steps")),
        *((name, ctypes.c_void_p) for name in ("feed_forward", "recurrent")),
        *((name, ctypes.c_void_p) for name in ("feed_forward_turned", "recurrent_turned", "bias")),
        ("scale", ctypes.c_double),
        ("name", ctypes.c_uint32 * 4),
        ("rate", ctypes.c_uint32),
        ("adds_input", ctypes.c_int),
        ("threads", ctypes.c_int),
    )


def _layer(
    u_NHWK: Tensor, bias_K: Tensor, step: Step, *, planes: Sequence[Tensor] = (), turned: Sequence[Tensor] = ()
) -> _Layer:
    num_images, height, width, _ = u_NHWK.shape
    feed, recurrent, *_ = [*map(_address, planes), None, None]
    feed_turned, recurrent_turned, *_ = [*map(_address, turned), None, None]
    layer = _Layer(
        *(num_images, height, width, step.num_steps, feed, recurrent, feed_turned, recurrent_turned, _address(bias_K)),
        *(step.scale, (ctypes.c_uint32 * 4)(*step.name), step.rate, int(step.adds_input), torch.get_num_threads()),
    )
    layer.kept = (bias_K, *planes, *turned)  # the structure holds their addresses, so it must keep them alive
    return layer


def _library(u_NHWK: Tensor, step: Step) -> ctypes.CDLL:
    library = kernel(u_NHWK.shape[3], step.window, u_NHWK.dtype)
    assert library is not None, "the layer asks for the kernel first"
    return library


@functools.cache
def kernel(num_maps: int, window: int, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled functions for a layer and dtype; None if they cannot be compiled."""
    library = compiled("rcl_cpu.c", dtype, {"MAPS": num_maps, "WINDOW": window, "RECTIFIED": 1})
    if library is not None:
        library.rcl_forward.argtypes = [ctypes.POINTER(_Layer), *3 * [ctypes.c_void_p]]
        library.rcl_backward.argtypes = [ctypes.POINTER(_Layer), *5 * [ctypes.c_void_p]]
    return library


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _require_memory(failed: int) -> None:
    if failed:
        raise MemoryError("a recurrent layer has no memory for its scratch space; lower train.batch_size")


def _maps_last(x_NKHW: Tensor) -> Tensor:
    return x_NKHW.detach().permute(0, 2, 3, 1).contiguous()


def _planes(weight_KK33: Tensor, *, turned: bool = False) -> Tensor:
    """A kernel at the interpolation points: (F, K in, K out), or (F, K out, K in) if `turned`."""
    order = (2, 3, 0, 1) if turned else (2, 3, 1, 0)
    return _evaluation(weight_KK33.dtype) @ weight_KK33.detach().permute(order).reshape(9, -1)


def _kernel_gradient(dplanes_FX: Tensor) -> Tensor:
    """The gradient of a kernel (K out, K in, 3, 3), from that of its planes (F, K in x K out)."""
    num_maps = round(dplanes_FX.shape[1] ** 0.5)
    return (_evaluation(dplanes_FX.dtype).T @ dplanes_FX).view(3, 3, num_maps, num_maps).permute(3, 2, 0, 1)


@functools.cache
def _evaluation(dtype: torch.dtype) -> Tensor:
    """(F, 9): a 3x3 kernel, as a polynomial of degree 2 in each direction, at the points, over the Lagrange denominators."""
    finite = [0.0, A, -A, B, -B]
    rows = []
    for point in finite:
        denominator = 1.0
        for other in finite:
            denominator *= point - other if other != point else 1.0
        rows.append([point**power / denominator for power in range(3)])
    one_direction = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)
    return torch.kron(one_direction, one_direction).to(dtype)
