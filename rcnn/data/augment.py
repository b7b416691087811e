"""Changes of training images that keep their label, whole batches at a time, on whatever device they lie.

In and out: uint8 (N, C, H, W).
"""

import torch
from torch import Tensor
from torch.nn import functional


def shift(images_NCHW: Tensor, offsets_N2: Tensor, *, max_shift: int) -> Tensor:
    """Moves each image; what moves in is 0 (black).

    Args:
        images_NCHW: the images.
        offsets_N2: int64, how far down and right the window moves that cuts each image out of its padded form, 0 to
            twice `max_shift`; `max_shift` leaves the image where it is.
        max_shift: the largest shift, pixels.
    """
    num_images, _, height, width = images_NCHW.shape
    device = images_NCHW.device
    padded = functional.pad(images_NCHW, (max_shift,) * 4)
    rows_NH = offsets_N2[:, :1] + torch.arange(height, device=device)
    columns_NW = offsets_N2[:, 1:] + torch.arange(width, device=device)
    image_N = torch.arange(num_images, device=device)
    # Advanced indices around a slice come out in front: (N, H, W, C), so the result is channels last in memory.
    shifted_NHWC = padded[image_N[:, None, None], :, rows_NH[:, :, None], columns_NW[:, None, :]]
    return shifted_NHWC.permute(0, 3, 1, 2)
