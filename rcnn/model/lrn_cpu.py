"""z + plus, ReLU and LRN on the CPU, a piece at a time: each piece passes two dozen operations while it is in the cache.

Whole tensors would go through the memory at each operation: LRN, a tenth of the arithmetic, then takes longer than the
convolutions. In and out: (N, K, H, W), seen here as a matrix of M = N H W positions and K maps (channels last in memory), in
pieces of P positions.
"""

import itertools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ELEMENTS_PER_PIECE = 1 << 17  # 512 KiB of float32: a piece and its by-products fit the second-level caches of two cores


class RectifiedLrn(torch.autograd.Function):
    """g(relu(z + plus)), or g(z) where nothing is to be rectified.

    Args of `apply`:
        z_NKHW: what a convolution returned; overwritten where there is a plus.
        plus_NKHW: the same shape, or None.
        window: N, maps in a sum.
        scale: alpha / N.
        beta: the exponent.
        is_rectified: whether there is a ReLU.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, z_NKHW: Tensor, plus_NKHW: Tensor | None, window: int, scale: float, beta: float, is_rectified: bool
    ) -> Tensor:
        """The value; what the gradient needs is kept: x and d."""
        z_MK = _rows(z_NKHW.data)  # as plain numbers: autograd watches views that are written to
        # With a plus, z is the caller's to give away, and is overwritten; without rectification, it is x as it is.
        x_MK = z_MK if plus_NKHW is not None or not is_rectified else torch.empty_like(z_MK)
        y_MK, d_MK = torch.empty_like(z_MK), torch.empty_like(z_MK)
        plus = itertools.repeat(None) if plus_NKHW is None else _pieces(_rows(plus_NKHW.data))
        one_K, band = z_MK.new_ones(z_MK.shape[1]), _BandSum(z_MK, window, before=window // 2)
        for x, y, d, z, more in zip(*map(_pieces, (x_MK, y_MK, d_MK, z_MK)), plus, strict=False):
            if more is not None:
                x.add_(more).relu_()
            elif is_rectified:
                torch.clamp_min(z, 0, out=x)
            torch.mul(x, x, out=band.input(len(x)))
            torch.add(one_K, band.sum(len(x)), alpha=scale, out=d)
            torch.mul(x, negative_power(d, beta, out=y), out=y)
        ctx.save_for_backward(x_MK, d_MK)
        ctx.settings = window, scale, beta, is_rectified, plus_NKHW is not None
        return _images(y_MK, z_NKHW)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NKHW: Tensor):  # type: ignore[no-untyped-def]
        """The gradient with respect to z, and the same for plus."""
        x_MK, d_MK = ctx.saved_tensors
        window, scale, beta, is_rectified, has_plus = ctx.settings
        dz_MK = torch.empty_like(x_MK)
        band = _BandSum(x_MK, window, before=(window - 1) // 2)  # the other way round, since an even window leans
        for grad, x, d, dz in zip(*map(_pieces, (_rows(grad_NKHW), x_MK, d_MK, dz_MK)), strict=True):
            torch.mul(grad, negative_power(d, beta, out=dz), out=dz)
            torch.mul(dz, x, out=band.input(len(x))).div_(d)
            if is_rectified:
                torch.ops.aten.threshold_backward.grad_input(dz, x, 0, grad_input=dz)
            dz.addcmul_(band.sum(len(x)), x, value=-2 * beta * scale)
        dz_NKHW = _images(dz_MK, grad_NKHW)
        return dz_NKHW, dz_NKHW if has_plus else None, None, None, None, None


class _BandSum:
    """For each map the sum of what is put in over `window` maps around it, `before` of them before it.

    By doubling: sums of 1, 2, 4, ... neighbours, of which those add up that the window's binary digits name. That takes a
    few additions where a product with a banded matrix takes K multiplications.
    """

    def __init__(self, like_MK: Tensor, window: int, *, before: int):
        num_rows, num_maps = min(len(like_MK), _rows_per_piece(like_MK)), like_MK.shape[1]
        padded = like_MK.new_zeros(num_rows, num_maps + window - 1)
        self.inputs = padded[:, before : before + num_maps]
        # (number of neighbours, their sums); the last one's are as wide as the maps.
        self.powers = [(1, padded)]
        while 2 * self.powers[-1][0] <= window:
            size = 2 * self.powers[-1][0]
            self.powers.append((size, like_MK.new_empty(num_rows, num_maps + window - size)))
        self.total, self.window, self.num_maps = like_MK.new_empty(num_rows, num_maps), window, num_maps

    def input(self, num_rows: int) -> Tensor:
        """Where the numbers (P, K) to be added up are to be written."""
        return self.inputs[:num_rows]

    def sum(self, num_rows: int) -> Tensor:
        """The sums (P, K), which the next call overwrites."""
        for (size, sums), (_, doubled) in zip(self.powers, self.powers[1:], strict=False):
            width = doubled.shape[1]
            torch.add(sums[:num_rows, :width], sums[:num_rows, size : size + width], out=doubled[:num_rows])
        terms, start = [], 0
        for size, sums in reversed(self.powers):
            if self.window & size:
                terms.append(sums[:num_rows, start : start + self.num_maps])
                start += size
        if len(terms) == 1:
            return terms[0]
        total = torch.add(terms[0], terms[1], out=self.total[:num_rows])
        for term in terms[2:]:
            total.add_(term)
        return total


def _rows_per_piece(matrix_MK: Tensor) -> int:
    return max(1, ELEMENTS_PER_PIECE // int(matrix_MK.shape[1]))


def _pieces(matrix_MK: Tensor) -> tuple[Tensor, ...]:
    return tuple(matrix_MK.split(_rows_per_piece(matrix_MK)))


def _rows(x_NKHW: Tensor) -> Tensor:
    return x_NKHW.permute(0, 2, 3, 1).reshape(-1, x_NKHW.shape[1])


def _images(x_MK: Tensor, like_NKHW: Tensor) -> Tensor:
    num_images, num_maps, height, width = like_NKHW.shape
    return x_MK.view(num_images, height, width, num_maps).permute(0, 3, 1, 2)


def negative_power(d: Tensor, beta: float, *, out: Tensor | None = None) -> Tensor:
    """d^-beta; for the paper's 0.75 by two square roots, which are vectorised where `pow` is not."""
    if beta == 0.75:
        return torch.sqrt(d, out=out).mul_(d).rsqrt_()
    return torch.pow(d, -beta, out=out)
