"""Real searches on Ray Tune."""

import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rcnn.config import PipelineConfig
from rcnn.errors import DataError, TrainingError
from rcnn.results import IngestResult, TuneResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from rcnn.tune.budget import Budget
from rcnn.tune.ledger import FOLDER, Record, read_records, write_record
from rcnn.tune.search import trials_left
from rcnn.tune.space import Space

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


class Family(NoTracker):
    """Remembers children by name, with their parameters, tags and epochs, and the files of the run above them."""

    def __init__(self) -> None:
        self.children: dict[str, Family] = {}
        self.config: PipelineConfig | None = None
        self.data = self.text = ""
        self.tags: dict[str, str] = {}
        self.epochs: list[int] = []
        self.files: set[str] = set()
        self.status = "RUNNING"

    def unfinished_children(self) -> list[str]:
        return [name for name, child in self.children.items() if child.status == "RUNNING"]

    def close_children(self, ended: Any) -> None:
        for name in self.unfinished_children():
            self.children[name].set_tags(ended.get(name, {}))
            self.children[name].finish(failed=name not in ended)

    def finish(self, *, failed: bool = False, killed: bool = False) -> None:
        self.status = "FAILED" if failed else "FINISHED"

    def child(self, name: str, config: PipelineConfig | None = None) -> "Family":
        child = self.children.setdefault(name, Family())
        child.config, child.data = config, self.data
        return child

    def log_data(self, summary: Any, uri: str, *, context: str) -> None:
        self.data = summary["name"]

    def describe(self, text: str, *, name: str = "") -> None:
        self.text = text

    def set_tags(self, tags: Any) -> None:
        self.tags |= tags

    def log_metrics(self, metrics: Any, *, step: int = 0) -> None:
        self.epochs.append(step)

    def log_files(self, folder: Path) -> None:
        self.files |= {file.name for file in folder.iterdir()}


def folder_of(config: PipelineConfig, name: str) -> StageFolder:
    return StageFolder(Storage(config.storage), f"runs/{name}")


def tune(config: PipelineConfig, digits: IngestResult, name: str, tracker: Any = None) -> TuneResult:
    from rcnn.tune.ray_tuner import run_tune

    return run_tune(config, digits, folder_of(config, name), tracker or NoTracker())


def kill_after(target: StageFolder, records: dict[str, Record], *kept: str) -> None:
    """Leaves what a kill -9 leaves: some records, half a record's draft, and Ray Tune's unfinished folders."""
    target.storage.delete(target.path(FOLDER))
    for name in kept:
        write_record(target, records[name])
    target.storage.write_text(target.path(f"{FOLDER}/trial-09.json.1a2b3c4d.part"), '{"name": "tri')
    for host in (socket.gethostname(), "elsewhere"):
        target.storage.write_text(target.path(f"ray-{host}-0a1b2c3d/tune/tuner.pkl"), "half a pick")


def test_bad_trials_are_stopped_and_an_interrupted_search_repeats_no_ended_trial_and_is_extended(
    tiny_config: PipelineConfig, digits: IngestResult
) -> None:
    config = tiny_config.with_settings(
        {
            "model.dropout": 0, "train.learning_rate": 0.03, "train.batch_size": 16,
            "tune.num_trials": 4, "tune.epochs": 4, "tune.num_rows": 640, "tune.max_concurrent_trials": 1,
            # Two settings that no code names: of the values, only the config's own lets the network learn, and 1000 diverges.
            "tune.space": {"train.weight_decay": [1e-4, 0.5, 1, 2, 4, 1000], "augment.max_shift": [0, 1]},
        }
    )  # fmt: skip
    target, family = folder_of(config, "asha"), Family()
    result = tune(config, digits, "asha", family)
    assert result.best.root["train.weight_decay"] == 1e-4
    assert result.outcomes["stopped early"] >= 1
    assert (result.trials[2].outcome, result.trials[2].val_error) == ("diverged", 1.0)
    records = read_records(target)
    assert list(records) == [f"trial-{number:02d}" for number in range(4)]
    assert {name: max(child.epochs, default=0) for name, child in family.children.items()} == {
        trial.name: trial.epochs for trial in result.trials
    }
    last, choice = family.children["trial-03"], records["trial-03"].choice
    assert last.config is not None
    assert last.config.values_of(*choice.root, "train.epochs") == choice.root | {"train.epochs": 4}
    assert last.data == "mnist-sample"
    assert last.text.startswith(f"{choice}, seed 0: ")
    assert family.children["trial-00"].tags == {"outcome": "finished"}
    assert family.unfinished_children() == []
    assert family.files == {"optimisation_history.png", "importance.png", "parallel_coordinates.png"}

    kill_after(target, records, "trial-00", "trial-02")
    family = Family()
    left = family.child("trial-02")  # the ledger has it, and its MLflow run was still open
    given_up = family.child("trial-77")
    extended = tune(config.with_settings({"tune.num_trials": 5}), digits, "asha", family)
    assert (left.status, left.tags, given_up.status) == ("FINISHED", {"outcome": "diverged"}, "FAILED")
    assert set(family.children) - {"trial-02", "trial-77"} == {"trial-01", "trial-03", "trial-04"}
    again = read_records(target)
    assert {name: again[name].choice for name in records} == {name: records[name].choice for name in records}
    assert (again["trial-00"], again["trial-02"]) == (records["trial-00"], records["trial-02"])
    assert [trial.name for trial in extended.trials] == [f"trial-{number:02d}" for number in range(5)]
    assert target.storage.list_folders(target.name) == ["pictures", "trials"]

    family = Family()
    assert tune(config.with_settings({"tune.num_trials": 5}), digits, "asha", family).trials == extended.trials
    assert family.children == {}


@pytest.mark.thorough
def test_optuna_learns_from_the_ledger_and_the_best_are_repeated_with_other_seeds(
    tiny_config: PipelineConfig, digits: IngestResult
) -> None:
    config = tiny_config.with_settings(
        {
            "tune.search": "tpe", "tune.early_stopping": "median", "tune.num_trials": 6, "tune.epochs": 1,
            "tune.seeds": 2, "tune.num_finalists": 1, "tune.max_concurrent_trials": 1,  # fewer processes that import torch
            "tune.space": {"model.k": {"min": 4, "max": 8}, "train.learning_rate": {"min": 1e-3, "max": 0.1, "log": True}},
        }
    )  # fmt: skip
    result = tune(config, digits, "tpe")
    assert result.outcomes == {"finished": 6}
    assert result.spread is not None
    assert [trial.seed for trial in result.trials] == [0] * 6 + [1]
    assert result.trials[-1].name == f"{result.best_trial}-seed-1"
    assert len({str(trial.choice) for trial in result.trials[:6]}) == 6
    assert all(4 <= trial.choice.root["model.k"] <= 8 for trial in result.trials)
    family = Family()
    extended = tune(config.with_settings({"tune.num_trials": 7}), digits, "tpe", family)
    assert "trial-06" in family.children
    assert extended.trials[:6] == result.trials[:6]


class Clock(Family):
    """A clock that leaps ahead when the first epoch is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def child(self, name: str, config: PipelineConfig | None = None) -> "Clock":
        return self

    def log_metrics(self, metrics: Any, *, step: int = 0) -> None:
        self.now = 3600.0


@pytest.mark.thorough
def test_the_search_ends_in_time_and_marks_what_it_cut_off(
    tiny_config: PipelineConfig, digits: IngestResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("rcnn.tune.budget.time", clock)
    long = {"tune.epochs": 500, "tune.max_minutes": 1, "tune.early_stopping": "none", "tune.max_concurrent_trials": 1}
    config = tiny_config.with_settings(long)
    result = tune(config, digits, "cut", clock)
    assert result.outcomes == {"cut off": 1}
    assert 0 < result.trials[0].epochs < 500
    assert result.minutes_allowed == 1
    assert Budget(folder_of(config, "cut"), max_minutes=1).is_spent()  # the next attempt has no more of it
    assert read_records(folder_of(config, "cut")) == {}  # the next attempt trains it again


@pytest.mark.thorough
def test_a_trial_ends_at_its_own_limit_with_its_last_epoch(tiny_config: PipelineConfig, digits: IngestResult) -> None:
    for minutes in (
        0.1,
        0.4,
        1.6,
    ):  # its start counts: on a busy machine, that alone may take longer than the first limit
        config = tiny_config.with_settings({"tune.epochs": 500, "tune.trial_minutes": minutes, "tune.num_trials": 1})
        with suppress(TrainingError):  # no epoch in that time; with a higher limit the trial is trained again
            result = tune(config, digits, "short-trials")
            break
    assert result.outcomes == {"out of time": 1}
    assert result.val_error == read_records(folder_of(config, "short-trials"))["trial-00"].val_errors[-1] < 1


def test_a_fault_that_all_trials_share_ends_the_search_with_its_own_line(
    tiny_config: PipelineConfig, digits: IngestResult
) -> None:
    config = tiny_config.with_settings({"train.batch_size": 200, "tune.num_trials": 9, "tune.max_concurrent_trials": 1})
    family = Family()
    with pytest.raises(DataError, match="fewer than one batch"):
        tune(config, digits, "too-few-rows", family)
    assert len(family.children) <= 3  # some may start before the first one's error is read


@pytest.mark.slow
def test_a_trial_of_two_workers_is_trained_limited_and_its_workers_error_ends_the_search(
    tiny_config: PipelineConfig, digits: IngestResult
) -> None:
    pair = {"tune.workers_per_trial": 2, "tune.num_trials": 2, "tune.epochs": 1}
    result = tune(tiny_config.with_settings(pair), digits, "pairs")
    assert result.outcomes == {"finished": 2}
    assert all(trial.epochs == 1 and trial.val_error < 1 for trial in result.trials)
    limited = pair | {"tune.epochs": 500, "tune.trial_minutes": 0.05, "tune.num_trials": 1}
    assert tune(tiny_config.with_settings(limited), digits, "limited-pairs").outcomes == {"out of time": 1}
    with pytest.raises(DataError, match="fewer than one batch"):
        tune(tiny_config.with_settings(pair | {"train.batch_size": 200}), digits, "pairs-of-too-few-rows")


def test_optuna_never_suggests_a_point_twice_and_tries_all_of_a_small_space(tiny_config: PipelineConfig) -> None:
    from rcnn.tune.ray_tuner import _Queue

    space = {"model.k": {"min": 4, "max": 8}, "train.momentum": {"min": 0.1, "max": 0.5, "step": 0.1}}
    config = tiny_config.with_settings({"tune.search": "tpe", "tune.num_trials": 99, "tune.space": space})
    runs = trials_left(config, {})
    assert len(runs) == 25
    queue, given = _Queue(config, runs, []), []
    for number in range(25):
        given.append(queue.suggest(f"id-{number}")["choice"])
        error = abs(given[-1]["model.k"] - 5) + given[-1]["train.momentum"]
        queue.on_trial_complete(f"id-{number}", {"val/error": error})
    assert len({str(choice) for choice in given}) == 25
    assert all(choice in Space(config) for choice in given)
