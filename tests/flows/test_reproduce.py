"""`rcnn reproduce` with real trainings of a few seconds: it fills a table, resumes it, and reports what failed."""

from pathlib import Path

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


def test_the_plan_of_a_table_counts_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(tmp_path, "--plan") == 0
    assert "2 trainings are left: about " in capsys.readouterr().out


def test_a_wrong_table_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "imagenet"]) == 2
    assert "there is no table 'imagenet'. Choose one of cifar10, " in capsys.readouterr().err
