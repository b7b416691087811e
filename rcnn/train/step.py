"""One step of training, and one pass of scoring: the inner loops, with no host synchronisation in them."""

import ctypes
import platform

import torch
from torch import Tensor, nn
from torch.nn import functional

from rcnn.data.loader import RowSource

# glibc gives large blocks back to the system at once, and each new one is then cleared by it, page by page.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
BYTES_TO_KEEP, OLDER_GLIBCS_LIMIT = 2**31 - 1, 2**25


def prepare(device: torch.device, *, deterministic: bool = False) -> None:
    """Sets up the process for training on a device.

    Args:
        device: where the model is.
        deterministic: two runs on one machine give the same bits; operations that cannot are refused by torch.
    """
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    if device.type == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Lets activations reuse memory instead of fetching it from the system: a fifth of a CPU step, where glibc is used."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, BYTES_TO_KEEP) or libc.mallopt(M_MMAP_THRESHOLD, OLDER_GLIBCS_LIMIT)
        libc.mallopt(M_TRIM_THRESHOLD, BYTES_TO_KEEP)


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
def score(model: nn.Module, rows: RowSource, *, batch_size: int, device: torch.device) -> Tensor:
    """(wrong, summed cross-entropy, rows), float64: sums, so the scores of all ranks' shares add up exactly.

    The model is left in evaluation mode.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for images_NCHW, labels_N in rows.batches(batch_size, device):
        logits_NC = model(images_NCHW)
        sums[0] += (logits_NC.argmax(1) != labels_N).sum()
        sums[1] += functional.cross_entropy(logits_NC, labels_N, reduction="sum")
        sums[2] += len(labels_N)
    return sums
