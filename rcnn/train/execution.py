"""How a step runs on this machine: device, precision and compilation, and the set-up of the process.

In: the settings and a device. Out: an `Execution`, which records the choice and the reason.
"""

import ctypes
import os
import platform
import shutil
from dataclasses import dataclass

import torch
from torch import nn

from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError
from rcnn.model.dropout import Position

# By default glibc returns freed large blocks to the system at once, which then clears each new one page by page.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
BYTES_TO_KEEP, OLDER_GLIBCS_LIMIT = 2**31 - 1, 2**25

STEPS_WORTH_COMPILING = 5_000  # on a GPU; an estimate, not measured


@dataclass(frozen=True)
class Execution:
    """How the steps of a run are executed, and why."""

    device: torch.device
    precision: torch.dtype
    """Precision of the arithmetic: float32, or bfloat16 by autocast. Weights, their gradients and LRN's sums are float32."""
    is_compiled: bool
    reason: str
    """Why the step is or is not compiled."""

    def compiled(self, network: nn.Module) -> nn.Module:
        """The network, compiled if `is_compiled`."""
        return torch.compile(network) if self.is_compiled else network  # type: ignore[return-value]

    def seed(self, position: Position) -> None:
        """Seeds torch's generator for a step, where a compiled network draws from it."""
        if self.is_compiled:
            torch.manual_seed(position.as_seed())

    def __str__(self) -> str:
        on = (
            f"the CPU (threads: {torch.get_num_threads()})" if self.device.type == "cpu" else f"the GPU ({self.device})"
        )
        is_compiled = "compiled at the first step" if self.is_compiled else "not compiled"
        return f"training on {on} in {str(self.precision).removeprefix('torch.')}, {is_compiled} ({self.reason})"


def choose_device(use_gpu: bool) -> torch.device:
    """The device to train on.

    Raises:
        ClusterError: a GPU was asked for and there is none.
    """
    if not use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ClusterError(
            "this machine has no GPU that torch can use", where="execution.use_gpu = true", remedy="Set it to false"
        )
    return torch.device("cuda", torch.cuda.current_device())


def choose_execution(config: PipelineConfig, device: torch.device, *, num_steps: int) -> Execution:
    """Resolves `train.precision` and `execution.compile` for a device and a run of `num_steps` steps.

    Raises:
        ClusterError: compiling is on, but there is no compiler.
    """
    how, wanted = config.execution, config.train.precision
    is_narrow = wanted == "bfloat16" or (wanted == "auto" and _has_bfloat16(device))
    precision = torch.bfloat16 if is_narrow else torch.float32
    if how.compile == "on":
        _require_compiler()
        return Execution(device, precision, True, "execution.compile = on")
    if how.compile == "off":
        return Execution(device, precision, False, "execution.compile = off")
    return Execution(device, precision, *_is_worth_compiling(device, num_steps))


def _is_worth_compiling(device: torch.device, num_steps: int) -> tuple[bool, str]:
    """Whether to compile, and the reason."""
    if device.type == "cpu":
        # Measured at K = 96, T = 3: 0.87 of the floor compiled, 0.96 not compiled (tests/bench/NOTES.md).
        return False, "auto: on a CPU it gains nothing"
    if num_steps < STEPS_WORTH_COMPILING:
        return False, f"auto: {num_steps:,} steps are too few to pay for compiling"
    if not _compiler():
        return False, "auto: there is no C++ compiler"
    return True, f"auto: {num_steps:,} steps pay for compiling"


def _compiler() -> str | None:
    """The path of the compiler that torch uses, if it is installed."""
    return shutil.which(os.environ.get("CXX") or "g++")


def _require_compiler() -> None:
    if not _compiler():
        raise ClusterError(
            f"torch compiles with {os.environ.get('CXX') or 'g++'}, which is not on this machine",
            where="execution.compile = on",
            remedy="Install it, name another one in CXX, or set execution.compile to auto",
        )


def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def prepare(device: torch.device, *, deterministic: bool = False) -> None:
    """Sets up the process for training on a device.

    Args:
        device: where the model is.
        deterministic: whether two runs on one machine give identical bits; torch then refuses operations that cannot. On the
            CPU this costs nothing (1.01 of the floor against 0.96, within the noise; `tests/bench/NOTES.md`).
    """
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a guard against bugs that costs a pass over memory
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, torch refuses matrix products
    if device.type == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory, so that activations reuse it: saves a fifth of a CPU step (`tests/bench/NOTES.md`)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, BYTES_TO_KEEP) or libc.mallopt(M_MMAP_THRESHOLD, OLDER_GLIBCS_LIMIT)
        libc.mallopt(M_TRIM_THRESHOLD, BYTES_TO_KEEP)
