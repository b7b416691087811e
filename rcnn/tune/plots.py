"""Pictures of a search: how the error fell, which settings matter, and which values go with a low error.

In: the records of all trials. Out: PNG files, in the search's folder and in its MLflow run.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from rcnn.config import PipelineConfig
from rcnn.ranges import Range, Scalar
from rcnn.results import SHORT_NAMES
from rcnn.storage import StageFolder
from rcnn.tracking import Tracker
from rcnn.tune.ledger import Record
from rcnn.tune.search import searched

BLUE, ORANGE, GREY = "#2a6f97", "#d1495b", "#9aa5ad"
COLOURS = "viridis"  # ordered in lightness too, so that it reads without colour vision; dark is good


def write_pictures(config: PipelineConfig, target: StageFolder, records: Sequence[Record], tracker: Tracker) -> None:
    """Draws the trials that have a usable error, if there are any.

    Raises:
        ClusterError: the storage cannot be written.
    """
    trials = [record for record in searched(config, {each.name: each for each in records}) if record.is_usable]
    if not trials:
        return
    with tempfile.TemporaryDirectory() as folder:
        plot_history(trials, Path(folder, "optimisation_history.png"))
        plot_parallel(config, trials, Path(folder, "parallel_coordinates.png"))
        plot_importance(importance_of(config, trials), common_epoch(trials), Path(folder, "importance.png"))
        target.storage.upload(Path(folder), target.path("pictures"))
        tracker.log_files(Path(folder))


def plot_history(trials: Sequence[Record], file: Path) -> None:
    """Draws each trial's error in the order of the trials, and the lowest one so far."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    numbers = range(1, len(trials) + 1)
    errors = 100 * np.array([trial.val_error for trial in trials])
    for stopped, marker, label in ((False, "o", "ran to the end"), (True, "x", "stopped before")):
        chosen = [i for i, trial in enumerate(trials) if (trial.outcome != "finished") == stopped]
        axes.scatter([numbers[i] for i in chosen], errors[chosen], marker=marker, color=BLUE, s=28, label=label)
    axes.step(numbers, np.minimum.accumulate(errors), where="post", color=ORANGE, label="lowest so far")
    axes.set(xlabel="trial", ylabel="validation error, %", ylim=(0, 1.3 * max(errors.max(), 1)))  # room for the legend
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center")
    _save(figure, [axes], "Validation error of each trial", file)


def plot_importance(shares: dict[str, float], epoch: int, file: Path) -> None:
    """Draws each setting's share of the variance of the error; says so where there is nothing to compare."""
    figure, axes = plt.subplots(figsize=(7, 1.6 + 0.45 * max(len(shares), 2)), layout="constrained")
    if shares:
        names = [_label(name) for name in reversed(shares)]
        bars = axes.barh(names, [100 * share for share in reversed(shares.values())], color=BLUE, height=0.6)
        axes.bar_label(bars, fmt="%.0f %%", padding=3)
        axes.set(xlabel="share of the variance of the error, %", xlim=(0, 112))
    else:
        axes.text(0.5, 0.5, "too few different trials to compare", ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
    _save(figure, [axes], f"Importance for the error after epoch {epoch} (fANOVA)", file)


def common_epoch(trials: Sequence[Record]) -> int:
    """The last epoch that all of them finished: errors after different epochs cannot be compared."""
    return min(trial.epochs for trial in trials)


def importance_of(config: PipelineConfig, trials: Sequence[Record]) -> dict[str, float]:
    """Each setting's share of the variance, the largest first, by Optuna's fANOVA; empty where there is none to share."""
    names = [name for name in sorted(config.tune.space) if len({trial.choice.root[name] for trial in trials}) > 1]
    errors = [trial.val_errors[common_epoch(trials) - 1] for trial in trials]
    if len(trials) < 3 or not names or len(set(errors)) < 2:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    distributions = {name: _distribution(trials, name) for name in names}
    for trial, error in zip(trials, errors, strict=True):
        point = {name: trial.choice.root[name] for name in names}
        study.add_trial(optuna.trial.create_trial(params=point, distributions=distributions, value=error))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in shares.items()}


def _distribution(trials: Sequence[Record], name: str) -> Any:
    """Over the values that were tried: fANOVA splits what lies between them."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values: list[Any] = [trial.choice.root[name] for trial in trials]
    if all(isinstance(value, float) for value in values):
        return FloatDistribution(min(values), max(values))
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return IntDistribution(min(values), max(values))
    return CategoricalDistribution(sorted(set(values), key=str))


def plot_parallel(config: PipelineConfig, trials: Sequence[Record], file: Path) -> None:
    """Draws each trial as a line over the settings, coloured by its error; the best one is thick."""
    names = sorted(config.tune.space)
    figure, axes = plt.subplots(figsize=(2.6 + 1.7 * len(names), 4.2), layout="constrained")
    errors = 100 * np.array([trial.val_error for trial in trials])
    scale = plt.Normalize(errors.min(), max(errors.max(), errors.min() + 1))
    colours = plt.get_cmap(COLOURS)
    heights = [_Axis(config, trials, name) for name in names]
    for index in np.argsort(-errors, kind="stable"):
        line = [axis.height(trials[index].choice.root[name]) for axis, name in zip(heights, names, strict=True)]
        is_best = index == int(np.argmin(errors))
        axes.plot(
            range(len(names)), line, color=colours(scale(errors[index])), lw=3.2 if is_best else 1.2,
            marker="o", ms=6 if is_best else 4, zorder=3 if is_best else 2,
        )  # fmt: skip
    for position, axis in enumerate(heights):
        axes.axvline(position, color=GREY, lw=0.8, zorder=1)
        for height, text in axis.ticks():
            axes.text(position + 0.04, height, text, fontsize=8, va="center", zorder=4,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8})  # fmt: skip
    axes.set(xlim=(-0.25, len(names) - 0.45), ylim=(-0.06, 1.06), yticks=[])
    axes.set_xticks(range(len(names)), [_label(name) for name in names])
    figure.colorbar(plt.cm.ScalarMappable(scale, colours), ax=axes, label="validation error, %")
    _save(figure, [axes], "Settings of each trial (thick: the best)", file, grid=False)


class _Axis:
    """One setting of the parallel coordinates: values to heights from 0 to 1."""

    def __init__(self, config: PipelineConfig, trials: Sequence[Record], name: str):
        tried: list[Any] = [trial.choice.root[name] for trial in trials]
        values = config.tune.space[name]
        self.is_range = isinstance(values, Range)
        self.is_log = isinstance(values, Range) and values.log
        self.low = self.high = 0.0
        self.listed: list[Scalar] = []
        if isinstance(values, Range):
            self.low, self.high = min([values.min, *tried]), max([values.max, *tried])
        else:
            self.listed = list(values)

    def height(self, value: Any) -> float:
        """Where the value is; a list's values stand at equal distances."""
        if not self.is_range:
            return self.listed.index(value) / (len(self.listed) - 1) if len(self.listed) > 1 else 0.5
        low, high, at = (np.log(x) if self.is_log else x for x in (self.low, self.high, value))
        return float((at - low) / (high - low))

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and texts."""
        if not self.is_range:
            return [(self.height(value), str(value)) for value in self.listed]
        spaced = np.geomspace if self.is_log else np.linspace
        return [(self.height(value), f"{value:.2g}") for value in spaced(self.low, self.high, 4)]


def _label(name: str) -> str:
    return SHORT_NAMES.get(name, name)


def _save(figure: Any, many_axes: Sequence[Any], title: str, file: Path, *, grid: bool = True) -> None:
    for axes in many_axes:
        axes.spines[["top", "right"]].set_visible(False)
        if grid:
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=130)
    plt.close(figure)
