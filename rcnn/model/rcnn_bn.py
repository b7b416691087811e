"""The RCNN with batch normalisation in place of LRN: one per time step, T + 1 in each recurrent layer.

Not in the paper. Public re-implementations that reach the paper's errors use it (7.29 % is reported for K = 96 on augmented
CIFAR-10), in this order: convolution, ReLU, batch norm. They also have a 3x3 first layer and no biases; here everything except
the normalisation follows the paper. It adds 2K parameters per normalisation, 2K(4(T + 1) + 1) in all: 675,466 parameters for
K = 96 and T = 3 on CIFAR-10, a count that follows from the layout and is not published.

Each data-parallel worker normalises with the statistics of its own share of the batch, so results depend on the number of
workers. Averaged weights (`ema_decay`) are used with the running statistics of the latest weights.
"""

from torch import nn

from rcnn.model.norms import batch_norms
from rcnn.model.rcnn import RCNN


def build(image_shape: tuple[int, int, int], num_classes: int, *, k: int, t: int, dropout: float) -> nn.Module:
    """RCNN-K with T recurrent steps and batch normalisation."""
    return RCNN(k, t, image_shape[2], num_classes, dropout=dropout, norms=batch_norms)
