"""z + plus, ReLU and LRN on the CPU, in one pass over memory: `lrn_cpu.c`, compiled on first use.

As torch operations, LRN makes two dozen passes over memory and takes longer than the convolutions around it, with a tenth
of their arithmetic; one pass takes 1.4 ns per element forward and backward instead of 6.5 (`tests/bench/NOTES.md`).
Without a compiler, `kernel` returns None, and `lrn.py` uses torch operations.

In and out: (N, K, H, W), viewed here as a matrix of M = N H W positions by K maps (channels last in memory).
"""

import ctypes
import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rcnn.model.compiled import compiled

EXPONENT = 0.75
"""The only beta that the kernel implements, the paper's."""


class CompiledLrn(torch.autograd.Function):
    """g(relu(z + plus)), or g(z) without the ReLU.

    Args of `apply`:
        z_NKHW: a convolution's output; may be overwritten if there is a plus.
        plus_NKHW: the same shape, or None.
        window: N, maps in a sum.
        scale: alpha / N.
        is_rectified: whether there is a ReLU.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, z_NKHW: Tensor, plus_NKHW: Tensor | None, window: int, scale: float, is_rectified: bool
    ) -> Tensor:
        """Saves only z + plus for the backward pass, stored in place of z.

        Recomputing the denominator there costs nothing, because the pass is memory-bound, and halves the saved tensors.
        """
        z_MK = _rows(z_NKHW.detach())
        plus_MK = None if plus_NKHW is None else _rows(plus_NKHW.detach().to(z_MK.dtype).expand_as(z_NKHW))
        y_MK = torch.empty_like(z_MK)
        library = kernel(z_MK.shape[1], window, z_MK.dtype, is_rectified)
        assert library is not None, "lrn.py asks for the kernel first"
        plus = plus_MK if plus_MK is None else plus_MK.data_ptr()
        library.lrn_forward(z_MK.data_ptr(), plus, y_MK.data_ptr(), len(z_MK), scale, torch.get_num_threads())
        if plus is not None:
            torch.autograd.graph.increment_version(z_NKHW)  # autograd then refuses other uses of the old z
        ctx.save_for_backward(z_MK)
        ctx.library, ctx.scale, ctx.has_plus = library, scale, plus is not None
        return _images(y_MK, z_NKHW)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NKHW: Tensor):  # type: ignore[no-untyped-def]
        """The gradient with respect to z, which is also the gradient with respect to plus."""
        [z_MK] = ctx.saved_tensors
        grad_MK, dz_MK = _rows(grad_NKHW), torch.empty_like(z_MK)
        ctx.library.lrn_backward(
            grad_MK.data_ptr(), z_MK.data_ptr(), dz_MK.data_ptr(), len(z_MK), ctx.scale, torch.get_num_threads()
        )
        dz_NKHW = _images(dz_MK, grad_NKHW)
        return dz_NKHW, dz_NKHW if ctx.has_plus else None, None, None, None


@functools.cache
def kernel(num_maps: int, window: int, dtype: torch.dtype, is_rectified: bool) -> ctypes.CDLL | None:
    """The compiled functions for a network and dtype; None if they cannot be compiled."""
    library = compiled("lrn_cpu.c", dtype, {"MAPS": num_maps, "WINDOW": window, "RECTIFIED": int(is_rectified)})
    if library is not None:
        for function in (library.lrn_forward, library.lrn_backward):
            function.argtypes = [*3 * [ctypes.c_void_p], ctypes.c_long, ctypes.c_double, ctypes.c_int]
            function.restype = None
    return library


def _rows(x_NKHW: Tensor) -> Tensor:
    return x_NKHW.permute(0, 2, 3, 1).reshape(-1, x_NKHW.shape[1]).contiguous()


def _images(x_MK: Tensor, like_NKHW: Tensor) -> Tensor:
    num_images, num_maps, height, width = like_NKHW.shape
    return x_MK.view(num_images, height, width, num_maps).permute(0, 3, 1, 2)
