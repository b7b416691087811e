"""Label-preserving augmentation of training images, a batch at a time, on the device that holds the batch.

In and out: uint8 (N, C, H, W), preferably channels last in memory. Drawing is separate from applying: all random numbers are
drawn on the host, from a generator that the loader seeds, so that every device and any number of workers gets the same images.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

BLACK = 0


@dataclass(frozen=True)
class Draws:
    """The random numbers for N images: int64 offsets (N, 2), bool flips (N), int64 cutout centres (N, 2)."""

    offsets: np.ndarray
    flips: np.ndarray
    cutouts: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> "Draws":
        return Draws(self.offsets[rows], self.flips[rows], self.cutouts[rows])

    @staticmethod
    def joined(parts: "list[Draws]") -> "Draws":
        """The parts, concatenated."""
        return Draws(
            np.concatenate([part.offsets for part in parts]),
            np.concatenate([part.flips for part in parts]),
            np.concatenate([part.cutouts for part in parts]),
        )


@dataclass(frozen=True)
class Augmentation:
    """The augmentations that are applied to training images.

    Attributes:
        max_shift: pixels of black padding on each side, before a window is cropped at a random position.
        crop: side of the window in pixels (24 in the paper); 0: the image size.
        flip: mirror left to right with probability 1/2.
        alternate_flips: an image is mirrored in exactly one of two epochs, 0 and 1, 2 and 3, and so on (Jordan 2024, "94% on
            CIFAR-10 in 3.29 seconds on a single GPU").
        cutout: side in pixels of a black square with its centre anywhere in the image; 0: none. DeVries and Taylor (2017) fill
            it with the mean instead of black.
    """

    max_shift: int = 0
    crop: int = 0
    flip: bool = False
    alternate_flips: bool = False
    cutout: int = 0

    def window(self, image_shape: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the augmented images, for images of (H, W)."""
        height, width = image_shape
        return (min(self.crop, height), min(self.crop, width)) if self.crop else (height, width)

    def draw(self, rng: np.random.Generator, num_images: int, image_shape: tuple[int, int]) -> Draws:
        """Draws the random numbers for `num_images` images of (H, W)."""
        height, width = self.window(image_shape)
        room = (image_shape[0] + 2 * self.max_shift - height, image_shape[1] + 2 * self.max_shift - width)
        offsets = rng.integers(0, np.array(room) + 1, (num_images, 2))
        flips = rng.random(num_images) < 0.5 if self.flip else np.zeros(num_images, bool)
        cutouts = (
            rng.integers(0, (height, width), (num_images, 2)) if self.cutout else np.zeros((num_images, 2), np.int64)
        )
        return Draws(offsets, flips, cutouts)

    def alternated(self, draws: Draws, rows_N: np.ndarray, *, seed: int, epoch: int) -> Draws:
        """The draws with flips that follow from each image's row, if they are to alternate.

        Args:
            draws: of N images.
            rows_N: a number for each of these images, the same one in every epoch.
            seed: of the run.
            epoch: from 0.
        """
        return replace(draws, flips=alternate_flips(rows_N, seed, epoch)) if self.alternate_flips else draws

    def apply(self, images_NCHW: Tensor, draws: Draws) -> Tensor:
        """The augmented images. The input is not modified."""
        height, width = images_NCHW.shape[2:]
        window = self.window((height, width))
        if self.max_shift or window != (height, width):
            images_NCHW = cut_windows(images_NCHW, draws.offsets, window, max_shift=self.max_shift)
        elif self.flip or self.cutout:
            images_NCHW = images_NCHW.clone()
        if self.flip:
            flip_some(images_NCHW, draws.flips)
        if self.cutout:
            cut_out(images_NCHW, draws.cutouts, self.cutout)
        return images_NCHW


def alternate_flips(rows_N: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """bool (N): of epochs 2n and 2n + 1, a row is true in exactly one, which a hash of (seed, n, row) decides."""
    key = np.random.default_rng((seed, epoch // 2)).integers(2**64, dtype=np.uint64)
    mixed_N = rows_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finalizer of SplitMix64
        mixed_N = (mixed_N ^ (mixed_N >> np.uint64(shift))) * np.uint64(factor)
    is_first_N = (mixed_N >> np.uint64(63)).astype(bool)
    return is_first_N if epoch % 2 == 0 else ~is_first_N


def cut_windows(images_NCHW: Tensor, offsets_N2: np.ndarray, window: tuple[int, int], *, max_shift: int) -> Tensor:
    """Cuts a window (H, W) out of each image, after padding it with `max_shift` black pixels on each side.

    Args:
        images_NCHW: the images.
        offsets_N2: the window's upper left corner in the padded image; (`max_shift`, `max_shift`) does not shift the image.
        window: (H, W) of the result.
        max_shift: pixels of padding.
    """
    padded_NCHW = functional.pad(images_NCHW, (max_shift,) * 4) if max_shift else images_NCHW
    padded_NHWC = padded_NCHW.permute(0, 2, 3, 1)
    if padded_NHWC.device.type == "cpu":
        return torch.from_numpy(_windows_by_copy(padded_NHWC.contiguous().numpy(), offsets_N2, window)).permute(
            0, 3, 1, 2
        )
    return _windows_by_index(
        padded_NHWC, torch.from_numpy(offsets_N2).to(padded_NHWC.device, non_blocking=True), window
    )


def _windows_by_copy(padded_NHWC: np.ndarray, offsets_N2: np.ndarray, window: tuple[int, int]) -> np.ndarray:
    """On the CPU: every possible window is a strided view, and numpy copies one per image, row by row. This is 10 times as
    fast as indexing pixel by pixel."""
    num_images, height, width, channels = padded_NHWC.shape
    image, row, column, _ = padded_NHWC.strides
    windows = np.lib.stride_tricks.as_strided(
        padded_NHWC,
        (num_images, height - window[0] + 1, width - window[1] + 1, window[0], window[1] * channels),
        (image, row, column, row, 1),
        writeable=False,
    )
    cut = windows[np.arange(num_images), offsets_N2[:, 0], offsets_N2[:, 1]]
    return np.asarray(cut).reshape(num_images, *window, channels)


def _windows_by_index(padded_NHWC: Tensor, offsets_N2: Tensor, window: tuple[int, int]) -> Tensor:
    """On a GPU: indexes pixel by pixel, which a GPU does in parallel."""
    device = padded_NHWC.device
    rows_NH = offsets_N2[:, :1] + torch.arange(window[0], device=device)
    columns_NW = offsets_N2[:, 1:] + torch.arange(window[1], device=device)
    image_N = torch.arange(len(padded_NHWC), device=device)
    return padded_NHWC[image_N[:, None, None], rows_NH[:, :, None], columns_NW[:, None, :]].permute(0, 3, 1, 2)


def flip_some(images_NCHW: Tensor, flips_N: np.ndarray) -> None:
    """Mirrors the images where `flips_N` is true, left to right, in place."""
    chosen = np.flatnonzero(flips_N)
    if images_NCHW.device.type == "cpu":  # numpy copies whole images, torch a byte at a time
        images_NHWC = images_NCHW.permute(0, 2, 3, 1).numpy()
        mirrored_NCHW = torch.from_numpy(images_NHWC[chosen]).permute(0, 3, 1, 2).flip(3)
        images_NHWC[chosen] = mirrored_NCHW.permute(0, 2, 3, 1).numpy()
    else:
        index = torch.from_numpy(chosen).to(images_NCHW.device, non_blocking=True)
        images_NCHW[index] = images_NCHW[index].flip(3)


def cut_out(images_NCHW: Tensor, centres_N2: np.ndarray, side: int) -> None:
    """Fills a square of each image with black, in place; the square is clipped at the border."""
    height, width = images_NCHW.shape[2:]
    device = images_NCHW.device
    first_N2 = torch.from_numpy(centres_N2 - side // 2).to(device, non_blocking=True)
    rows_NH = torch.arange(height, device=device) - first_N2[:, :1]
    columns_NW = torch.arange(width, device=device) - first_N2[:, 1:]
    is_cut_NHW = ((rows_NH >= 0) & (rows_NH < side))[:, :, None] & ((columns_NW >= 0) & (columns_NW < side))[:, None, :]
    images_NCHW.masked_fill_(is_cut_NHW[:, None], BLACK)
