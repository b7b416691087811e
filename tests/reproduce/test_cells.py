"""What of a cell's result stands in the table."""

import pytest

from rcnn.reproduce.cells import error_of
from rcnn.reproduce.tables import Cell, cells_of
from rcnn.results import EvaluateResult, StudyRow


def cell_of(table: str, name: str) -> Cell:
    [cell] = cells_of(table, budget="full", only=(name,))
    return cell


def study_row(condition: str, error: float) -> StudyRow:
    return StudyRow(
        condition=condition,
        num_rows=10_000,
        error=error,
        error_interval=(0.0, 1.0),
        gain=0.0,
        gain_interval=(0.0, 0.0),
        passes=1.0,
    )


RESULT = EvaluateResult(
    folder="reports/evaluate-0",
    metrics={"error": 0.09},
    classes={},
    num_rows=10_000,
    images_per_second=0.0,
    test_digest="0",
    studies={"views": (study_row("as it is", 0.09), study_row("mirrored", 0.085), study_row("crops", 0.08))},
)


@pytest.mark.parametrize(
    ("table", "name", "error"),
    [
        ("cifar10", "cifar10_rcnn96", 0.09),
        ("cifar10-augmented", "cifar10_augmented_rcnn96", 0.08),  # the paper's nine windows
        ("cifar10-augmented", "cifar10_augmented_nin", 0.09),  # which sees whole images
        ("modern", "cifar10_modern_rcnn96", 0.085),
        ("modern", "cifar10_modern_rcnn96_no_views", 0.09),
        ("mnist", "mnist_modern_rcnn32", 0.09),
    ],
)
def test_the_error_is_that_of_the_views_that_the_experiment_asks_for(table: str, name: str, error: float) -> None:
    cell = cell_of(table, name)
    assert error_of(cell, RESULT) == error
    if cell.experiment.views:
        assert cell.config.evaluate.views == (cell.experiment.views,)
        assert cell.config.evaluate.sample_rows == 0  # all test rows


def test_views_at_test_time_cost_no_training_of_their_own() -> None:
    whole, without = (cell_of("modern", f"cifar10_modern_rcnn96{end}").config for end in ("", "_no_views"))
    for name in ("model", "train", "augment", "seed"):  # what the key of a training holds
        assert whole.values_of(name) == without.values_of(name)
