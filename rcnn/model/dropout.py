"""Dropout whose masks follow from (seed, epoch, step, share, layer), whatever the number of threads.

A mask of a training step is not stored: the backward pass draws it again. On the CPU the draws are those of a counter-based
generator, compiled from `dropout.c`: 1.7 ms for 64x96x16x16 elements on 2 cores, where `nn.Dropout`, which draws on one
thread, takes 12. Elsewhere, and without a C compiler, a generator of torch draws them, seeded for each layer and step, and the
mask is stored. Where torch compiles the network, only torch's own generator can be used.

Shapes in names: N images, K feature maps, H, W.
"""

import ctypes
import functools
import hashlib
import struct
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rcnn.model.compiled import compiled

Name = tuple[int, int, int, int]
"""Four words of 32 bits that name the draws of a layer in a step."""

ONE = 2**16
"""Draws are integers below this."""


@dataclass(frozen=True)
class Position:
    """Where training is: what the masks of a step follow from."""

    seed: int
    epoch: int
    step: int
    share: int
    """The part of the global batch that the images are: the rank, or a share of a fixed number."""

    def as_seed(self) -> int:
        """A seed for torch's generators."""
        return _as_seed(_words(*astuple(self)))


class Dropout(nn.Dropout):
    """In training, zeroes each element with a probability of p in [0, 1) and divides the others by 1 - p.

    On the CPU, p is rounded to a multiple of 2^-16. Unless `set_position` has named the step, torch's global generator does.
    """

    def __init__(self, p: float):
        super().__init__(p)
        self.position: tuple[Position, int] | None = None

    def forward(self, x_NKHW: Tensor) -> Tensor:
        """(N, ...) -> (N, ...)."""
        if not self.is_active:
            return x_NKHW
        if _runs_compiled(x_NKHW) and kernel(x_NKHW.dtype) is not None:
            return _CompiledDropout.apply(x_NKHW, self.next_name(), self.rate_in_65536ths)
        if self.position is None or torch.compiler.is_compiling():
            return nn.functional.dropout(x_NKHW, self.p)
        generator = torch.Generator(x_NKHW.device).manual_seed(_as_seed(self.next_name()))
        return x_NKHW * torch.empty_like(x_NKHW).bernoulli_(1 - self.p, generator=generator) / (1 - self.p)

    @property
    def is_active(self) -> bool:
        """Whether it changes anything now."""
        return bool(self.training and self.p > 0)

    @property
    def rate_in_65536ths(self) -> int:
        """The rate that the compiled code draws with."""
        return min(round(float(self.p) * ONE), ONE - 1)

    def next_name(self) -> Name:
        """The name of this step's draws."""
        if self.position is None:
            return tuple(torch.randint(2**32, (4,)).tolist())  # type: ignore[return-value]
        position, layer = self.position
        return _words(*astuple(position), layer)


def set_position(model: nn.Module, position: Position) -> None:
    """Names the next step's draws in all dropout layers of a model."""
    for layer, module in enumerate(module for module in model.modules() if isinstance(module, Dropout)):
        module.position = (position, layer)


def _as_seed(words: Name) -> int:
    return words[0] | (words[1] & 0x7FFFFFFF) << 32


def _words(*numbers: int) -> Name:
    """A hash of some numbers."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return struct.unpack("<4I", hashlib.blake2b(packed, digest_size=16).digest())  # type: ignore[return-value]


class _CompiledDropout(torch.autograd.Function):
    """Saves nothing but the name of the draws."""

    @staticmethod
    def forward(ctx, x: Tensor, name: Name, rate: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.name, ctx.rate = name, rate
        return _dropped(x, name, rate)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _dropped(grad, ctx.name, ctx.rate), None, None


def _dropped(x: Tensor, name: Name, rate: int) -> Tensor:
    """Elements are numbered with maps last, whatever the layout in memory."""
    last = x.movedim(1, -1).contiguous() if x.dim() > 2 else x.contiguous()
    out = torch.empty_like(last)
    library = kernel(x.dtype)
    assert library is not None, "the caller asks for the kernel first"
    elements = last[0].numel() if len(last) else 0
    words = (ctypes.c_uint32 * 4)(*name)
    library.dropout(last.data_ptr(), out.data_ptr(), len(last), elements, words, rate, torch.get_num_threads())
    return out.movedim(-1, 1) if x.dim() > 2 else out


@functools.cache
def kernel(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled functions for a dtype; None if they cannot be compiled."""
    library = compiled("dropout.c", dtype, {})
    if library is not None:
        library.dropout.argtypes = [
            *2 * [ctypes.c_void_p], *2 * [ctypes.c_long], ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint32, ctypes.c_int
        ]  # fmt: skip
        library.dropout.restype = None
    return library


def _runs_compiled(x: Tensor) -> bool:
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()
