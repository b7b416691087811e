"""Changes of training images that keep their label, whole batches at a time, on whatever device they lie.

In and out: uint8 (N, C, H, W), best channels last in memory. Drawing and doing are apart: all is drawn on the host,
by a generator that the loader seeds, so that any device and any number of ranks gets the same images.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

BLACK = 0


@dataclass(frozen=True)
class Draws:
    """What happens to each of N images: int64 offsets (N, 2), bool flips (N), int64 cutout centres (N, 2)."""

    offsets: np.ndarray
    flips: np.ndarray
    cutouts: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> "Draws":
        return Draws(self.offsets[rows], self.flips[rows], self.cutouts[rows])

    @staticmethod
    def joined(parts: "list[Draws]") -> "Draws":
        """One after the other."""
        return Draws(
            np.concatenate([part.offsets for part in parts]),
            np.concatenate([part.flips for part in parts]),
            np.concatenate([part.cutouts for part in parts]),
        )


@dataclass(frozen=True)
class Augmentation:
    """What may happen to training images.

    Attributes:
        max_shift: black pixels put around an image before a window is cut out of it at random ("pad and crop").
        crop: side of the window, pixels (24 in the paper); 0: as large as the image.
        flip: mirrors left to right with probability 1/2.
        cutout: side of a square that is blackened, its centre anywhere in the image (as DeVries and Taylor, 2017, but
            for the colour: theirs is the mean); 0: none.
    """

    max_shift: int = 0
    crop: int = 0
    flip: bool = False
    cutout: int = 0

    def window(self, image_shape: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of what comes out for images of (H, W)."""
        height, width = image_shape
        return (min(self.crop, height), min(self.crop, width)) if self.crop else (height, width)

    def draw(self, rng: np.random.Generator, count: int, image_shape: tuple[int, int]) -> Draws:
        """What happens to `count` images of (H, W), in the generator's next numbers."""
        height, width = self.window(image_shape)
        room = (image_shape[0] + 2 * self.max_shift - height, image_shape[1] + 2 * self.max_shift - width)
        offsets = rng.integers(0, np.array(room) + 1, (count, 2))
        flips = rng.random(count) < 0.5 if self.flip else np.zeros(count, bool)
        cutouts = rng.integers(0, (height, width), (count, 2)) if self.cutout else np.zeros((count, 2), np.int64)
        return Draws(offsets, flips, cutouts)

    def apply(self, images_NCHW: Tensor, draws: Draws) -> Tensor:
        """The images after what was drawn for each. The given ones stay as they are."""
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


def cut_windows(images_NCHW: Tensor, offsets_N2: np.ndarray, window: tuple[int, int], *, max_shift: int) -> Tensor:
    """Cuts a window (H, W) out of each image, padded with `max_shift` black pixels on each side.

    Args:
        images_NCHW: the images.
        offsets_N2: the window's upper left corner in the padded image; `max_shift` leaves the image where it is.
        window: (H, W) of what comes out.
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
    """On the CPU: every possible window is a view, of which numpy copies one an image, row by row. That is 10 times as
    fast as picking pixel by pixel."""
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
    """On a GPU, where picking pixel by pixel is what the device does best."""
    device = padded_NHWC.device
    rows_NH = offsets_N2[:, :1] + torch.arange(window[0], device=device)
    columns_NW = offsets_N2[:, 1:] + torch.arange(window[1], device=device)
    image_N = torch.arange(len(padded_NHWC), device=device)
    return padded_NHWC[image_N[:, None, None], rows_NH[:, :, None], columns_NW[:, None, :]].permute(0, 3, 1, 2)


def flip_some(images_NCHW: Tensor, flips_N: np.ndarray) -> None:
    """Mirrors the chosen images, left to right, in place."""
    chosen = np.flatnonzero(flips_N)
    if images_NCHW.device.type == "cpu":  # numpy picks whole images, torch a byte at a time
        images_NHWC = images_NCHW.permute(0, 2, 3, 1).numpy()
        mirrored_NCHW = torch.from_numpy(images_NHWC[chosen]).permute(0, 3, 1, 2).flip(3)
        images_NHWC[chosen] = mirrored_NCHW.permute(0, 2, 3, 1).numpy()
    else:
        index = torch.from_numpy(chosen).to(images_NCHW.device, non_blocking=True)
        images_NCHW[index] = images_NCHW[index].flip(3)


def cut_out(images_NCHW: Tensor, centres_N2: np.ndarray, side: int) -> None:
    """Blackens a square of each image, in place; at the border a part of it."""
    height, width = images_NCHW.shape[2:]
    device = images_NCHW.device
    first_N2 = torch.from_numpy(centres_N2 - side // 2).to(device, non_blocking=True)
    rows_NH = torch.arange(height, device=device) - first_N2[:, :1]
    columns_NW = torch.arange(width, device=device) - first_N2[:, 1:]
    is_cut_NHW = ((rows_NH >= 0) & (rows_NH < side))[:, :, None] & ((columns_NW >= 0) & (columns_NW < side))[:, None, :]
    images_NCHW.masked_fill_(is_cut_NHW[:, None], BLACK)
