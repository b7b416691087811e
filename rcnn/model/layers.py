"""The recurrent convolutional layer (RCL), the paper's idea.

In: the layer's static input u (N, C, H, W). Out: the state x(T) (N, K, H, W) after T recurrent steps.

    z(t) = w_f * u + w_r * x(t-1) + b        x(t) = g(relu(z(t)))        paper section 3.1, equations (1) to (3)
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rcnn.model.lrn import LocalResponseNorm


def lrn_window(num_maps: int) -> int:
    """N, the feature maps in a normalisation sum: K / 8 + 1 (paper section 4.1)."""
    return num_maps // 8 + 1


class RecurrentConvLayer(nn.Module):
    """3x3 feed-forward and 3x3 recurrent kernels with one bias per map, all shared over the time steps.

    Args:
        in_maps: C, maps of the input.
        num_maps: K, maps of the state.
        num_steps: T, recurrent steps after the feed-forward one; 0 makes it a convolution + ReLU + LRN, without a
            recurrent kernel.
        lrn_alpha, lrn_beta: constants of the local response normalisation.
        recompute: trades time for memory: the backward pass computes each step's activations once more, from the state
            before it, instead of keeping them.
        triton: whether a kernel of our own normalises on GPUs.
    """

    def __init__(
        self,
        in_maps: int,
        num_maps: int,
        num_steps: int,
        *,
        lrn_alpha: float = 0.001,
        lrn_beta: float = 0.75,
        recompute: bool = False,
        triton: bool = False,
    ):
        super().__init__()
        self.num_steps, self.recompute = num_steps, recompute
        self.feed_forward = nn.Conv2d(in_maps, num_maps, kernel_size=3, padding=1)
        # An unused kernel would count as a parameter and make DDP wait for a gradient that never comes.
        self.recurrent = nn.Conv2d(num_maps, num_maps, kernel_size=3, padding=1, bias=False) if num_steps else None
        self.norm = LocalResponseNorm(
            num_maps, window=lrn_window(num_maps), alpha=lrn_alpha, beta=lrn_beta, triton=triton
        )
        self._initialise()

    def _initialise(self) -> None:
        # The paper does not say how. He's rule for the feed-forward kernel; a quarter of its deviation for the recurrent
        # one, whose contributions add up over the steps: at a half, training with a rate above 0.01 collapsed.
        nn.init.kaiming_normal_(self.feed_forward.weight, nonlinearity="relu")
        nn.init.zeros_(self.feed_forward.bias)  # type: ignore[arg-type]
        if self.recurrent is not None:
            nn.init.kaiming_normal_(self.recurrent.weight, nonlinearity="relu")
            with torch.no_grad():
                self.recurrent.weight.mul_(0.25)

    def forward(self, u_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H, W)."""
        z0_NKHW = self.feed_forward(u_NCHW)  # w_f * u + b is the same at every step: computed once
        x_NKHW = self.norm.rectified(z0_NKHW)
        for _ in range(self.num_steps):
            if self.recompute and torch.is_grad_enabled():
                x_NKHW = checkpoint(self._step, x_NKHW, z0_NKHW, use_reentrant=False, preserve_rng_state=False)
            else:
                x_NKHW = self._step(x_NKHW, z0_NKHW)
        return x_NKHW

    def _step(self, x_NKHW: Tensor, z0_NKHW: Tensor) -> Tensor:
        assert self.recurrent is not None, "a layer without recurrent steps takes none"
        return self.norm.rectified(self.recurrent(x_NKHW), z0_NKHW)
