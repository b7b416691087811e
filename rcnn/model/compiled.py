"""C code of this package, compiled on first use for the network at hand and linked with the OpenMP library that torch uses.

Compiling takes a quarter of a second to a second per kernel and process, needs gcc, and leaves no files. Without a compiler,
the callers use torch operations, after one warning.
"""

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
# `-ffast-math` without its assumption that there are no NaNs, and without its start-up code, which would set the processor's
# flush-to-zero flag for all of torch.
FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-freciprocal-math"),
    *("-fno-signed-zeros", "-fopenmp", "-shared", "-fPIC", "-Wl,--no-undefined", "-Wl,--as-needed"),
)
TYPES = {torch.float32: ("float", 0), torch.float64: ("double", 0), torch.bfloat16: ("float", 1)}
"""The macros REAL and BFLOAT16 of `element.h`, by dtype."""

_log = logging.getLogger("rcnn")


def compiled(source: str, dtype: torch.dtype, macros: Mapping[str, int]) -> ctypes.CDLL | None:
    """The functions of a C file of this folder, for a dtype and further macros; None if they cannot be compiled."""
    if dtype not in TYPES or not can_compile():
        return None
    real, is_bfloat16 = TYPES[dtype]
    definitions = {"REAL": real, "BFLOAT16": is_bfloat16, **macros}
    try:
        return _library(source, tuple(f"-D{name}={value}" for name, value in definitions.items()))
    except (OSError, subprocess.CalledProcessError) as error:
        _log.warning("  using slower code of torch: %s cannot be compiled (%s)", source, _reason(error))
        return None


@functools.cache
def can_compile() -> bool:
    """Whether there is a compiler and torch's OpenMP library to link with; logs a warning if not."""
    if compiler() and _openmp():
        return True
    what = "this build of torch has no libgomp" if compiler() else "there is no gcc; install it"
    _log.warning("  using slower code of torch, so steps take two to three times as long: %s", what)
    return False


def compiler() -> str | None:
    """The path of a C compiler: CC, gcc or cc. Not clang: its OpenMP library is not the one that torch uses."""
    found = filter(None, map(shutil.which, (os.environ.get("CC") or "gcc", "gcc", "cc")))
    return next((path for path in found if "clang" not in _output([path, "--version"])), None)


def _library(source: str, definitions: tuple[str, ...]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="rcnn-", ignore_cleanup_errors=True) as folder:
        file = Path(folder, "kernel.so")
        linked = [str(FOLDER / source), str(_openmp()), "-lm", "-o", str(file)]
        _output([str(compiler()), *FLAGS, *definitions, *linked], check=True)
        return ctypes.CDLL(str(file))  # stays mapped after the file is deleted


def _output(command: list[str], *, check: bool = False) -> str:
    return subprocess.run(command, check=check, capture_output=True, text=True, errors="replace").stdout


def _reason(error: Exception) -> str:
    """The first error line of the compiler's output."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
        faults = [line for line in lines if "error" in line.lower()]
        return next(iter(faults + lines), f"{error.cmd[0]} ended with exit code {error.returncode}")
    return str(error)


def _openmp() -> Path | None:
    """The OpenMP library that torch has loaded: the threads of a second one would compete with its threads for the cores."""
    package = Path(torch.__file__).parent
    return next(iter([*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")]), None)
