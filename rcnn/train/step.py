"""One step of training, and one pass of scoring: the inner loops, with no host synchronisation in them."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from rcnn.data.loader import RowSource


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
    batch_size: int,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """(wrong, summed cross-entropy, rows), float64: sums, so the scores of all ranks' shares add up exactly.

    The model is left in evaluation mode.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for images_NCHW, labels_N in rows.batches(batch_size, device):
        with _autocast(device, precision):
            logits_NC = model(images_NCHW).float()
        sums[0] += (logits_NC.argmax(1) != labels_N).sum()
        sums[1] += functional.cross_entropy(logits_NC, labels_N, reduction="sum")
        sums[2] += len(labels_N)
    return sums


def _autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision is torch.bfloat16)
