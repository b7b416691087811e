"""Changes of training images that keep their label, whole batches at a time, on whatever device they lie.

In and out: uint8 (N, C, H, W).
"""

import torch
from torch import Tensor
from torch.nn import functional


def random_shift(images_NCHW: Tensor, *, max_shift: int) -> Tensor:
    """Moves each image by up to `max_shift` pixels each way, drawn uniformly; what moves in is 0 (black)."""
    num_images, _, height, width = images_NCHW.shape
    device = images_NCHW.device
    padded = functional.pad(images_NCHW, (max_shift,) * 4)
    offsets_N2 = torch.randint(0, 2 * max_shift + 1, (num_images, 2), device=device)
    rows_NH = offsets_N2[:, :1] + torch.arange(height, device=device)
    columns_NW = offsets_N2[:, 1:] + torch.arange(width, device=device)
    image_N = torch.arange(num_images, device=device)
    # Advanced indices around a slice come out in front: (N, H, W, C), so the result is channels last in memory.
    shifted_NHWC = padded[image_N[:, None, None], :, rows_NH[:, :, None], columns_NW[:, None, :]]
    return shifted_NHWC.permute(0, 3, 1, 2)
