"""LRN as the paper writes it, and the band of its sum: what the fast forms are built from and tested against.

A file of its own, so that `lrn.py` can import the Triton kernel, and the kernel's self-check the equation.
"""

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_TRITON_K = 128
"""The banded matrix of more maps does not fit the memory that a program of the Triton kernel has."""


def reference_lrn(x_NKHW: Tensor, *, window: int, alpha: float = 0.001, beta: float = 0.75) -> Tensor:
    """The equation as written, through autograd; slow, and the truth that the fast forms are tested against."""
    squares_NKHW = functional.pad(x_NKHW.square(), (0, 0, 0, 0, window // 2, (window - 1) // 2))
    sums_NKHW = squares_NKHW.unfold(1, window, 1).sum(-1)
    return x_NKHW * (1 + alpha / window * sums_NKHW).pow(-beta)


def band_matrix(num_maps: int, window: int) -> Tensor:
    """(K, K): one where map j lies in the window of map k, clipped at the first and the last map."""
    offset_KK = torch.arange(num_maps)[None, :] - torch.arange(num_maps)[:, None]
    inside_KK = (offset_KK >= -(window // 2)) & (offset_KK <= (window - 1) // 2)
    return inside_KK.to(torch.float32)
