"""Rows that the workers of a node hold together."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rcnn.config import PipelineConfig
from rcnn.data.loader import Rows, TrainingData
from rcnn.results import IngestResult
from rcnn.storage import Storage
from rcnn.train import shared_rows
from rcnn.train.loop import training_data


@pytest.fixture
def data(tiny_config: PipelineConfig, digits: IngestResult) -> TrainingData:
    return training_data(tiny_config, Storage(tiny_config.storage), digits.folder)


def assert_same(found: TrainingData, expected: TrainingData) -> None:
    assert found.manifest == expected.manifest
    for ours, theirs in ((found.train, expected.train), (found.val, expected.val)):
        assert isinstance(ours, Rows)
        assert isinstance(theirs, Rows)
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.images.stride() == theirs.images.stride()


def test_rows_in_a_file_are_the_same_and_need_no_name(data: TrainingData, tmp_path: Path) -> None:
    moved = shared_rows._moved(data, tmp_path / "rows")
    mapped = shared_rows._mapped(tmp_path / "rows")
    assert (tmp_path / "rows").stat().st_mode & 0o777 == 0o700
    for file in (tmp_path / "rows").iterdir():
        file.unlink()
    assert_same(moved, data)
    assert_same(mapped, data)


def test_a_full_disk_leaves_each_worker_its_own_rows(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with caplog.at_level("INFO", logger="rcnn"):
        assert shared_rows._moved(data, tmp_path / "rows") is data
    assert "each worker holds the rows by itself" in caplog.text
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []
