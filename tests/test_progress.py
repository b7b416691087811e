"""Progress without a terminal: a line now and then."""

import logging

import pytest

from rcnn import progress
from rcnn.progress import RowProgress


def test_rows_are_counted_in_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    rows = RowProgress(5000, num_done=1000)
    with caplog.at_level(logging.INFO, logger="rcnn"):
        for _ in range(4):
            now[0] += 10
            rows.advance(500)
    rows.close()
    assert caplog.messages == ["  2,000 of 5,000 rows", "  3,000 of 5,000 rows"]
