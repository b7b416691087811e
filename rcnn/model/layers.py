"""The recurrent convolutional layer (RCL), the paper's central idea.

In: the layer's static input u (N, C, H, W). Out: the state x(T) (N, K, H, W) after T recurrent steps.

    z(t) = w_f * u + w_r * x(t-1) + b        x(t) = g(relu(z(t)))        paper section 3.1, equations (1) to (3)
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rcnn.model.norms import Norms, local_response_norms


class RecurrentConvLayer(nn.Module):
    """A 3x3 feed-forward and a 3x3 recurrent kernel with one bias per map, all shared over the time steps.

    Args:
        in_maps: C, feature maps of the input.
        num_maps: K, feature maps of the state.
        num_steps: T, recurrent steps after the feed-forward step; with 0, the layer is convolution + ReLU + g, without a
            recurrent kernel.
        norms: g, the normalisation of each of the T + 1 time steps; see `norms.py`.
        recompute: activation checkpointing: the backward pass recomputes each step's activations from the previous state
            instead of storing them. Not for batch normalisation, whose statistics would count each batch twice.
    """

    RECURRENT_GAIN = 0.25
    """Standard deviation of the recurrent kernel's initial weights, as a fraction of He's. Every step adds to the static
    input: with 0.5, training at a learning rate above 0.01 collapsed."""

    def __init__(
        self,
        in_maps: int,
        num_maps: int,
        num_steps: int,
        *,
        norms: Norms = local_response_norms,
        recompute: bool = False,
    ):
        super().__init__()
        self.num_steps, self.recompute = num_steps, recompute
        self.feed_forward = nn.Conv2d(in_maps, num_maps, kernel_size=3, padding=1)
        # An unused kernel would count as parameters, and DDP would wait for a gradient that never arrives.
        self.recurrent = nn.Conv2d(num_maps, num_maps, kernel_size=3, padding=1, bias=False) if num_steps else None
        self.norms = nn.ModuleList(norms(num_maps, num_steps + 1))
        self._initialise()

    def _initialise(self) -> None:
        # The paper does not state its initialisation.
        nn.init.kaiming_normal_(self.feed_forward.weight, nonlinearity="relu")
        nn.init.zeros_(self.feed_forward.bias)  # type: ignore[arg-type]
        if self.recurrent is not None:
            nn.init.kaiming_normal_(self.recurrent.weight, nonlinearity="relu")
            with torch.no_grad():
                self.recurrent.weight.mul_(self.RECURRENT_GAIN)

    def forward(self, u_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H, W)."""
        first, *later = self.norms
        z0_NKHW = self.feed_forward(u_NCHW)
        x_NKHW = first.rectified(z0_NKHW)
        plus_NKHW = self._static_input(z0_NKHW)
        for norm in later:
            if self.recompute and torch.is_grad_enabled():
                x_NKHW = checkpoint(self._step, norm, x_NKHW, plus_NKHW, use_reentrant=False, preserve_rng_state=False)
            else:
                x_NKHW = self._step(norm, x_NKHW, plus_NKHW)
        return x_NKHW

    def _static_input(self, z0_NKHW: Tensor) -> Tensor:
        """The term that each recurrent step adds to w_r * x(t-1): w_f * u + b, constant over t and so computed once."""
        return z0_NKHW

    def _step(self, norm: nn.Module, x_NKHW: Tensor, plus_NKHW: Tensor) -> Tensor:
        assert self.recurrent is not None, "a layer with num_steps = 0 has no recurrent kernel"
        return norm.rectified(self.recurrent(x_NKHW), plus_NKHW)
