"""One step of training, and one pass of scoring: the inner loops, with no host synchronisation in them."""

import ctypes
import os
import platform
import shutil
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from rcnn.config import TrainConfig
from rcnn.data.loader import RowSource
from rcnn.errors import ClusterError

# glibc gives large blocks back to the system at once, and each new one is then cleared by it, page by page.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
BYTES_TO_KEEP, OLDER_GLIBCS_LIMIT = 2**31 - 1, 2**25

STEPS_WORTH_COMPILING = 5_000
LARGEST_KERNEL_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Execution:
    """How the steps of a run are carried out, and why."""

    device: torch.device
    precision: torch.dtype
    """Of the arithmetic: float32, or bfloat16 under autocast. Weights, gradients of weights and LRN's sums are float32."""
    is_compiled: bool
    reason: str
    """Why the step is compiled, or is not."""

    def compiled(self, network: nn.Module) -> nn.Module:
        """The network, compiled if it is to be."""
        return torch.compile(network) if self.is_compiled else network  # type: ignore[return-value]

    def __str__(self) -> str:
        on = (
            f"the CPU (threads: {torch.get_num_threads()})" if self.device.type == "cpu" else f"the GPU ({self.device})"
        )
        is_compiled = "compiled at the first step" if self.is_compiled else "not compiled"
        return f"training on {on} in {str(self.precision).removeprefix('torch.')}, {is_compiled} ({self.reason})"


def choose_execution(train: TrainConfig, device: torch.device, *, num_steps: int) -> Execution:
    """What `precision` and `compile` come to on a device, for a run of `num_steps` steps.

    Raises:
        ClusterError: there is no compiler, and compiling is on; or the Triton kernel is asked for, and does not agree with
            the equation on this GPU.
    """
    is_narrow = train.precision == "bfloat16" or (train.precision == "auto" and _has_bfloat16(device))
    precision = torch.bfloat16 if is_narrow else torch.float32
    if train.triton:
        _check_kernel(device, precision)
    if train.compile == "on":
        _require_compiler()
        return Execution(device, precision, True, "train.compile = on")
    if train.compile == "off":
        return Execution(device, precision, False, "train.compile = off")
    return Execution(device, precision, *_is_worth_compiling(device, num_steps))


def _is_worth_compiling(device: torch.device, num_steps: int) -> tuple[bool, str]:
    """The answer, and why."""
    if device.type == "cpu":
        return False, "auto: on a CPU it gains nothing"
    if num_steps < STEPS_WORTH_COMPILING:
        return False, f"auto: {num_steps:,} steps are too few to earn the time that it takes"
    if not _compiler():
        return False, "auto: there is no C++ compiler"
    return True, f"auto: {num_steps:,} steps are enough to earn the time that it takes"


def _compiler() -> str | None:
    """What torch compiles with, where it is."""
    return shutil.which(os.environ.get("CXX") or "g++")


def _require_compiler() -> None:
    if not _compiler():
        raise ClusterError(
            f"torch compiles with {os.environ.get('CXX') or 'g++'}, which is not on this machine",
            where="train.compile = on",
            remedy="Install it, name another one in CXX, or set train.compile to auto",
        )


def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _check_kernel(device: torch.device, precision: torch.dtype) -> None:
    try:
        from rcnn.model.lrn_triton import largest_error  # there is no Triton on every machine

        error = largest_error(device, precision)
    except Exception as fault:  # whatever its compiler or the driver raises
        raise _kernel_error(f"cannot run ({fault})") from fault
    if not error < LARGEST_KERNEL_ERROR[precision]:
        raise _kernel_error(f"has a relative error of {error:.1e}")


def _kernel_error(what: str) -> ClusterError:
    return ClusterError(
        f"the Triton kernel {what} on this GPU", where="train.triton = true", remedy="Set train.triton to false"
    )


def prepare(device: torch.device, *, deterministic: bool = False) -> None:
    """Sets up the process for training on a device.

    Args:
        device: where the model is.
        deterministic: two runs on one machine give the same bits; operations that cannot are refused by torch.
    """
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # guards against bugs, costs a pass over all memory
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, torch refuses matrix products
    if device.type == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Lets activations reuse memory instead of fetching it from the system: a fifth of a CPU step, where glibc is used."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, BYTES_TO_KEEP) or libc.mallopt(M_MMAP_THRESHOLD, OLDER_GLIBCS_LIMIT)
        libc.mallopt(M_TRIM_THRESHOLD, BYTES_TO_KEEP)


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
