"""Images made worse, in five ways and five strengths, to measure how the error grows.

In: uint8 images (N, H, W, C), and a seed for each. Out: the same, corrupted. Noise, blur, contrast and JPEG are those of
CIFAR-10-C, with its constants (Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019); shift is not in it. The package `imagecorruptions` refuses images smaller than 32 pixels, such as
MNIST's, cannot be seeded by row, and needs OpenCV, scikit-image and Numba; scipy and Pillow have all that these five need.

A corruption depends on the image, its seed and the strength alone, so it is the same in any batch, process and order.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from rcnn.data.pictures import as_picture

NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)
"""Standard deviation of Gaussian noise, as a share of white."""
BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)
"""Standard deviation of a Gaussian blur, pixels."""
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
"""What is left of the distance from each channel's mean."""
SHIFT = (1, 2, 3, 4, 5)
"""Pixels, in one of eight directions; what moves in is black."""
JPEG = (80, 65, 58, 50, 40)
"""Quality."""
DIRECTIONS = np.array([(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)])


def corrupted(name: str, strength: int, images_NHWC: np.ndarray, seeds_N: Sequence[int]) -> np.ndarray:
    """The images with one corruption.

    Args:
        name: a key of `CORRUPTIONS`.
        strength: 1 to `study_size.NUM_STRENGTHS`.
        images_NHWC: uint8 images; they are not modified.
        seeds_N: of each image. The same noise and the same direction at each strength.
    """
    return CORRUPTIONS[name](images_NHWC, seeds_N, strength - 1)


def _noise(images_NHWC: np.ndarray, seeds_N: Sequence[int], level: int) -> np.ndarray:
    shape = images_NHWC.shape[1:]
    noise_NHWC = np.stack([np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in seeds_N])
    return _as_pixels(images_NHWC + 255 * NOISE[level] * noise_NHWC)


def _blur(images_NHWC: np.ndarray, seeds_N: Sequence[int], level: int) -> np.ndarray:
    return _as_pixels(gaussian_filter(images_NHWC.astype(np.float32), (0, BLUR[level], BLUR[level], 0), mode="nearest"))


def _contrast(images_NHWC: np.ndarray, seeds_N: Sequence[int], level: int) -> np.ndarray:
    mean_N11C = images_NHWC.mean((1, 2), keepdims=True)
    return _as_pixels((images_NHWC - mean_N11C) * CONTRAST[level] + mean_N11C)


def _shift(images_NHWC: np.ndarray, seeds_N: Sequence[int], level: int) -> np.ndarray:
    moves_N2 = [SHIFT[level] * DIRECTIONS[np.random.default_rng(seed).integers(len(DIRECTIONS))] for seed in seeds_N]
    return np.stack([_moved(image, *move) for image, move in zip(images_NHWC, moves_N2, strict=True)])


def _moved(image_HWC: np.ndarray, down: int, right: int) -> np.ndarray:
    height, width = image_HWC.shape[:2]
    room = max(SHIFT)
    padded_HWC = np.pad(image_HWC, ((room, room), (room, room), (0, 0)))
    return padded_HWC[room - down : room - down + height, room - right : room - right + width]


def _jpeg(images_NHWC: np.ndarray, seeds_N: Sequence[int], level: int) -> np.ndarray:
    return np.stack([_recoded(image_HWC, JPEG[level]) for image_HWC in images_NHWC])


def _recoded(image_HWC: np.ndarray, quality: int) -> np.ndarray:
    packed = io.BytesIO()
    as_picture(image_HWC).save(packed, "JPEG", quality=quality)
    with Image.open(packed) as picture:
        return np.asarray(picture).reshape(image_HWC.shape)


def _as_pixels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


CORRUPTIONS: dict[str, Callable[[np.ndarray, Sequence[int], int], np.ndarray]] = {
    "noise": _noise, "blur": _blur, "contrast": _contrast, "shift": _shift, "JPEG": _jpeg,
}  # fmt: skip
