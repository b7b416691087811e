"""The RCNN with batch normalisation in place of LRN: one per time step, T + 1 in each recurrent layer.

Not the paper's. Public re-implementations that reach the paper's errors normalise so (7.29 % for K = 96 on augmented
CIFAR-10 is reported), in this order: convolution, ReLU, batch norm. They also have a 3x3 first layer and no biases; here
all but the normalisation is the paper's. It adds 2K parameters per normalisation, 2K(4(T + 1) + 1) in all: 675,466 for K = 96
and T = 3 on CIFAR-10, which follows from the layout and is published nowhere.

Each data-parallel worker normalises its own share of a batch, so results depend on the number of workers. Smoothed weights
(`ema_decay`) come with the running statistics of the latest ones.
"""

from torch import nn

from rcnn.model.norms import batch_norms
from rcnn.model.rcnn import RCNN


def build(image_shape: tuple[int, int, int], num_classes: int, *, k: int, t: int, dropout: float) -> nn.Module:
    """RCNN-K with T recurrent steps and batch normalisation."""
    return RCNN(k, t, image_shape[2], num_classes, dropout=dropout, norms=batch_norms)
