"""Several networks that answer as one, by the mean of their probabilities: images (N, C, H, W) in, logits (N, classes) out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Networks of one kind, for instance from trainings with several seeds.

    Args:
        members: networks from images (N, C, H, W) to logits (N, classes).

    The output is the logarithm of the mean probability, so that its softmax is that mean.
    """

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, classes)."""
        logits_MNC = torch.stack([member(images_NCHW) for member in self.members])
        return logits_MNC.float().log_softmax(2).logsumexp(0) - math.log(len(self.members))
