"""Pictures of a training and of its result, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which chooses a window system for the whole process
from torch import Tensor

from rcnn.data.fonts import fonts_for, readable
from rcnn.evaluate.figures import wilson
from rcnn.text import printable

LARGEST_INCHES, MOST_NAMES, MAX_NAME_LENGTH = 20.0, 100, 24
BLUE, ORANGE = "#2a6f97", "#d1495b"
SHARE_OF_A_CLASS = 0.05
"""Of a class's rows in one wrong cell: the darkest colour at least, so that a good model's few mistakes look few."""


def plot_confusion(confusion: Tensor, classes: Sequence[str], title: str, file: Path) -> None:
    """Draws a confusion matrix (classes, classes); colour shows the mistakes, off the diagonal."""
    names = [_short(readable(printable(name), label)) for label, name in enumerate(classes)]
    with fonts_for(names):
        _draw_confusion(confusion, names, title, file)


def _draw_confusion(confusion: Tensor, names: Sequence[str], title: str, file: Path) -> None:
    mistakes = confusion.float().fill_diagonal_(0)
    size = min(max(5.0, 0.45 * len(names) + 1.5), LARGEST_INCHES)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    darkest = max(float(mistakes.max()), SHARE_OF_A_CLASS * float(confusion.sum()) / len(names))
    axes.imshow(mistakes.numpy(), cmap="OrRd", vmin=0, vmax=max(1.0, darkest))
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if len(names) <= MOST_NAMES:
        axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 3 else 60, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
    if len(names) <= 30:
        for row in range(len(names)):
            for column in range(len(names)):
                _write_count(axes, row, column, int(confusion[row, column]), darkest)
    figure.savefig(file, dpi=130)


def _short(name: str) -> str:
    """A longer name would leave no room for the matrix."""
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…"


def _write_count(axes: Axes, row: int, column: int, count: int, darkest: float) -> None:
    if count == 0:
        return
    on_dark = row != column and count > 0.6 * darkest
    color = BLUE if row == column else ("white" if on_dark else "black")
    weight = "bold" if row == column else "normal"
    axes.text(column, row, str(count), ha="center", va="center", fontsize=9, color=color, weight=weight)


def plot_reliability(bins: np.ndarray, title: str, file: Path, *, calibrated: np.ndarray | None = None) -> None:
    """Draws how often answers are right against their probability, and how many answers there are of each probability.

    Args:
        bins: (3, bins): rows, summed probability and right answers (see `Figures`).
        title: above the picture.
        file: a PNG file.
        calibrated: the same with the temperature.
    """
    edges, used = np.linspace(0, 1, bins.shape[1] + 1), bins[0] > 0
    num_rows, probability, right = bins[:, used]
    figure = Figure(figsize=(5, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="black", lw=1, ls=":", label="perfectly calibrated")
    share = right / num_rows
    bounds = np.array([wilson(int(hits), int(rows)) for hits, rows in zip(right, num_rows, strict=True)]).T
    reach = np.abs(bounds - share)
    upper.errorbar(probability / num_rows, share, reach, color=BLUE, marker="o", ms=5, lw=1, label="this model, 95 %")
    if calibrated is not None:
        num_there, probability_there, right_there = calibrated[:, calibrated[0] > 0]
        shares = right_there / num_there
        there = probability_there / num_there
        upper.plot(there, shares, color=ORANGE, marker="s", ms=4, ls="", label="with the temperature")
    upper.set(ylabel="share of right answers", ylim=(0, 1.02))
    upper.set_title(title, fontsize=10)
    figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=8)
    lower.bar(edges[:-1], bins[0], width=np.diff(edges), align="edge", color=BLUE, edgecolor="white")
    lower.set(xlabel="probability of the answer", ylabel="rows", yscale="log", xlim=(0, 1))
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(file, dpi=130)


def plot_history(history: Sequence[dict[str, float]], title: str, file: Path) -> None:
    """Draws loss and error over the epochs, side by side."""
    epochs = [metrics["epoch"] for metrics in history]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [metrics["train/loss"] for metrics in history], color=BLUE, marker="o", ms=3, label="training")
    left.plot(epochs, [metrics["val/loss"] for metrics in history], color=ORANGE, marker="o", ms=3, label="validation")
    left.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    left.legend(frameon=False)
    right.plot(epochs, [100 * metrics["val/error"] for metrics in history], color=ORANGE, marker="o", ms=3)
    right.set(xlabel="epoch", ylabel="validation error, %", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(file, dpi=130)
