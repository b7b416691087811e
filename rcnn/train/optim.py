"""SGD with momentum, and its two learning-rate schedules."""

import inspect
from typing import Any

import torch
from torch import nn
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


def build_optimizer(model: nn.Module, train: TrainConfig, *, fused: bool = False) -> torch.optim.SGD:
    """SGD over all parameters (paper section 4). `fused`: one kernel updates all parameters, on a GPU (not measured)."""
    return SGD(
        model.parameters(),
        lr=train.learning_rate,
        momentum=train.momentum,
        nesterov=train.nesterov and train.momentum > 0,
        weight_decay=train.weight_decay,
        fused=fused,
    )


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
                max_lr=train.learning_rate,
                total_steps=num_steps + 1,  # OneCycleLR takes one step in its constructor
                pct_start=train.one_cycle_warmup,
                cycle_momentum=False,
            )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
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
