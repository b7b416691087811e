"""The report of a table: nothing is filled in, nothing is mixed up, and machines can read it."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from rcnn.evaluate.ensemble import Ensemble
from rcnn.reproduce import report
from rcnn.reproduce.cells import Row, rows_of
from rcnn.reproduce.outcome import Outcome
from rcnn.reproduce.report import Finished
from rcnn.reproduce.tables import cells_of

ERRORS = (0.0040, 0.0044)


@pytest.fixture
def finished(tmp_path: Path) -> Finished:
    """MNIST's small table: the first row was run with two seeds, the second was not."""
    cells = cells_of("mnist", budget="small", num_seeds=2, overrides=(f"storage={tmp_path}",))
    first, second = cells[:2]
    rows = [
        Row(
            first,
            Outcome(ERRORS, 10_000, 0.0042),
            (0, 1),
            75_018,
            900.0,
            ("a1", "b2"),
            Ensemble(2, 10_000, 0.0035, 0.0042),
        ),
        Row(second, Outcome((), 0, 0.0042), (), 75_018, None, ()),
    ]
    return Finished("MNIST | all", "mnist", rows, "rcnn reproduce mnist", "0123abc")


def test_markdown_says_what_was_not_run_and_names_the_data_set(finished: Finished) -> None:
    lines = report.as_markdown(finished).splitlines()
    header, _, first, second = (line for line in lines if line.startswith("| "))
    assert "error on MNIST, %" in header
    assert "0.42 ± 0.03 | 2 | 0.35 | 0.42 (unverified)" in first
    assert first.count("no augmentation") == 1
    assert "not run | 0 |  |" in second
    assert "shifts of 2" in second
    assert "- command: `rcnn reproduce mnist`" in lines


def test_a_figure_on_re_encoded_images_has_a_column_of_that_name(finished: Finished) -> None:
    other = Finished(finished.title, "cifar10-jpeg", finished.rows, finished.command, finished.commit)
    assert "error on CIFAR-10-JPEG, %" in other.cells()[0]
    assert "error on CIFAR-10, %" not in other.cells()[0]


def test_html_is_one_file_without_links_and_scripts(finished: Finished) -> None:
    page = report.as_html(finished, "aGk=")
    assert "<script" not in page
    assert "href" not in page
    assert page.count("<td>not run</td>") == 2  # its error and its verdict


def test_parquet_has_every_seed_and_nulls_where_nothing_was_run(finished: Finished) -> None:
    first, second = pq.read_table(io.BytesIO(report.as_parquet(finished))).to_pylist()
    assert first["errors"] == list(ERRORS)
    assert first["mlflow_run_ids"] == ["a1", "b2"]
    assert (first["ensemble_error"], second["ensemble_error"]) == (0.0035, None)
    assert (second["errors"], second["mean"], second["seconds"]) == ([], None, None)


def test_the_plot_is_drawn_with_and_without_runs(finished: Finished, tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    report.plot_errors(finished, file)
    with Image.open(file) as picture:
        assert picture.width > 800


def test_rows_before_any_run_have_parameters_and_no_figures(tmp_path: Path) -> None:
    rows = rows_of(cells_of("mnist", budget="small", num_seeds=2, overrides=(f"storage={tmp_path}",)))
    assert [row.num_parameters for row in rows] == [75_018, 75_018, 297_482, 297_482]
    assert {(row.seeds, row.outcome.verdict) for row in rows} == {((), "not run")}
