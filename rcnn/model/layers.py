"""The recurrent convolutional layer (RCL), the paper's central idea.

In: the layer's static input u (N, C, H, W). Out: the state x(T) (N, K, H, W) after T recurrent steps.

    z(t) = w_f * u + w_r * x(t-1) + b        x(t) = g(relu(z(t)))        paper section 3.1, equations (1) to (3)
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rcnn.model import lrn_cpu, rcl_cpu
from rcnn.model.dropout import Dropout
from rcnn.model.lrn import LocalResponseNorm
from rcnn.model.norms import Norms, local_response_norms

Convolution = Literal["auto", "direct", "winograd"]


class RecurrentConvLayer(nn.Module):
    """A 3x3 feed-forward and a 3x3 recurrent kernel with one bias per map, all shared over the time steps.

    Args:
        in_maps: C, feature maps of the input.
        num_maps: K, feature maps of the state.
        num_steps: T, recurrent steps after the feed-forward step; with 0, the layer is convolution + ReLU + g, without a
            recurrent kernel.
        norms: g, the normalisation of each of the T + 1 time steps; see `norms.py`.
        dropout: rate of the dropout after the last time step.
        convolution: "winograd": the compiled layer of `rcl_cpu.py` wherever it applies: on a CPU with a compiler, in float32
            or float64, with the paper's LRN and as many maps of the input as of the state, a multiple of 8. "direct": torch's
            convolutions. "auto": the compiled layer where it is also faster.
        recompute: activation checkpointing: the backward pass recomputes each step's activations from the previous state
            instead of storing them. Not for batch normalisation, whose statistics would count each batch twice.
    """

    ADDS_INPUT = True
    """Whether each recurrent step adds the static input w_f * u + b, or only b."""

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
        dropout: float = 0.0,
        convolution: Convolution = "auto",
        recompute: bool = False,
    ):
        super().__init__()
        self.num_steps, self.convolution, self.recompute = num_steps, convolution, recompute
        self.active_steps = num_steps
        self.feed_forward = nn.Conv2d(in_maps, num_maps, kernel_size=3, padding=1)
        # An unused kernel would count as parameters, and DDP would wait for a gradient that never arrives.
        self.recurrent = nn.Conv2d(num_maps, num_maps, kernel_size=3, padding=1, bias=False) if num_steps else None
        self.norms = nn.ModuleList(norms(num_maps, num_steps + 1))
        self.dropout = Dropout(dropout)
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
        """(N, C, H, W) -> (N, K, H, W), after `active_steps` recurrent steps: T unless `set_active_steps` says otherwise."""
        x_NKHW = self._compiled(u_NCHW) if self._is_compiled(u_NCHW) else self._by_modules(u_NCHW)
        if self.recurrent is not None and not self.active_steps and torch.is_grad_enabled():
            # A gradient of zeros, since DDP and the shares of a batch wait for one of every parameter.
            x_NKHW = x_NKHW + 0 * self.recurrent.weight.sum()
        return x_NKHW

    def _by_modules(self, u_NCHW: Tensor) -> Tensor:
        first, *later = self.norms
        z0_NKHW = self.feed_forward(u_NCHW)
        x_NKHW = first.rectified(z0_NKHW)
        plus_NKHW = self._static_input(z0_NKHW)
        for norm in later[: self.active_steps]:
            if self.recompute and torch.is_grad_enabled():
                x_NKHW = checkpoint(self._step, norm, x_NKHW, plus_NKHW, use_reentrant=False, preserve_rng_state=False)
            else:
                x_NKHW = self._step(norm, x_NKHW, plus_NKHW)
        return self.dropout(x_NKHW)

    def _is_compiled(self, u_NCHW: Tensor) -> bool:
        """Whether the compiled layer is to compute this input."""
        if self.convolution == "direct" or not rcl_cpu.can_compute(u_NCHW, self.feed_forward.weight):
            return False
        if self.feed_forward._forward_hooks:  # as of `count_multiply_adds`: only the modules call them
            return False
        if self.convolution == "auto" and not rcl_cpu.pays(*u_NCHW.shape[2:]):
            return False
        norm = self.norms[0]
        is_papers = isinstance(norm, LocalResponseNorm) and norm.beta == lrn_cpu.EXPONENT
        return is_papers and rcl_cpu.kernel(norm.num_maps, norm.window, self.feed_forward.weight.dtype) is not None

    def _compiled(self, u_NCHW: Tensor) -> Tensor:
        norm = self.norms[0]
        drops = self.dropout.is_active
        step = rcl_cpu.Step(
            num_steps=self.active_steps,
            window=norm.window,
            scale=norm.alpha / norm.window,
            adds_input=self.ADDS_INPUT,
            recompute=self.recompute,
            name=self.dropout.next_name() if drops else (0, 0, 0, 0),
            rate=self.dropout.rate_in_65536ths if drops else 0,
        )
        recurrent = self.recurrent.weight if self.recurrent is not None and self.active_steps else None
        feed = self.feed_forward
        return rcl_cpu.CompiledLayer.apply(u_NCHW, feed.weight, feed.bias, recurrent, step)

    def _static_input(self, z0_NKHW: Tensor) -> Tensor:
        """The term that each recurrent step adds to w_r * x(t-1), constant over t."""
        if self.ADDS_INPUT:
            return z0_NKHW
        bias_K = self.feed_forward.bias
        assert bias_K is not None, "the feed-forward kernel has a bias"
        return bias_K.to(z0_NKHW.dtype)[None, :, None, None].expand_as(z0_NKHW)

    def _step(self, norm: nn.Module, x_NKHW: Tensor, plus_NKHW: Tensor) -> Tensor:
        assert self.recurrent is not None, "a layer with num_steps = 0 has no recurrent kernel"
        return norm.rectified(self.recurrent(x_NKHW), plus_NKHW)


def set_active_steps(model: nn.Module, num_steps: int) -> None:
    """Ends the recurrent layers of a model after `num_steps` steps, or after T where that is less, from the next pass on."""
    for layer in model.modules():
        if isinstance(layer, RecurrentConvLayer):
            layer.active_steps = min(layer.num_steps, num_steps)
