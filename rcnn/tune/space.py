"""What is searched: K, T and the learning rate, as the config's `tune` section bounds them."""

from typing import Any

from rcnn.config import PipelineConfig
from rcnn.results import Choice


def own_choice(config: PipelineConfig) -> Choice:
    """The point that the config itself names: it is the first trial, so that a search is compared with no search."""
    return Choice(k=config.model.k, t=config.model.t, learning_rate=config.train.learning_rate)


def trial_config(config: PipelineConfig, choice: Choice) -> PipelineConfig:
    """The config of a trial: the choice's settings, and the search's shorter training."""
    settings: dict[str, Any] = {
        "train.epochs": config.tune.epochs,
        "train.num_rows": config.tune.num_rows or config.train.num_rows,
        "execution.use_gpu": config.tune.gpus_per_trial > 0,
        "execution.triton": config.execution.triton and config.tune.gpus_per_trial > 0,
    }
    return choice.applied_to(config).with_settings(settings)
