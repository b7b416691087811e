"""SGD with momentum, and the two schedules of its learning rate."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from rcnn.config import TrainConfig


class SGD(torch.optim.SGD):
    """`torch.optim.SGD`, without the 7 s that each process pays to import torch's compiler at the first step.

    Torch imports it only to mark `step` and four more methods as not to be compiled. This class has the same methods
    without that mark: `step` under `no_grad`, which is all that its wrapper does beyond. Torch's own classes stay as they
    are.
    """

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)


def build_optimizer(model: nn.Module, train: TrainConfig, *, fused: bool = False) -> torch.optim.SGD:
    """SGD over all parameters (paper section 4); `fused`: one kernel updates them all, on a GPU."""
    return SGD(
        model.parameters(),
        lr=train.learning_rate,
        momentum=train.momentum,
        nesterov=train.nesterov and train.momentum > 0,
        weight_decay=train.weight_decay,
        fused=fused,
    )


class Schedule:
    """The learning rate over time, one interface for both kinds.

    `plateau` is the paper's: a cut when validation error stalls, decided after each epoch. `one_cycle` rises and falls
    once over the whole run, step by step, which suits short runs.

    Args:
        optimizer: whose rate is set.
        train: the settings.
        num_steps: steps of the whole run.
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
                total_steps=num_steps + 1,  # OneCycleLR takes one step of its own when it is built
                pct_start=train.one_cycle_warmup,
                cycle_momentum=False,
            )

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        """To be called after each optimizer step."""
        if self._one_cycle is not None:
            self._one_cycle.step()

    def after_epoch(self, val_error: float) -> None:
        """To be called after each epoch, with the validation error (0 to 1)."""
        if self._plateau is not None:
            self._plateau.step(val_error)

    def state_dict(self) -> dict[str, Any]:
        """All that the next rate depends on, in plain values."""
        return (self._plateau or self._one_cycle).state_dict()  # type: ignore[union-attr,no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        (self._plateau or self._one_cycle).load_state_dict(state)  # type: ignore[union-attr,no-any-return]
