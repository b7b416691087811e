"""The optimizers, SGD with momentum and Muon, and the two learning-rate schedules."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from rcnn.config import TrainConfig


class SGD(torch.optim.SGD):
    """`torch.optim.SGD` without importing torch's compiler at the first step, which takes 7 s per process.

    Torch imports it only to exclude `step` and four other methods from compilation. This class has the same methods without
    that wrapper; `step` keeps `no_grad`, the only other thing that its wrapper does. Torch's own classes are not changed.
    """

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)


class Muon(SGD):
    """Muon for the kernels of convolutions, and SGD for all other parameters, as one optimizer with two groups.

    Torch's own Muon updates matrices alone. It is given each kernel (K, C, H, W) as a matrix (K, C * H * W) in the same memory,
    so its update is orthogonal in the space of a map's inputs (Jordan et al., "Muon", 2024). SGD's group comes first.

    Args:
        model: whose parameters are trained.
        kernel_rate: of Muon.
        options: those of SGD.
    """

    def __init__(self, model: nn.Module, *, kernel_rate: float, **options: Any):
        self._kernels = [each for each in model.parameters() if each.dim() == 4]
        super().__init__([each for each in model.parameters() if each.dim() != 4], **options)
        matrices = [nn.Parameter(_as_matrix(kernel, like=kernel)) for kernel in self._kernels]
        how = {"momentum": options["momentum"], "weight_decay": options["weight_decay"], "nesterov": True}
        self._muon = torch.optim.Muon(matrices, lr=kernel_rate, **how)
        self.add_param_group(self._muon.param_groups[0])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the kernels by Muon, and the rest by SGD."""
        assert closure is None, "no schedule or step here has a closure"
        *_, of_kernels = self.param_groups
        for matrix, kernel in zip(of_kernels["params"], self._kernels, strict=True):
            matrix.grad = None if kernel.grad is None else _as_matrix(kernel.grad, like=kernel)
        # The state and the rates are this optimizer's: checkpoints and schedules know no other.
        self._muon.param_groups, self._muon.state = [of_kernels], self.state
        self._muon.step()
        for matrix in of_kernels["params"]:
            matrix.grad = None  # SGD passes over what has no gradient
        super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients."""
        super().zero_grad(set_to_none)
        for kernel in self._kernels:
            kernel.grad = None


def _as_matrix(tensor_KCHW: Tensor, *, like: Tensor) -> Tensor:
    """(K, C * H * W), with the inputs of a map in the order in which `like` has them in memory: a view of `like` itself."""
    is_maps_last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return (tensor_KCHW.detach().permute(0, 2, 3, 1) if is_maps_last else tensor_KCHW.detach()).flatten(1)


def build_optimizer(model: nn.Module, train: TrainConfig, *, fused: bool = False) -> torch.optim.SGD:
    """SGD over all parameters (paper section 4), or with Muon over the kernels.

    Args:
        model: whose parameters are trained.
        train: the settings.
        fused: whether one kernel updates all of SGD's parameters, on a GPU (not measured).
    """
    options: dict[str, Any] = {
        "lr": train.learning_rate,
        "momentum": train.momentum,
        "nesterov": train.nesterov and train.momentum > 0,
        "weight_decay": train.weight_decay,
        "fused": fused,
    }
    if train.optimizer == "muon":
        return Muon(model, kernel_rate=train.kernel_rate, **options)
    return SGD(model.parameters(), **options)


class Schedule:
    """A learning-rate schedule, with one interface for both kinds.

    `plateau` is the paper's: the rate is cut when the validation error stops improving, checked after each epoch. `one_cycle`
    rises and falls once over the run, step by step, which suits short runs.

    Args:
        optimizer: the optimizer whose learning rate is set.
        train: the settings.
        num_steps: total number of steps of the run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, train: TrainConfig, *, num_steps: int):
        self._optimizer = optimizer
        self._plateau: ReduceLROnPlateau | None = None
        self._one_cycle: OneCycleLR | None = None
        if train.schedule == "plateau":
            self._plateau = ReduceLROnPlateau(
                optimizer, factor=train.plateau_factor, patience=train.plateau_patience, threshold=0.0
            )
        else:
            self._one_cycle = OneCycleLR(
                optimizer,
                max_lr=[float(group["lr"]) for group in optimizer.param_groups],
                total_steps=num_steps + 1,  # OneCycleLR takes one step in its constructor
                pct_start=train.one_cycle_warmup,
                cycle_momentum=False,
            )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step; with Muon, that of all but the kernels."""
        return float(self._optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        """Call after each optimizer step."""
        if self._one_cycle is not None:
            self._one_cycle.step()

    def after_epoch(self, val_error: float) -> None:
        """Call after each epoch, with the validation error (0 to 1)."""
        if self._plateau is not None:
            self._plateau.step(val_error)

    def lower(self, factor: float) -> None:
        """Multiplies the rate, and all that the schedule computes later ones from. The optimizer's state keeps that."""
        for group in self._optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):
                if name in group:
                    group[name] *= factor

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule, in plain values."""
        return (self._plateau or self._one_cycle).state_dict()  # type: ignore[union-attr,no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        (self._plateau or self._one_cycle).load_state_dict(state)  # type: ignore[union-attr,no-any-return]
