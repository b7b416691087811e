"""Credentials from the environment are used, and never written: not to a file, a log, a database or a command line."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

CANARY = "canary-7d1f0b52"
# Not MLFLOW_TRACKING_USERNAME: MLflow notes in each run who made it.
SECRETS = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN", "PREFECT_API_KEY", "HF_TOKEN",
)  # fmt: skip


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder for all that is written. Its name is short: Ray's sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="c-") as folder:
        yield Path(folder)


def _environment(home: Path) -> dict[str, str]:
    places = {name: str(home / name.lower()) for name in ("HOME", "PREFECT_HOME", "RAY_TMPDIR", "XDG_CACHE_HOME")}
    for place in places.values():
        Path(place).mkdir(exist_ok=True)
    return os.environ | places | dict.fromkeys(SECRETS, CANARY)


def _files_with(canary: str, folder: Path) -> list[Path]:
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    assert {"storage", "ray_tmpdir", "prefect_home", "log"} <= {file.relative_to(folder).parts[0] for file in files}, (
        files
    )
    return [file for file in files if canary.encode() in file.read_bytes()]


def test_no_credential_is_written_or_seen_in_a_command_line(home: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "rcnn.cli",
        "pipeline",
        "--recipe",
        "debug_tiny",
        "--set",
        f"storage={home}/storage",
    ]
    seen: set[str] = set()
    with (home / "log").open("w") as log:
        run = subprocess.Popen(command, env=_environment(home), stdout=log, stderr=log, cwd=home)
        while run.poll() is None:
            for process in psutil.Process(run.pid).children(recursive=True):
                try:
                    seen.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue
            time.sleep(0.2)
    assert run.returncode == 0, (home / "log").read_text()
    assert len(seen) > 5
    found = [line[max(0, line.find(CANARY) - 200) :][:300] for line in seen if CANARY in line]
    assert found == []
    assert _files_with(CANARY, home) == []


@pytest.mark.parametrize("setting", ["tracking.uri", "ray.address", "storage", "data.mirror"])
def test_a_credential_in_a_setting_is_refused_and_not_repeated(home: Path, setting: str) -> None:
    value = f"http://me:{CANARY}@host:1" if setting != "storage" else f"s3://me:{CANARY}@bucket/x"
    layers = [
        ["--set", f"{setting}={value}"],
        ["--config", str(home / "mine.toml")],
        [],
    ]
    section, _, name = setting.rpartition(".")
    (home / "mine.toml").write_text(f'[{section}]\n{name} = "{value}"\n' if section else f'{name} = "{value}"\n')
    for given in layers:
        environment = _environment(home)
        if not given:
            environment["RCNN_" + setting.upper().replace(".", "__")] = value
        command = [sys.executable, "-m", "rcnn.cli", "plan", "--recipe", "debug_tiny", *given, "--debug"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home)
        assert "holds credentials" in run.stderr
        assert CANARY not in run.stdout + run.stderr
        assert run.returncode != 0
