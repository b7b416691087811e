"""The code of this installation, for Ray jobs that bring it along: the nodes then need only its dependencies."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rcnn
from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError

PACKAGE = Path(rcnn.__file__).parent
EXCLUDES = ["__pycache__", "*.pyc"]
MOST_BYTES = 20_000_000
"""The package has two million bytes. Ray's own limit is 500 MiB, which would be sent and unpacked for each change."""


def program_of_jobs(config: PipelineConfig) -> list[str]:
    """How a job calls the command: by the script that is installed, or from the code that it brings along."""
    return ["python", "-m", "rcnn.cli"] if config.ray.send_code else ["rcnn"]


def runtime_env_of_jobs(config: PipelineConfig) -> dict[str, Any]:
    """What a job has besides what its node has installed: nothing, or our code (see `checked_package`)."""
    return checked_package(PACKAGE) if config.ray.send_code else {}


def checked_package(package: Path) -> dict[str, Any]:
    """A folder for Ray's client to send along, which it does once for each state of its files.

    Raises:
        ConfigError: the folder holds more than code.
    """
    sizes = dict(_sizes(package))
    num_bytes = sum(sizes.values())
    if num_bytes > MOST_BYTES:
        largest = max(sizes, key=lambda file: sizes[file])
        raise ConfigError(
            f"the package has {num_bytes / 1e6:,.0f} MB, and {MOST_BYTES / 1e6:.0f} MB are sent at most; its largest file is "
            f"{largest.relative_to(package)} ({sizes[largest] / 1e6:,.0f} MB)",
            where=f"ray.send_code with {package}",
            remedy="Move what is not code out of it, or install rcnn on the nodes and set ray.send_code to false",
        )
    return {"py_modules": [str(package)], "excludes": EXCLUDES}


def _sizes(package: Path) -> Iterator[tuple[Path, int]]:
    """The files of the package and their bytes, without what Python compiled."""
    for folder, subfolders, names in os.walk(package):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDES]
        for file in (Path(folder, name) for name in names):
            if file.suffix != ".pyc":
                yield file, file.stat().st_size
