"""Views: copies of each image, whose probabilities are averaged at test time.

In: uint8 images (N, C, H, W), and the name of a set of views. Out: one batch of images for each view, for the model as it is.
The first view of every set but the crops is the image itself.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rcnn.data.augment import cut_windows

SHIFT_PIXELS = 2
"""Of shifted views; what moves in is black, as in training (`augment.max_shift`)."""


def views_of(name: str, images_NCHW: Tensor, *, crop: int) -> Iterator[Tensor]:
    """The views of a batch.

    Args:
        name: a key of `study_size.NUM_VIEWS`. `mirrored`: the image and its mirror image; `shifted`: by -2, 0 and 2 pixels in
            each direction; `crops`: nine windows, three by three, from corner to corner, as many as in the paper;
            `mirrored_crops`: these and their mirror images.
        images_NCHW: uint8 images.
        crop: the model's window (`model.crop`), for crops.
    """
    if name == "mirrored":
        yield from (images_NCHW, images_NCHW.flip(3))
    elif name == "shifted":
        yield from _shifted(images_NCHW)
    elif name == "crops":
        yield from _crops(images_NCHW, crop)
    else:
        assert name == "mirrored_crops", f"there are no views {name}"
        for window_NCHW in _crops(images_NCHW, crop):
            yield from (window_NCHW, window_NCHW.flip(3))


def _shifted(images_NCHW: Tensor) -> Iterator[Tensor]:
    num_images, _, height, width = images_NCHW.shape
    yield images_NCHW
    for corner in [(row, column) for row in (0, 1, 2) for column in (0, 1, 2) if (row, column) != (1, 1)]:
        offsets_N2 = np.tile(np.array(corner) * SHIFT_PIXELS, (num_images, 1))
        yield cut_windows(images_NCHW, offsets_N2, (height, width), max_shift=SHIFT_PIXELS)


def _crops(images_NCHW: Tensor, crop: int) -> Iterator[Tensor]:
    """Windows at the corners, at the middles of the sides, and at the centre."""
    height, width = images_NCHW.shape[2:]
    for top in _thirds(height - crop):
        for left in _thirds(width - crop):
            yield images_NCHW[:, :, top : top + crop, left : left + crop]


def _thirds(room: int) -> tuple[int, int, int]:
    return 0, room // 2, room


def mean_probabilities(logits: Iterator[Tensor]) -> Tensor:
    """The mean over views of the probabilities (N, classes), float64; from the logits of each view."""
    return torch.stack([each.double().softmax(1) for each in logits]).mean(0)
