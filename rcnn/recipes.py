"""Named, complete configs. A new experiment is a new function here.

Each docstring says in a line what the recipe is for, and then what it costs and what it reaches, with the machine on which
that was measured.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rcnn.config import AugmentConfig, DataConfig, ExecutionConfig, ModelConfig, PipelineConfig, TrainConfig, TuneConfig
from rcnn.errors import ConfigError
from rcnn.ranges import Range
from rcnn.section import shown
from rcnn.settings import build_config, read_config_file


def demo() -> PipelineConfig:
    """The whole pipeline on 5,000 real digits, offline.

    Costs: 3 to 4 min on 2 CPU cores.
    Reaches: 2.0 to 2.6 % test error on 1,000 rows.
    """
    return PipelineConfig(
        recipe="demo",
        data=DataConfig(source="mnist-sample"),
        model=ModelConfig(k=32, t=1, dropout=0.0),
        train=TrainConfig(
            epochs=14,
            batch_size=32,
            learning_rate=0.03,
            weight_decay=5e-4,
            schedule="one_cycle",
            one_cycle_warmup=0.1,
            clip_norm=2.0,
        ),
        augment=AugmentConfig(max_shift=2),
        execution=ExecutionConfig(cpus_per_worker=2),
        tune=TuneConfig(
            num_trials=5,
            space={
                "model.k": (16, 32),
                "model.t": (1, 2),
                "train.learning_rate": Range(min=0.01, max=0.06, log=True),
            },
            epochs=3,
            num_rows=1800,
        ),
    )


def debug_tiny() -> PipelineConfig:
    """The smallest run that touches every stage: for tests, and to see whether an installation works.

    Costs: under 2 min on 2 CPU cores, nearly all of it starting processes.
    Reaches: nothing; the model is too small to learn.
    """
    return PipelineConfig(
        recipe="debug_tiny",
        data=DataConfig(source="mnist-sample", test_fraction=0.1, val_fraction=0.1),
        model=ModelConfig(k=8, t=1, dropout=0.1),
        train=TrainConfig(epochs=2, batch_size=32, learning_rate=0.02, num_rows=320, clip_norm=2.0),
        tune=TuneConfig(
            num_trials=2,
            space={
                "model.k": (8,),
                "model.t": (0, 1),
                "train.learning_rate": Range(min=0.005, max=0.1, log=True),
            },
            epochs=2,
            num_rows=160,
        ),
    )


def mnist_rcnn32_quick() -> PipelineConfig:
    """RCNN-32 on all of MNIST, in a short one-cycle run.

    Costs: 15 min on 2 CPU cores.
    Reaches: 0.54 % test error (one run).
    """
    return PipelineConfig(
        recipe="mnist_rcnn32_quick",
        data=DataConfig(source="mnist", val_fraction=1 / 12),
        model=ModelConfig(k=32, t=3, dropout=0.0),
        train=TrainConfig(
            epochs=6,
            batch_size=64,
            learning_rate=0.04,
            weight_decay=5e-4,
            schedule="one_cycle",
            clip_norm=2.0,
        ),
        augment=AugmentConfig(max_shift=2),
        execution=ExecutionConfig(cpus_per_worker=2),
        tune=TuneConfig(enabled=False),
    )


def mnist_rcnn64() -> PipelineConfig:
    """RCNN-64 on MNIST with the published schedule: SGD, the rate cut by 10 when validation error stalls.

    Costs: hours on a CPU (73.5 million multiply-adds an image forward): meant for a GPU; not run yet.
    Reaches: 0.32 % test error in the paper (an unverified figure); not measured here.
    """
    return PipelineConfig(
        recipe="mnist_rcnn64",
        data=DataConfig(source="mnist", val_fraction=1 / 6),
        model=ModelConfig(k=64, t=3, dropout=0.2),
        train=TrainConfig(epochs=60, batch_size=64, learning_rate=0.01, clip_norm=2.0),
        execution=ExecutionConfig(use_gpu=True, keep_checkpoints=3),
        tune=TuneConfig(
            num_trials=12,
            space={
                "model.k": (32, 64, 96),
                "model.t": (1, 2, 3),
                "train.learning_rate": Range(min=3e-3, max=0.1, log=True),
            },
            epochs=8,
            gpus_per_trial=0.5,
        ),
    )


RECIPES: dict[str, Callable[[], PipelineConfig]] = {
    recipe.__name__: recipe for recipe in (demo, debug_tiny, mnist_rcnn32_quick, mnist_rcnn64)
}
DEFAULT_RECIPE = "demo"


def resolve_config(
    recipe: str | None = None,
    *,
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Iterable[str] = (),
) -> PipelineConfig:
    """The config that a user asks for: a recipe, and on it a file, the environment and `--set` values, in that order.

    A file may name its own `recipe`, over which the argument wins; without any, settings fall on the demo.

    Raises:
        ConfigError: an unknown recipe or setting, or a value out of bounds.
    """
    read = None if file is None else read_config_file(file)
    base = RECIPES[DEFAULT_RECIPE]
    if read is not None and read.names_recipe:
        base = _recipe(read.recipe, where=read.path)
    if recipe is not None:
        base = _recipe(recipe, where="--recipe")
    return build_config(base(), file=read, environ=environ, overrides=overrides)


def _recipe(name: Any, *, where: str) -> Callable[[], PipelineConfig]:
    if name == "custom":
        return PipelineConfig  # a config that grew from no recipe
    if isinstance(name, str) and name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=1) if isinstance(name, str) else []
    hint = f"Did you mean {near[0]!r}? " if near else ""
    fault = f"there is no recipe {shown(name)}"
    if where != "--recipe":  # a file
        fault = f"recipe = {shown(name)}: {fault}" if isinstance(name, str) else f"recipe is {shown(name)}, not a name"
    raise ConfigError(fault, where=where, remedy=f"{hint}Choose from {', '.join(RECIPES)}")


def describe(name: str) -> dict[str, str]:
    """What the recipe is for, what it costs and what it reaches, from its docstring."""
    summary, _, rest = inspect.getdoc(RECIPES[name]).partition("\n")  # type: ignore[union-attr]
    found = dict(re.findall(r"^(Costs|Reaches): (.+?)$", rest, flags=re.MULTILINE))
    return {"recipe": name, "what": summary, "costs": found["Costs"], "reaches": found["Reaches"]}
