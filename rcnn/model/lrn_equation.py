"""LRN as the paper writes it, and the band matrix of its sum: the reference for the fast implementations."""

import torch
from torch import Tensor
from torch.nn import functional


def reference_lrn(x_NKHW: Tensor, *, window: int, alpha: float = 0.001, beta: float = 0.75) -> Tensor:
    """The equation as written, differentiated by autograd: slow; the reference for tests of the fast implementations."""
    squares_NKHW = functional.pad(x_NKHW.square(), (0, 0, 0, 0, window // 2, (window - 1) // 2))
    sums_NKHW = squares_NKHW.unfold(1, window, 1).sum(-1)
    return x_NKHW * (1 + alpha / window * sums_NKHW).pow(-beta)


def band_matrix(num_maps: int, window: int) -> Tensor:
    """(K, K): entry (k, j) is 1 if map j is in the window of map k, which is clipped at the first and last map."""
    offset_KK = torch.arange(num_maps)[None, :] - torch.arange(num_maps)[:, None]
    inside_KK = (offset_KK >= -(window // 2)) & (offset_KK <= (window - 1) // 2)
    return inside_KK.to(torch.float32)
