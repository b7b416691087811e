"""Which trials are left, and what the result of a search says."""

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from rcnn.config import PipelineConfig
from rcnn.errors import TrainingError
from rcnn.recipes import debug_tiny
from rcnn.results import MAX_LISTED, Choice, Outcome, TuneResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from rcnn.tune.ledger import Record, read_records, write_record, write_table
from rcnn.tune.screen import SearchScreen
from rcnn.tune.search import NewPoints, coverage, covers, finalists, repeats_left, result_of, rungs_of, trials_left
from rcnn.tune.space import Space


def tuning(**settings: Any) -> PipelineConfig:
    return debug_tiny().with_settings({f"tune.{name}": value for name, value in settings.items()})


@pytest.fixture
def target(tmp_path: Path) -> StageFolder:
    return StageFolder(Storage(str(tmp_path)), "runs/tune-x")


def record(number: int, error: float, outcome: Outcome = "finished", *, epochs: int = 2, seed: int = 0) -> Record:
    point = Space(debug_tiny()).first_points(number + 1, search="random")[number]
    name = f"trial-{number:02d}" + (f"-seed-{seed}" if seed else "")
    errors = tuple(error + 0.1 * left for left in reversed(range(epochs)))
    return Record(
        name=name, choice=Choice(point), seed=seed, val_error=error, epochs=epochs, outcome=outcome, seconds=3.0,
        images_per_second=100.0, val_errors=errors, fault="CUDA out of memory" if outcome == "failed" else "",
    )  # fmt: skip


def by_name(*records: Record) -> dict[str, Record]:
    return {each.name: each for each in records}


def test_the_ledger_gives_back_what_was_written(target: StageFolder) -> None:
    records = by_name(record(1, 0.2), record(0, 0.1, "stopped early", epochs=1))
    for each in records.values():
        write_record(target, each)
    assert read_records(target) == records
    assert list(read_records(target)) == ["trial-00", "trial-01"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": "trial-01"}'])
def test_a_damaged_record_is_left_out(target: StageFolder, damage: str) -> None:
    for number in (0, 1):
        write_record(target, record(number, 0.1))
    target.storage.write_text(target.path("trials/trial-01.json"), damage)
    assert list(read_records(target)) == ["trial-00"]


def test_a_search_runs_what_is_not_in_the_ledger_with_the_same_points() -> None:
    config = tuning(num_trials=4)
    runs = trials_left(config, {})
    assert [run.name for run in runs] == ["trial-00", "trial-01", "trial-02", "trial-03"]
    assert trials_left(config, by_name(record(0, 0.1), record(2, 0.1))) == [runs[1], runs[3]]


def test_more_trials_extend_a_search_and_fewer_change_nothing() -> None:
    known = by_name(*(record(number, 0.1) for number in range(4)))
    assert [run.name for run in trials_left(tuning(num_trials=6), known)] == ["trial-04", "trial-05"]
    assert trials_left(tuning(num_trials=3), known) == []


def test_optuna_chooses_all_but_the_first_points() -> None:
    runs = trials_left(tuning(num_trials=7, search="tpe"), by_name(record(1, 0.1)))
    assert [run.name for run in runs if run.choice is None] == ["trial-05", "trial-06"]
    assert [run.name for run in runs if run.choice] == ["trial-00", "trial-02", "trial-03", "trial-04"]


def result(config: PipelineConfig, target: StageFolder, *records: Record, was_cut: bool = False) -> TuneResult:
    return result_of(config, target, records, was_cut=was_cut)


def test_the_lowest_error_wins_and_the_others_are_counted(target: StageFolder) -> None:
    found = result(
        tuning(), target,
        record(0, 0.3), record(1, 0.2), record(2, 0.5, "stopped early", epochs=1), record(3, 1.0, "failed", epochs=0),
    )  # fmt: skip
    assert (found.best_trial, found.val_error, found.spread) == ("trial-01", 0.2, None)
    assert found.outcomes == {"finished": 2, "stopped early": 1, "failed": 1}
    told = found.highlights(str)["best trial"]
    assert told.startswith("trial-01 of 4: K 8, T ")
    assert told.endswith("20.00 % validation error (1 stopped early, 1 failed)")
    assert found.table()[1] | {"model.t": 0} == {
        "trial": "trial-01", **found.best.root, "model.t": 0, "seed": 0, "val_error": 0.2, "epochs": 2,
        "outcome": "finished", "seconds": 3.0, "images_per_second": 100.0,
    }  # fmt: skip


def test_a_search_that_loses_more_than_half_of_its_trials_fails_and_says_why(target: StageFolder) -> None:
    failed = [record(number, 1.0, "failed", epochs=0) for number in range(3)]
    with pytest.raises(TrainingError, match=r"3 of 5 trials failed; the first with: CUDA out of memory.*are kept"):
        result(tuning(), target, *failed, record(3, 0.1), record(4, 0.1))
    assert result(tuning(), target, *failed, record(3, 0.1), record(4, 0.1), record(5, 0.2)).val_error == 0.1


def test_a_search_in_which_all_diverge_says_so(target: StageFolder) -> None:
    with pytest.raises(TrainingError, match=r"no trial has a usable error \(2 diverged\).*Lower train\.learning_rate"):
        result(tuning(), target, record(0, 1.0, "diverged"), record(1, 1.0, "diverged"))


def test_several_seeds_decide_by_the_mean_and_report_the_spread(target: StageFolder) -> None:
    config = tuning(seeds=2, num_finalists=2)
    known = by_name(record(0, 0.3), record(1, 0.2), record(2, 0.21), record(3, 0.1, "stopped early", epochs=1))
    assert [each.name for each in finalists(config, known)] == ["trial-01", "trial-02"]
    runs = repeats_left(config, known)
    assert [(run.name, run.seed) for run in runs] == [("trial-01-seed-1", 1), ("trial-02-seed-1", 1)]
    assert [run.choice for run in runs] == [known["trial-01"].choice, known["trial-02"].choice]
    repeats = (record(1, 0.3, seed=1), record(2, 0.23, seed=1))
    assert repeats_left(config, known | by_name(*repeats)) == []
    found = result(config, target, *known.values(), *repeats)
    assert found.best_trial == "trial-02"
    assert found.val_error == pytest.approx(0.22)
    assert found.spread == pytest.approx(0.02 / 2**0.5)
    assert found.num_trials == 4
    assert "22.00 ± 1.41 % validation error over 2 seeds" in found.highlights(str)["best trial"]
    assert repeats_left(tuning(), known) == []


def test_a_finished_search_covers_what_is_asked_for_until_more_is(target: StageFolder) -> None:
    found = result(tuning(), target, *(record(number, 0.1) for number in range(4)))
    for settings, is_covered in (
        ({"num_trials": 4}, True), ({"num_trials": 2}, True), ({"num_trials": 5}, False),
        ({"num_trials": 4, "seeds": 2}, False), ({"num_trials": 4, "num_finalists": 9}, True),
        ({"num_trials": 4, "max_concurrent_trials": 1, "max_minutes": 1}, True),
    ):  # fmt: skip
        assert covers(tuning(**settings), found, target) == is_covered, settings


def test_a_search_that_ran_out_of_time_stands_until_it_gets_more(target: StageFolder) -> None:
    limited = tuning(num_trials=4, max_minutes=2)
    found = result(limited, target, record(0, 0.1), record(1, 1.0, "cut off", epochs=0), was_cut=True)
    assert found.highlights(str)["best trial"].endswith("(1 cut off; the search ended after 2 min)")
    assert covers(limited, found, target)
    assert not covers(tuning(num_trials=4, max_minutes=3), found, target)
    assert not covers(tuning(num_trials=4), found, target)


def test_trials_that_ran_out_of_time_are_trained_again_with_more(target: StageFolder) -> None:
    cut = record(1, 0.3, "out of time", epochs=1).model_copy(update={"minutes_allowed": 2.0})
    assert [cut.has_ended(minutes) for minutes in (0, 1, 2, 3)] == [False, True, True, False]
    assert record(0, 0.1).has_ended(0)
    found = result(tuning(num_trials=2, trial_minutes=2), target, record(0, 0.1), cut)
    covered = [covers(tuning(num_trials=2, trial_minutes=minutes), found, target) for minutes in (0, 1, 2, 3)]
    assert covered == [False, True, True, False]


def test_a_trial_without_a_limit_that_far_exceeded_its_forecast_has_ended(target: StageFolder) -> None:
    slow = record(1, 0.3, "out of time", epochs=1).model_copy(update={"seconds": 7200.0})
    assert [slow.has_ended(minutes) for minutes in (0, 120, 121)] == [True, True, False]
    found = result(tuning(num_trials=2), target, record(0, 0.1), slow)
    assert covers(tuning(num_trials=2), found, target)


def test_a_lost_or_diverged_repeat_does_not_let_a_worse_configuration_win(target: StageFolder) -> None:
    config = tuning(num_trials=2, seeds=3, num_finalists=2)
    worse = [record(1, 0.23), record(1, 0.23, seed=1), record(1, 0.23, seed=2)]
    lost = record(0, 1.0, "failed", epochs=0, seed=2)
    found = result(config, target, record(0, 0.05), record(0, 0.05, seed=1), lost, *worse)
    assert found.best_trial == "trial-00"
    assert found.seeds == 2
    assert not covers(config, found, target)  # the next run repeats what was lost
    diverged = record(0, 1.0, "diverged", seed=2)
    assert result(config, target, record(0, 0.05), record(0, 0.05, seed=1), diverged, *worse).best_trial == "trial-01"
    with pytest.raises(TrainingError, match="2 of 3 trials failed"):
        result(tuning(num_trials=1, seeds=3), target, record(0, 0.05), lost, record(0, 1.0, "failed", epochs=0, seed=1))


def test_known_points_are_not_suggested_again() -> None:
    config = tuning(space={"model.k": [8, 16], "model.t": [0, 1]})
    points = NewPoints(config, [Choice({"model.k": 8, "model.t": 1})])
    suggested = [{"model.k": 8, "model.t": 1}, {"model.k": 16, "model.t": 1}]
    assert points.take(lambda number: suggested[number]).root == suggested[1]
    rest = [points.take(lambda number: suggested[number % 2]) for _ in range(2)]
    assert {str(choice) for choice in rest} == {"K 8, T 0", "K 16, T 0"}


def test_what_a_search_leaves_out_of_a_grid_is_said(target: StageFolder) -> None:
    space = {"model.k": [8, 16], "model.t": [0, 1]}
    assert coverage(tuning(space=space, num_trials=4)) == coverage(tuning(num_trials=9)) == ""
    assert coverage(tuning(space=space, num_trials=3)) == ""  # random draws are not expected to be all there is
    cut = tuning(space=space, num_trials=2, search="grid")
    assert coverage(cut) == "tune.num_trials = 2 ends the grid after 2 of its 4 points"
    assert coverage(tuning(space=space, num_trials=5, search="tpe")) == (
        "tune.space has 4 points, fewer than tune.num_trials = 5: each is tried once"
    )
    found = result(cut, target, record(0, 0.1), record(1, 0.2))
    assert found.highlights(str)["best trial"].startswith("trial-00 of 2 (the grid has 4 points): K 8")
    before = found.model_dump(mode="json", exclude={"num_grid_points"})  # as an earlier version wrote it
    assert TuneResult.model_validate(before).num_grid_points == 0


def test_a_result_stays_short_enough_for_a_command_line(target: StageFolder) -> None:
    one = record(0, 0.1)
    many = [one.model_copy(update={"name": f"trial-{number:02d}"}) for number in range(3000)]
    found = result(tuning(), target, *many)
    assert found.num_trials == 3000
    assert len(found.trials) == MAX_LISTED
    assert len(found.model_dump_json()) < 64_000


def test_all_trials_are_one_parquet_file_that_pandas_reads(target: StageFolder, tmp_path: Path) -> None:
    write_table(target, [record(0, 0.3), record(1, 0.2, "stopped early", epochs=1), record(2, 1.0, "failed", epochs=0)])
    table = pd.read_parquet(tmp_path / "runs/tune-x/trials.parquet").set_index("trial")
    assert list(table["outcome"]) == ["finished", "stopped early", "failed"]
    assert table["model.k"].dtype == "int64"
    assert table.loc["trial-00", "train.learning_rate"] == 0.02
    assert list(table.loc["trial-00", "val_errors"]) == pytest.approx([0.4, 0.3])


@pytest.mark.long
@pytest.mark.parametrize("num_trials", [0, 1, 2, 12])
def test_pictures_are_drawn_of_any_number_of_trials(target: StageFolder, tmp_path: Path, num_trials: int) -> None:
    from rcnn.tune.plots import write_pictures

    trials = [record(number, 0.1 + 0.01 * (number * 5 % 12)) for number in range(num_trials)]
    write_pictures(tuning(), target, [*trials, record(13, 1.0, "failed", epochs=0)], NoTracker())
    pictures = sorted(file.name for file in tmp_path.glob("runs/tune-x/pictures/*"))
    names = ["importance.png", "optimisation_history.png", "parallel_coordinates.png"]
    assert pictures == (names if num_trials else [])


@pytest.mark.long
def test_importance_finds_the_setting_that_matters() -> None:
    from rcnn.tune.plots import importance_of

    config = tuning(space={"model.k": [8], "model.t": [0, 1], "train.learning_rate": {"min": 0.01, "max": 0.1}})
    points = Space(config).first_points(20, search="random")
    trials = [
        record(0, 0.0).model_copy(
            update={"name": f"trial-{i:02d}", "choice": Choice(p), "val_errors": (float(p["train.learning_rate"]), 0.0)}
        )
        for i, p in enumerate(points)
    ]
    shares = importance_of(config, [each.model_copy(update={"epochs": 1}) for each in trials])
    assert next(iter(shares)) == "train.learning_rate"
    assert shares["train.learning_rate"] > 0.8
    assert "model.k" not in shares  # it had one value
    assert importance_of(config, trials) == {}  # the second epoch's errors are all equal


def test_the_table_on_a_terminal_has_the_best_trial_first() -> None:
    screen = SearchScreen(tuning(epochs=4), [record(0, 0.3)], num_planned=2, num_at_once=1, num_rows=400)
    screen.show_epoch("trial-01", record(1, 0.2).choice, {"epoch": 1, "val/error": 0.2, "perf/images_per_second": 10.0})
    screen.show_end(record(2, 0.1))
    late = {"epoch": 4, "val/error": 0.1, "perf/images_per_second": 10.0}
    screen.show_epoch("trial-02", record(2, 0.1).choice, late)
    console = Console(width=120, file=io.StringIO())
    console.print(screen.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "trial-0" in line]
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("trial-02", "2/3", "2/4"), ("trial-01", "1/3", "1/4"), ("trial-00", "2/3", "2/4"),
    ]  # fmt: skip
    names = [line.split("│")[1].strip() for line in text.splitlines() if "trial-0" in line]
    assert names == ["trial-02", "trial-01", "trial-00"]
    assert "2 of 3 trials ended, about 3 s left" in text
    assert text.count("finished") == 2
    assert "1/4" in text
    assert "2 min left" in text  # 3 epochs of 400 images


def test_the_rungs_are_those_of_asha_and_other_rules_have_none() -> None:
    assert rungs_of(tuning(epochs=9, grace_epochs=2)) == [2, 4, 8]
    assert rungs_of(tuning(epochs=9, reduction_factor=3)) == [1, 3, 9]
    assert rungs_of(tuning(early_stopping="none")) == []
    screen = SearchScreen(tuning(early_stopping="none"), [record(0, 0.3)], num_planned=2, num_at_once=1, num_rows=400)
    assert [column.header for column in screen.table().columns] == [
        "trial", "settings", "epoch", "val error", "images/s", "state"
    ]  # fmt: skip


def test_without_a_terminal_each_epoch_is_a_line_and_a_failure_another(caplog: pytest.LogCaptureFixture) -> None:
    with (
        SearchScreen(tuning(), [], num_planned=2, num_at_once=1, num_rows=400) as screen,
        caplog.at_level("INFO", "rcnn"),
    ):
        choice = Choice({"model.k": 8})
        screen.show_epoch("trial-01", choice, {"epoch": 1, "val/error": 0.2, "perf/images_per_second": 10.0})
        screen.show_end(record(3, 1.0, "failed", epochs=0))
    [epoch, failure] = [each.message for each in caplog.records]
    assert epoch.split() == ["trial-01", "K", "8", "epoch", "1/2", "val", "error", "20.00", "%", "10", "images/s"]
    assert failure == "  trial-03 failed: CUDA out of memory"
