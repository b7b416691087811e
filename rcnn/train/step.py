"""One step of training, and one pass of scoring: the inner loops, with no host synchronisation in them."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from rcnn.data.loader import Rows


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images_NCHW: Tensor, labels_N: Tensor, *, clip_norm: float
) -> Tensor:
    """One SGD step on one batch.

    Returns:
        The mean cross-entropy of the batch, a scalar that stays on its device.
    """
    loss = functional.cross_entropy(model(images_NCHW), labels_N)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.detach()


@torch.inference_mode()
def predict_logits(model: nn.Module, rows: Rows, *, batch_size: int) -> Tensor:
    """Logits (N, classes) of all rows, in their order; the model is left in evaluation mode."""
    model.eval()
    return torch.cat([model(images_NCHW) for images_NCHW, _ in rows.batches(batch_size)])


def score(model: nn.Module, rows: Rows, *, batch_size: int) -> Tensor:
    """(wrong, summed cross-entropy, rows), float64: sums, so the scores of all ranks' shares add up exactly."""
    if len(rows) == 0:
        return torch.zeros(3, dtype=torch.float64, device=rows.labels.device)
    logits = predict_logits(model, rows, batch_size=batch_size)
    wrong = (logits.argmax(1) != rows.labels).sum()
    loss = functional.cross_entropy(logits, rows.labels, reduction="sum")
    return torch.stack([wrong.double(), loss.double(), torch.tensor(len(rows), device=loss.device).double()])
