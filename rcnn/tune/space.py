"""What is searched: K, T and the learning rate, as the config's `tune` section bounds them."""

from typing import Any

from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError
from rcnn.results import Choice


def require_searchable(config: PipelineConfig) -> None:
    """Checks that the network reads what is searched, before Ray starts.

    Raises:
        ConfigError: it does not.
    """
    if not {"k", "t"} <= set(config.model.reads):
        raise ConfigError(
            f"searches over K and T, and model.network = {config.model.network!r} does not read both",
            where="tune.enabled = true",
            remedy="Set tune.enabled to false",
        )


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
