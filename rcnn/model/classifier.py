"""What is trained, stored and served: raw pixels in, logits out.

The per-pixel mean is a part of the model, so a served model cannot be given the wrong one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rcnn.model.rcnn import RCNN


class MeanRemoval(nn.Module):
    """Subtracts the mean of each pixel (paper section 4) and divides by one standard deviation.

    Args:
        mean_HWC: mean of each pixel over the training images, 0 to 255, flat in (H, W, C) order.
        std: standard deviation of all pixels about that mean.
        image_shape: (H, W, C).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean_HWC: Sequence[float], std: float, image_shape: tuple[int, int, int]):
        super().__init__()
        mean = torch.tensor(mean_HWC, dtype=torch.float32).reshape(image_shape).permute(2, 0, 1)
        self.register_buffer("mean", mean.contiguous())
        self.register_buffer("std", torch.tensor(max(std, 1e-6), dtype=torch.float32))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 (N, C, H, W)."""
        return (images_NCHW - self.mean) / self.std


class Classifier(nn.Module):
    """An RCNN behind its own normalisation: uint8 images (N, C, H, W) in, logits (N, classes) out."""

    def __init__(self, normalise: MeanRemoval, network: RCNN):
        super().__init__()
        self.normalise = normalise
        self.network = network

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> logits (N, classes)."""
        return self.network(self.normalise(images_NCHW))
