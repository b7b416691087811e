"""THE TABLE of the paper's tables: a row names the experiments that stand side by side, and what a small budget changes.

In: `EXPERIMENTS` of `recipes.py`. Out: cells, each an experiment with one seed, whose config is that of an ordinary pipeline.
"""

import fnmatch
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError
from rcnn.recipes import EXPERIMENTS, MODERN, MODERN_PARTS, Experiment
from rcnn.settings import build_config

EVERY = {each.name: each for group in EXPERIMENTS.values() for each in group}
BUDGETS = ("full", "small")
SMALL = {
    "execution.use_gpu": False,
    "execution.cpus_per_worker": 1,  # two trainings of one thread end a tenth sooner than two of two threads in turn
    "train.schedule": "one_cycle",
    "train.weight_decay": 5e-4,
    "train.clip_norm": 2.0,
}
"""Settings that small budgets share."""
NOT_OF_THE_CELL = ("model.", "seed", "recipe")
"""What a cell is about: `--set` must not change it."""


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: above it.
        names: its experiments, in order.
        small_names: those of the small budget; empty: all of them.
        small: settings of the small budget, by dotted name; the network must read those of `model`.
        small_modern: what it changes further in trainings of our own kind (`Experiment.is_modern`).
        small_divisor: the small budget divides K by this.
        small_width: its `model.width` of networks without K, by name: that at which they have as many parameters.
    """

    title: str
    names: tuple[str, ...]
    small_names: tuple[str, ...] = ()
    small: Mapping[str, Any] = field(default_factory=dict)
    small_modern: Mapping[str, Any] = field(default_factory=dict)
    small_divisor: int = 1
    small_width: Mapping[str, float] = field(default_factory=dict)

    def experiments(self, budget: str) -> list[Experiment]:
        """The experiments of a budget."""
        return [EVERY[name] for name in (self.small_names if budget == "small" and self.small_names else self.names)]


# What 2 CPU cores train in minutes a cell: a third of the maps, 10,000 images, the same schedule for all networks.
_SMALL_CIFAR: dict[str, Any] = SMALL | {
    "data.val_fraction": 0.1,
    "train.num_rows": 10_000,
    "train.epochs": 10,
    "train.learning_rate": 0.03,
    "train.nesterov": False,
    "train.with_validation": False,
}
_SMALL_MNIST: dict[str, Any] = SMALL | {
    "data.val_fraction": 1 / 12,
    "train.epochs": 14,
    "train.learning_rate": 0.04,
    "train.ema_decay": 0.999,
    "train.with_validation": True,
}


def _names(data: str, *ends: str) -> tuple[str, ...]:
    return tuple(f"{data}_{end}" for end in ends)


TABLES: dict[str, Table] = {
    "cifar10": Table(
        "CIFAR-10, no augmentation",
        _names("cifar10", "rcnn96", "rcnn128", "rcnn160", "nin", "maxout"),
        small=_SMALL_CIFAR,
        small_names=_names("cifar10", "rcnn96", "rcnn128", "rcnn160"),
        small_divisor=3,
    ),
    "cifar10-augmented": Table(
        "CIFAR-10, augmented",
        _names("cifar10_augmented", "rcnn96", "rcnn128", "rcnn160", "rcnn_bn96", "rcnn_bn128", "rcnn_bn160", "nin", "maxout"),
        small=_SMALL_CIFAR,
        small_names=_names("cifar10_augmented", "rcnn96", "rcnn128", "rcnn160", "rcnn_bn96"),
        small_divisor=3,
    ),
    "cifar100": Table(
        "CIFAR-100, no augmentation",
        _names("cifar100", "rcnn96", "rcnn128", "rcnn160", "nin", "maxout"),
        small=_SMALL_CIFAR,
        small_names=_names("cifar100", "rcnn96", "rcnn128", "rcnn160"),
        small_divisor=3,
    ),
    "mnist": Table(
        "MNIST",
        _names("mnist", "rcnn32", "rcnn64", "rcnn96", "modern_rcnn32", "modern_rcnn64", "modern_rcnn96", "nin", "maxout"),
        small=_SMALL_MNIST,
        small_modern={"train.epochs": MODERN["mnist"]["train.epochs"]},  # shifted digits are learnt more slowly
        small_names=_names("mnist", "rcnn32", "modern_rcnn32", "rcnn64", "modern_rcnn64"),
    ),
    "svhn": Table(
        "SVHN",
        _names("svhn", "rcnn128", "rcnn160", "rcnn192", "nin", "maxout"),
        small=_SMALL_CIFAR | {"data.svhn_extra": False},
        small_names=_names("svhn", "rcnn128", "rcnn160", "rcnn192"),
        small_divisor=4,
    ),
    "modern": Table(
        "CIFAR-10, trained in our own way, and without each of its parts",
        (*_names("cifar10_modern", "rcnn96", *(f"rcnn96_no_{part}" for part in MODERN_PARTS)), "cifar10_augmented_rcnn96"),
        small=_SMALL_CIFAR,
        small_divisor=3,
    ),
    "t-ablation": Table(
        "Recurrence on CIFAR-10: RCNN, the recursive network (rCNN) and the wide one (WCNN)",
        _names(
            "cifar10", "rcnn96_t0", "rcnn96_t1", "rcnn96_t2", "rcnn96", "recursive96_t1", "recursive96_t2", "recursive96",
            "wide128", "rcnn_bn96", "nin", "maxout",
        ),
        small=_SMALL_CIFAR,
        small_divisor=3,
        small_width={"nin": 0.275, "maxout": 0.07},  # 76,537 and 80,262 parameters beside the 76,618 of RCNN-32
    ),
}  # fmt: skip
PARAMETERS = "parameters"
"""A table of its own kind: it trains nothing."""
TABLE_NAMES = (*TABLES, PARAMETERS)


@dataclass(frozen=True)
class Cell:
    """One training: an experiment and a seed.

    Attributes:
        experiment: what the paper says of it.
        config: of an ordinary pipeline.
    """

    experiment: Experiment
    config: PipelineConfig

    @property
    def title(self) -> str:
        """The network as people name it."""
        return self.config.model.title

    @property
    def name(self) -> str:
        """For files and lines of progress."""
        return f"{self.experiment.name}-seed{self.config.seed}"

    @property
    def is_comparable(self) -> bool:
        """Whether it trains what the paper trains: the network at its size, on all images of that data set."""
        ours, theirs = self.config, self.experiment.config()
        same_images = ours.data.source == theirs.data.source and ours.data.svhn_extra == theirs.data.svhn_extra
        of_network = ("network", "k", "t", "crop", "width")
        return (
            same_images
            and not ours.train.num_rows
            and all(getattr(ours.model, name) == getattr(theirs.model, name) for name in of_network)
        )


def cells_of(
    name: str,
    *,
    budget: str = "full",
    num_seeds: int = 1,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> list[Cell]:
    """All cells of a table, seed by seed, so that each row has a figure early.

    Args:
        name: a key of `TABLES`.
        budget: "full": the experiments as published; "small": what 2 CPU cores train in an hour or two.
        num_seeds: seeds 0, 1, ... of each experiment.
        overrides: settings (`SECTION.FIELD=VALUE`) of all cells.
        only: patterns (`*rcnn32*`) of experiments; the others are left out.
        environ: `RCNN_...` variables, as for other commands.

    Raises:
        ConfigError: a setting is wrong or not one of all cells, or a pattern fits no experiment.
    """
    _check_overrides(overrides)
    table = TABLES[name]
    experiments = _chosen(table.experiments(budget), only)
    configs = [_config_of(each, table, budget, overrides, environ or {}) for each in experiments]
    return [
        Cell(experiment, config.with_settings({"seed": seed}).rooted())
        for seed in range(num_seeds)
        for experiment, config in zip(experiments, configs, strict=True)
    ]


def _check_overrides(overrides: Sequence[str]) -> None:
    for text in overrides:
        if text.startswith(NOT_OF_THE_CELL):
            raise ConfigError(
                "differs from cell to cell, so it cannot be set for all of them",
                where=f"--set {text}",
                remedy="Leave it out; `rcnn evaluate --recipe NAME --set ...` trains one experiment in another way",
            )


def _chosen(experiments: Sequence[Experiment], only: Sequence[str]) -> list[Experiment]:
    for pattern in only:
        if not any(fnmatch.fnmatch(each.name, pattern) for each in experiments):
            names = ", ".join(each.name for each in experiments)
            raise ConfigError(f"fits none of {names}", where=f"--only {pattern}", remedy="Use a name, or a pattern")
    return [each for each in experiments if not only or any(fnmatch.fnmatch(each.name, pattern) for pattern in only)]


def _config_of(
    experiment: Experiment, table: Table, budget: str, overrides: Sequence[str], environ: Mapping[str, str]
) -> PipelineConfig:
    config = experiment.config()
    if budget == "small":
        settings = {**table.small, **(table.small_modern if experiment.is_modern else {})}
        if experiment.k:
            settings["model.k"] = round(experiment.k / table.small_divisor)
        elif experiment.network in table.small_width:
            settings["model.width"] = table.small_width[experiment.network]
        config = config.with_settings(settings)
    return build_config(config, file=None, environ=environ, overrides=overrides)


def num_parallel(config: PipelineConfig) -> int:
    """Cells that fit beside each other on this machine; on a cluster, Ray lets those wait for which there is no room."""
    if config.ray.address:
        return CELLS_ON_A_CLUSTER
    return max(1, (os.cpu_count() or 1) // (config.execution.num_workers * config.execution.cpus_per_worker))


CELLS_ON_A_CLUSTER = 8
