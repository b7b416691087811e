"""`rcnn reproduce` with real trainings of a few seconds: it fills a table, resumes it, and reports what failed."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rcnn.cli import main

pytestmark = [pytest.mark.ray, pytest.mark.long]

SETTINGS = (
    "data.source=mnist-sample",
    "train.epochs=1",
    "train.num_rows=320",
    "train.with_validation=false",
    "execution.cpus_per_worker=1",
)


def reproduce(storage: Path, *more: str, only: str = "mnist*rcnn32") -> int:
    settings = [word for text in (*SETTINGS, f"storage={storage}") for word in ("--set", text)]
    return main(["reproduce", "mnist", "--only", only, "--seeds", "1", "--parallel", "2", *settings, *more])


@pytest.mark.slow
def test_a_table_is_filled_resumed_and_names_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(tmp_path, only="mnist_rcnn32") == 0
    assert "[mnist_rcnn32-seed0] epoch 1/1" in capsys.readouterr().err
    assert reproduce(tmp_path, "--set", "execution.use_gpu=true") == 1
    told = capsys.readouterr()
    assert "rcnn: mnist_modern_rcnn32-seed0 failed: " in told.err
    assert "GPU" in told.err
    assert (told.out.count("not comparable"), told.out.count("not run")) == (1, 2)  # its error and its verdict
    assert reproduce(tmp_path) == 0
    told = capsys.readouterr()
    assert "1 of 2 cells are to be run" in told.err
    assert told.out.count("not comparable") == 2
    assert reproduce(tmp_path) == 0
    assert "starting Prefect" not in capsys.readouterr().err
    assert len(list(tmp_path.glob("reports/reproduce-mnist-small-*/table.parquet"))) == 2  # with --only, and without
    assert len(list(tmp_path.glob("runs/train-*"))) == 2


@pytest.mark.thorough
def test_a_sigterm_ends_all_that_the_command_started(tmp_path: Path) -> None:
    """A process manager's way to stop: the trainings and Prefect's server are processes of their own."""
    settings = [word for text in (*SETTINGS, f"storage={tmp_path}") for word in ("--set", text)]
    command = [
        sys.executable,
        "-m",
        "rcnn.cli",
        "reproduce",
        "mnist",
        "--only",
        "mnist_rcnn32",
        "--seeds",
        "1",
        *settings,
    ]
    mark = {"A_MARK": str(tmp_path)}
    with subprocess.Popen(command, env=os.environ | mark, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = [next(line for line in process.stderr if "evaluate: " in line or "train: " in line)]
        process.terminate()
        said += process.stderr.readlines()
    assert process.returncode == 143
    assert said[-1] == "rcnn: stopped; the same command trains what is left\n"
    _, left = psutil.wait_procs([each for each in psutil.process_iter() if has(each, mark)], timeout=30)
    assert left == []


def has(process: psutil.Process, mark: dict[str, str]) -> bool:
    """Whether a process has this in its environment."""
    try:
        return mark.items() <= process.environ().items()
    except psutil.Error:
        return False


@pytest.mark.thorough
def test_the_plan_of_a_table_counts_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(tmp_path, "--plan") == 0
    assert "2 trainings are left: about " in capsys.readouterr().out


def test_a_wrong_table_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "imagenet"]) == 2
    assert "there is no table 'imagenet'. Choose one of cifar10, " in capsys.readouterr().err
