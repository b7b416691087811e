"""A real search on Ray Tune."""

from typing import Any

import pytest

from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError, TrainingError
from rcnn.results import Choice, IngestResult, TuneResult
from rcnn.storage import StageFolder, Storage
from rcnn.tracking import NoTracker
from rcnn.tune.space import own_choice, require_searchable, trial_config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


class Family(NoTracker):
    """Remembers children by name, with their parameters and epochs."""

    def __init__(self) -> None:
        self.children: dict[str, Family] = {}
        self.params: dict[str, Any] = {}
        self.epochs: list[int] = []

    def child(self, name: str) -> "Family":
        return self.children.setdefault(name, Family())

    def log_params(self, params: Any) -> None:
        self.params |= params

    def log_metrics(self, metrics: Any, *, step: int = 0) -> None:
        self.epochs.append(step)


def tune(config: PipelineConfig, digits: IngestResult, folder: str, tracker: Any) -> TuneResult:
    from rcnn.tune.ray_tuner import run_tune

    return run_tune(config, digits, StageFolder(Storage(config.storage), folder), tracker)


def test_bad_trials_are_stopped_early_and_the_best_one_wins(tiny_config: PipelineConfig, digits: IngestResult) -> None:
    config = tiny_config.with_settings(
        {
            "model.k": 16, "model.dropout": 0, "train.learning_rate": 0.03, "train.batch_size": 16,
            "tune.num_trials": 5, "tune.k": [8], "tune.t": [0, 1], "tune.epochs": 4, "tune.num_rows": 640,
            "tune.learning_rate_min": 1e-6, "tune.learning_rate_max": 1e-5,
        }
    )  # fmt: skip
    family = Family()
    result = tune(config, digits, "runs/asha", family)
    stopped = [trial for trial in result.trials if trial.outcome == "stopped early"]
    assert stopped
    assert all(1 <= trial.epochs < 4 for trial in stopped)
    assert result.best == own_choice(config)  # the only one that can learn, and the first
    assert result.best_trial == "trial-00"
    assert [trial.name for trial in result.trials] == [f"trial-{number:02d}" for number in range(5)]
    assert {name: max(child.epochs) for name, child in family.children.items()} == {
        trial.name: trial.epochs for trial in result.trials
    }
    assert all(1e-6 <= trial.choice.learning_rate <= 1e-5 for trial in result.trials[1:])
    assert family.children["trial-03"].params == result.trials[3].choice.model_dump()


def test_a_search_in_which_all_diverge_says_so(tiny_config: PipelineConfig, digits: IngestResult) -> None:
    config = tiny_config.with_settings(
        {
            "train.learning_rate": 9.9,
            "train.weight_decay": 1000,
            "train.clip_norm": 0,
            "tune.learning_rate_min": 9,
            "tune.learning_rate_max": 10,
        }
    )
    with pytest.raises(TrainingError, match=r"all 2 trials failed or diverged.*learning_rate_max"):
        tune(config, digits, "runs/diverging-search", NoTracker())


def test_a_finished_search_is_taken_up_without_new_trials(tiny_config: PipelineConfig, digits: IngestResult) -> None:
    first = tune(tiny_config, digits, "runs/search", NoTracker())
    family = Family()
    again = tune(tiny_config, digits, "runs/search", family)
    assert family.children == {}
    assert again == first


def test_trials_without_a_gpu_do_without_its_kernel(tiny_config: PipelineConfig) -> None:
    config = tiny_config.with_settings({"execution.use_gpu": True, "execution.triton": True})
    choice = Choice(k=24, t=2, learning_rate=0.5)
    assert not trial_config(config, choice).execution.triton
    assert trial_config(config.with_settings({"tune.gpus_per_trial": 0.5}), choice).execution.triton


def test_a_choice_changes_three_settings_and_a_trial_its_length(tiny_config: PipelineConfig) -> None:
    config = trial_config(tiny_config, Choice(k=24, t=2, learning_rate=0.5))
    assert (config.model.k, config.model.t, config.train.learning_rate) == (24, 2, 0.5)
    assert (config.train.epochs, config.train.num_rows) == (2, 160)
    assert config.data == tiny_config.data


def test_a_network_that_does_not_read_what_is_searched_is_refused(tiny_config: PipelineConfig) -> None:
    unset = {"model.network": "nin", "model.k": 32, "model.t": 3, "model.dropout": 0.2}
    with pytest.raises(ConfigError, match=r"tune\.enabled = true: searches over K and T, and model\.network = 'nin'"):
        require_searchable(tiny_config.with_settings(unset))
