"""One step of training, the steps of an epoch, and one pass of scoring: the inner loops, with no host synchronisation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from rcnn.config import SHARE_OF_ALL_STEPS, PipelineConfig
from rcnn.data.augment import Augmentation
from rcnn.data.batches import Order, RowSource
from rcnn.model.dropout import Position, set_position
from rcnn.model.layers import set_active_steps
from rcnn.scores import Scores
from rcnn.train.checkpoint import TrainState
from rcnn.train.execution import Execution


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images_NCHW: Tensor,
    labels_N: Tensor,
    *,
    clip_norm: float = 0.0,
    precision: torch.dtype = torch.float32,
    label_smoothing: float = 0.0,
) -> Tensor:
    """One SGD step on one batch.

    Returns:
        The mean cross-entropy of the batch, a scalar that stays on its device.
    """
    loss = loss_of(model, images_NCHW, labels_N, precision, label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    update(model, optimizer, clip_norm)
    return loss.detach()


def loss_of(
    model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, precision: torch.dtype, label_smoothing: float = 0.0
) -> Tensor:
    """The mean cross-entropy of a batch, with smoothed labels where the settings ask for that (Szegedy et al. 2016)."""
    with _autocast(images_NCHW.device, precision):
        return functional.cross_entropy(model(images_NCHW), labels_N, label_smoothing=label_smoothing)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
    """Changes the weights by their gradients, whose norm is at most `clip_norm` (0: no limit)."""
    if clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()


@contextmanager
def steps_drawn(model: nn.Module, config: PipelineConfig, position: Position) -> Iterator[None]:
    """With `train.any_t`, the recurrent layers do another number of steps within the context: that of `num_steps_at`."""
    if not config.train.any_t:
        yield
        return
    set_active_steps(model, num_steps_at(position, config.model.t))
    try:
        yield
    finally:
        set_active_steps(model, config.model.t)


def num_steps_at(position: Position, most: int) -> int:
    """The recurrent steps of a training step: `most` in half of them, else 0 to `most` - 1, alike on all workers."""
    rng = np.random.default_rng((position.seed, position.epoch, position.step))
    return most if rng.random() < SHARE_OF_ALL_STEPS else int(rng.integers(most))


def process_group() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Steps(Protocol):
    """The steps of a run, and the scoring after each epoch; `train.num_shares` decides between the kinds."""

    num_steps: int
    """Of an epoch."""

    def epoch(self, epoch: int, *, first_step: int = 0) -> Iterator[Tensor]:
        """Makes the steps of an epoch after the first `first_step` of them; yields the mean loss of each batch."""

    def mean_loss(self, loss: Tensor) -> float:
        """The mean over all workers of what this one's losses came to; waits for the device."""

    def score(self, val: RowSource) -> Scores:
        """The scores of all workers' validation rows."""


class PlainSteps:
    """Each worker takes its slice of a batch as a whole, on all its threads, and torch averages the gradients.

    Args:
        state: what is trained.
        rows: the training rows, of all workers.
        augmentation: how images are changed.
        execution: how the steps run.

    Raises:
        DataError: there are fewer rows than one batch.
    """

    def __init__(self, state: TrainState, rows: RowSource, augmentation: Augmentation, execution: Execution):
        self.state, self.execution = state, execution
        self._rank, self._num_ranks = process_group()
        train = state.config.train
        order = Order(train.batch_size, state.config.seed, self._rank, self._num_ranks)
        self._loader = rows.loader(order, augmentation, execution.device)
        self.num_steps = self._loader.num_steps
        model = DistributedDataParallel(state.model) if self._num_ranks > 1 else state.model
        self._network = execution.compiled(model)

    def epoch(self, epoch: int, *, first_step: int = 0) -> Iterator[Tensor]:
        """Makes the steps of an epoch after the first `first_step` of them; yields the mean loss of each batch's slice."""
        state, train = self.state, self.state.config.train
        self._network.train()
        batches = self._loader.epoch(epoch, first_step=first_step)
        for step, (images_NCHW, labels_N) in enumerate(batches, start=first_step + 1):
            position = Position(state.config.seed, epoch, step, share=self._rank)
            set_position(state.model, position)
            self.execution.seed(position)
            with steps_drawn(state.model, state.config, position):
                loss = train_step(
                    self._network,
                    state.optimizer,
                    images_NCHW,
                    labels_N,
                    clip_norm=train.clip_norm,
                    precision=self.execution.precision,
                    label_smoothing=train.label_smoothing,
                )
            yield loss

    def mean_loss(self, loss: Tensor) -> float:
        """The mean over all workers of what this one's losses came to; waits for the device."""
        if self._num_ranks > 1:
            dist.all_reduce(loss)
        return float(loss) / self._num_ranks

    def score(self, val: RowSource) -> Scores:
        """The scores of all workers' validation rows."""
        scores: Scores = score(
            self.state.best_model,
            val.share(self._rank, self._num_ranks),
            num_classes=len(self.state.manifest.classes),
            batch_size=self.state.config.evaluate.batch_size,
            device=self.execution.device,
            precision=self.execution.precision,
        )
        if self._num_ranks > 1:
            dist.all_reduce(scores.confusion)
            dist.all_reduce(scores.loss_sum)
        return scores


@torch.inference_mode()
def score(
    model: nn.Module,
    rows: RowSource,
    *,
    num_classes: int,
    batch_size: int,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> Scores:
    """The model's scores on the rows, on the device. The model is left in evaluation mode.

    Args:
        model: gives logits (N, num_classes).
        rows: a rank's share of a split; it may be empty.
        num_classes: classes of the data set.
        batch_size: images per forward pass.
        device: where the model is.
        precision: type of the arithmetic.
    """
    model.eval()
    total = Scores(
        torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device),
        torch.zeros((), dtype=torch.float64, device=device),
    )
    for images_NCHW, labels_N in rows.batches(batch_size, device):
        with _autocast(device, precision):
            logits_NC = model(images_NCHW)
        total += score_logits(logits_NC, labels_N)
    return total


def score_logits(logits_NC: Tensor, labels_N: Tensor) -> Scores:
    """Scores of logits (N, classes) against labels (N)."""
    num_classes = logits_NC.shape[1]
    cells_N = labels_N * num_classes + logits_NC.argmax(1)
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=labels_N.device)
    confusion.scatter_add_(0, cells_N, torch.ones_like(cells_N))  # bincount would wait for a GPU
    loss_sum = functional.cross_entropy(logits_NC.double(), labels_N, reduction="sum")
    return Scores(confusion.reshape(num_classes, num_classes), loss_sum)


def _autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision is torch.bfloat16)
