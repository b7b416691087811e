"""The model that is trained, stored and served: raw pixels in, logits out.

The per-pixel mean is part of the model, so a served model always uses the mean that it was trained with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MeanRemoval(nn.Module):
    """Subtracts the per-pixel mean (paper section 4) and divides by a standard deviation per channel.

    Args:
        mean_HWC: mean of each pixel over the training images, 0 to 255, flattened in (H, W, C) order.
        std_C: the divisor of each channel.
        image_shape: (H, W, C).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean_HWC: Sequence[float], std_C: Sequence[float], image_shape: tuple[int, int, int]):
        super().__init__()
        mean = torch.tensor(mean_HWC, dtype=torch.float32).reshape(image_shape).permute(2, 0, 1)
        self.register_buffer("mean", mean.contiguous())
        self.register_buffer("std", torch.tensor(std_C, dtype=torch.float32).clamp(min=1e-6)[:, None, None])

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 (N, C, H, W); from smaller images, the centre of the mean is subtracted."""
        height, width = images_NCHW.shape[2:]
        return (images_NCHW - centre(self.mean, height, width)) / self.std


class Classifier(nn.Module):
    """Normalisation followed by a network: uint8 images (N, C, H, W) in, logits (N, classes) out.

    Args:
        normalise: applied to the images before the network.
        network: a network of the table, or any module from images (N, C, H, W) to logits.
        crop: side, in pixels, of the central window that the network sees; 0: the full image.
    """

    def __init__(self, normalise: MeanRemoval, network: nn.Module, *, crop: int = 0):
        super().__init__()
        self.normalise = normalise
        self.network = network
        self.crop = crop

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> logits (N, classes)."""
        if self.crop:
            images_NCHW = centre(images_NCHW, self.crop, self.crop)
        return self.network(self.normalise(images_NCHW))  # type: ignore[no-any-return]


def centre(images_CHW: Tensor, height: int, width: int) -> Tensor:
    """The central window of images (..., H, W); where centring leaves an odd pixel, the window is nearer the upper left."""
    top, left = (images_CHW.shape[-2] - height) // 2, (images_CHW.shape[-1] - width) // 2
    return images_CHW[..., top : top + height, left : left + width]
