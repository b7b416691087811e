"""Rows that cannot be taken, for more than their image."""

import pytest

from rcnn.errors import DataError
from tests.data.broken.rows import ROWS
from tests.data.broken.scene import Case, Scene, check_left_out, check_refused, named


@pytest.mark.parametrize("case", named(ROWS))
def test_a_broken_row_is_named(scene: Scene, case: Case) -> None:
    check_refused(scene, case.make(scene), DataError, (case.row, *case.words))


@pytest.mark.parametrize("case", named(ROWS))
def test_a_broken_row_is_left_out_on_demand(scene: Scene, case: Case) -> None:
    check_left_out(scene, case.make(scene), case.row, case.words)
