"""One step of training, and one pass of scoring (validation and testing): the inner loops, with no host synchronisation."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from rcnn.data.batches import RowSource
from rcnn.scores import Scores


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images_NCHW: Tensor,
    labels_N: Tensor,
    *,
    clip_norm: float = 0.0,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """One SGD step on one batch.

    Returns:
        The mean cross-entropy of the batch, a scalar that stays on its device.
    """
    with _autocast(images_NCHW.device, precision):
        loss = functional.cross_entropy(model(images_NCHW), labels_N)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.detach()


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
