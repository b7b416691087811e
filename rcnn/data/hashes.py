"""Perceptual hashes, and the pairs of rows that they propose as near-duplicates. `duplicates.py` looks at their pixels.

The hash of an image has a bit for each of the 64 low frequencies of its grey values: the sign of the coefficient of a discrete
cosine transform (DCT), weighted towards the centre. Re-encoding or another brightness changes up to 3 of these bits, a shift
by one pixel of 32 about 7 and up to 26 (measured on CIFAR-10). So the rows of one side are hashed at nine positions; at the
best one, at most 5 bits differ. Mirroring changes the sign of the coefficients with an odd horizontal frequency: the hash of
the mirrored image is the same one with those bits flipped.

Comparing all pairs of hashes would be quadratic. Here, hashes are sorted four times, each time by another 16 bits first, and a
hash is compared with its neighbours in each order. So the work per row is bounded, also where thousands of images are equal.
Memory: 8 bytes a training row, 72 a held-out one, and 24 a row while sorting.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

NUM_WAVES = 8  # by 8 frequencies: 64 bits
SHIFTS = (0, -1, 1)
NUM_BANDS = 4
BITS_PER_BAND = 16
NUM_NEIGHBOURS = 12  # on each side, in each order
MOST_DIFFERENT_BITS = 9
MOST_PER_ROW = 8
SIDE = 32
"""Of a grey copy, whose pixels are hashed and compared: one of an image of 224 pixels is shifted by 7 of them."""
ROWS_AT_A_TIME = 1024
GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in JPEG


def grey_copies(images_NHWC: np.ndarray) -> np.ndarray:
    """Grey uint8 copies (N, h, w), of 32 x 32 pixels at most, larger images averaged."""
    num_rows, height, width, channels = images_NHWC.shape
    if height > SIDE or width > SIDE:
        columns_CW = np.kron(_averages(width), _grey_weights(channels)[None]).astype(np.float32)
        flat = images_NHWC.reshape(num_rows * height, width * channels).astype(np.float32)
        narrow = (flat @ columns_CW.T).reshape(num_rows, height, -1)
        return np.asarray(np.matmul(_averages(height), narrow).round(), np.uint8)
    if channels == 1:
        return np.ascontiguousarray(images_NHWC[..., 0])
    weights = (_grey_weights(channels) * 256).round().astype(np.uint16)
    total = sum(images_NHWC[..., n] * weight for n, weight in enumerate(weights))
    return np.asarray(total >> 8, np.uint8)


def _grey_weights(channels: int) -> np.ndarray:
    return GREY if channels == len(GREY) else np.full(channels, 1 / channels)


@cache
def _averages(length: int) -> np.ndarray:
    """Weights (shorter, length) that average neighbouring pixels.

    Each mean covers three times the extent of its pixel: an image that is shifted by half a pixel of the copy then still
    resembles the other one.
    """
    shorter = min(length, SIDE)
    middle = (np.arange(shorter)[:, None] + 0.5) * length / shorter
    reach = 1.5 * length / shorter
    right_ends = np.arange(1, length + 1)
    weights = (np.minimum(middle + reach, right_ends) - np.maximum(middle - reach, right_ends - 1)).clip(0)
    return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)


def hash_copies(grey_Nhw: np.ndarray, *, is_shifted: bool) -> np.ndarray:
    """The 64-bit hashes of `grey_copies`, (N, 1), or (N, 9) with those of the copy shifted by up to a pixel in each direction.

    The first one is that of the image as it is.
    """
    shifts = SHIFTS if is_shifted else SHIFTS[:1]
    num_rows, height, width = grey_Nhw.shape
    rows_Wh, columns_Ww = _basis(height, shifts), _basis(width, shifts)
    found = np.empty((num_rows, len(shifts) ** 2), np.uint64)
    for start in range(0, num_rows, ROWS_AT_A_TIME):
        part = grey_Nhw[start : start + ROWS_AT_A_TIME]
        flat = part.reshape(len(part) * height, width).astype(np.float32)
        waves = np.matmul(rows_Wh, (flat @ columns_Ww.T).reshape(len(part), height, -1))
        found[start : start + ROWS_AT_A_TIME] = _packed(waves, rows_Wh, columns_Ww)
    return found


def _packed(waves_NRC: np.ndarray, rows_WH: np.ndarray, columns_CW: np.ndarray) -> np.ndarray:
    """Hashes (N, shifts squared) of coefficients (N, shifts * 8, shifts * 8)."""
    num_shifts = len(rows_WH) // NUM_WAVES
    means_N = waves_NRC[:, 0, 0] / (rows_WH[0].sum() * columns_CW[0].sum())
    of_constant = np.outer(rows_WH.sum(1), columns_CW.sum(1))  # what a shift pushes out of the image counts as its mean
    signs = waves_NRC - means_N[:, None, None] * of_constant > 0
    signs[:, 0, 0] = False
    by_shift = signs.reshape(-1, num_shifts, NUM_WAVES, num_shifts, NUM_WAVES).transpose(0, 1, 3, 2, 4)
    bits = by_shift.reshape(-1, num_shifts**2, NUM_WAVES**2)[..., _bit_order()]
    packed = np.ascontiguousarray(np.packbits(bits, axis=-1))
    found: np.ndarray = packed.view(">u8")[..., 0].astype(np.uint64)
    return found


@cache
def _basis(length: int, shifts: tuple[int, ...]) -> np.ndarray:
    """The first cosines of a DCT over `length` pixels, at each shift: (shifts * 8, length)."""
    places = np.arange(length)[None] - np.array(shifts)[:, None]
    waves = np.cos(np.pi * (places[:, None] + 0.5) * np.arange(NUM_WAVES)[None, :, None] / length)
    taper = np.sin(np.pi * (places + 0.5) / length)  # what a shift moves across the border then matters little
    waves *= np.where((places >= 0) & (places < length), taper, 0)[:, None]
    return np.asarray(waves.reshape(-1, length), np.float32)


@cache
def _bit_order() -> np.ndarray:
    """Low frequencies first, dealt out to the bands, so that each has some that are stable and some that distinguish."""
    vertical, horizontal = np.divmod(np.arange(NUM_WAVES**2), NUM_WAVES)
    by_frequency = np.lexsort((vertical, vertical**2 + horizontal**2))
    return np.asarray(by_frequency.reshape(BITS_PER_BAND, NUM_BANDS).T.reshape(-1))


@cache
def _mirror_mask() -> int:
    """The bits that mirroring flips."""
    is_odd = _bit_order() % NUM_WAVES % 2 == 1
    return int(np.packbits(is_odd).view(">u8")[0])


@dataclass(frozen=True)
class Candidates:
    """Pairs that hashes propose: a row of one split, a row of another, and the view of the first one that resembles the second.

    Views 0 to 8 are the shifts of `hash_copies`; 9 to 17 the same ones, mirrored.
    """

    first_N: np.ndarray
    second_N: np.ndarray
    view_N: np.ndarray
    bits_N: np.ndarray

    def __len__(self) -> int:
        return len(self.first_N)

    def take(self, chosen: np.ndarray | slice) -> "Candidates":
        """Some of them."""
        return Candidates(self.first_N[chosen], self.second_N[chosen], self.view_N[chosen], self.bits_N[chosen])

    def best(self, *, most_per_row: int) -> "Candidates":
        """Each pair once, in the view with the fewest different bits, and the closest `most_per_row` of each first row."""
        order = np.lexsort((self.view_N, self.bits_N, self.second_N, self.first_N))
        of_pairs = self.take(order)
        is_new = np.ones(len(self), bool)
        is_new[1:] = (np.diff(of_pairs.first_N) != 0) | (np.diff(of_pairs.second_N) != 0)
        once = of_pairs.take(np.flatnonzero(is_new))
        once = once.take(np.lexsort((once.second_N, once.bits_N, once.first_N)))
        starts = np.searchsorted(once.first_N, once.first_N)
        return once.take(np.arange(len(once)) - starts < most_per_row)


def find_candidates(first_NV: np.ndarray, second_M: np.ndarray, *, is_mirrored: bool) -> Candidates:
    """Pairs of rows whose hashes differ in few bits.

    Args:
        first_NV: hashes of the rows of one split, in all views.
        second_M: hashes of the rows of the other.
        is_mirrored: whether mirrored images count as well.
    """
    if is_mirrored:
        first_NV = np.concatenate([first_NV, first_NV ^ np.uint64(_mirror_mask())], 1)
    found = [each for band in range(NUM_BANDS) for each in _find_by_band(first_NV, second_M, band)]
    return _joined(found).best(most_per_row=MOST_PER_ROW)


def _find_by_band(first_NV: np.ndarray, second_M: np.ndarray, band: int) -> Iterator[Candidates]:
    """The pairs that are neighbours where hashes are sorted from this band on."""
    rotated_M = _rotated(second_M, band)
    order_M = np.argsort(rotated_M, kind="stable")
    sorted_M = rotated_M[order_M]
    for start in range(0, len(first_NV), ROWS_AT_A_TIME):
        part_NV = _rotated(first_NV[start : start + ROWS_AT_A_TIME], band)
        places = np.searchsorted(sorted_M, part_NV)[..., None] + np.arange(-NUM_NEIGHBOURS, NUM_NEIGHBOURS)
        places = places.clip(0, len(sorted_M) - 1)
        bits = np.bitwise_count(sorted_M[places] ^ part_NV[..., None])
        row, view, neighbour = np.nonzero(bits <= MOST_DIFFERENT_BITS)
        second = order_M[places[row, view, neighbour]]
        found = Candidates(row + start, second, view, bits[row, view, neighbour])
        yield found.best(most_per_row=MOST_PER_ROW)


def _rotated(hashes: np.ndarray, band: int) -> np.ndarray:
    """The hashes with the bits of this band first."""
    first, rest = np.uint64(BITS_PER_BAND * band), np.uint64(64 - BITS_PER_BAND * band)
    return hashes if band == 0 else (hashes << first) | (hashes >> rest)


def _joined(parts: Sequence[Candidates]) -> Candidates:
    names = ("first_N", "second_N", "view_N", "bits_N")
    return Candidates(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
