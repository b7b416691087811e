"""Pictures of what a network computes, and of the studies of `studies.py`, as PNG files.

Many small images are put together in one array and drawn at once: an axes for each would take seconds.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from rcnn.data.fonts import fonts_for, readable
from rcnn.evaluate.plots import BLUE
from rcnn.evaluate.study_size import CORRUPTIONS, NUM_STRENGTHS
from rcnn.evaluate.unrolled import ReceptiveField, Unrolling
from rcnn.results import StudyRow
from rcnn.text import printable

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of Okabe and Ito, told apart by colour-blind people too."""
MARKERS = "osD^vP"
NUM_MAPS_SHOWN, MAP_COLUMNS = 8, 4
MOST_STEPS_SHOWN = 6
MOST_TICKS = 9
MOST_CLASSES, MAX_NAME = 4, 16
DPI = 110


def draw_filters(filters_KCHW: np.ndarray, title: str, file: Path) -> None:
    """Draws the kernels of a convolution side by side, all on one scale: in colour if they see three channels."""
    num_filters, channels, height, width = filters_KCHW.shape
    num_columns = 8 if num_filters <= 32 else 16
    largest = max(float(np.abs(filters_KCHW).max()), 1e-12)
    figure = Figure(
        figsize=(0.55 * num_columns + 1.2, 0.55 * -(-num_filters // num_columns) + 0.6), layout="constrained"
    )
    axes = figure.subplots()
    if channels == 3:
        tiles = list(np.clip(0.5 + filters_KCHW.transpose(0, 2, 3, 1) / (2 * largest), 0, 1))
        axes.imshow(_mosaic(tiles, num_columns, fill=1.0))
    else:
        tiles = list(filters_KCHW.mean(1))
        drawn = axes.imshow(_mosaic(tiles, num_columns), cmap="PuOr", vmin=-largest, vmax=largest)
        figure.colorbar(drawn, ax=axes, label="weight", shrink=0.8)
    axes.set_axis_off()
    figure.suptitle(f"{title}, {height} x {width}", fontsize=10)
    figure.savefig(file, dpi=DPI)


def draw_steps(rows: Sequence[StudyRow], title: str, file: Path) -> None:
    """Draws the error against the number of recurrent steps, with intervals."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = [int(row.condition) for row in rows]
    errors = 100 * np.array([row.error for row in rows])
    bounds = 100 * np.array([row.error_interval for row in rows]).T
    axes.errorbar(steps, errors, np.abs(bounds - errors), color=BLUE, marker="o", ms=5, lw=1.2, capsize=3)
    for number in range(len(rows)):
        axes.annotate(
            f"{errors[number]:.1f}",
            (steps[number], errors[number]),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set(
        xlabel="recurrent steps at test time, and share of the arithmetic",
        ylabel=f"error on {rows[0].num_rows:,} test rows, %",
        ylim=(0, None),
    )
    named = rows[:: -(-len(rows) // MOST_TICKS)]
    axes.set_xticks(
        [int(row.condition) for row in named], [f"{row.condition}\n{100 * row.passes:.0f} %" for row in named]
    )
    axes.set_xlim(steps[0] - 0.3, steps[-1] + 0.4)
    axes.margins(y=0.15)
    axes.set_title(title, fontsize=10)
    _finish(axes)
    figure.savefig(file, dpi=DPI)


def draw_states(
    unrolling: Unrolling,
    images_NHWC: np.ndarray,
    labels: Sequence[int],
    classes: Sequence[str],
    title: str,
    file: Path,
) -> None:
    """Draws, for each image, the maps of all recurrent layers after each step, and the probabilities of classes over the steps.

    Args:
        unrolling: of the images.
        images_NHWC: uint8 images.
        labels: their classes.
        classes: names by label.
        title: above the picture.
        file: a PNG file.
    """
    names = [readable(printable(name), label) for label, name in enumerate(classes)]
    with fonts_for(names):
        steps = _shown(len(unrolling.probabilities))
        num_images, num_layers = len(images_NHWC), len(unrolling.states)
        width = 1.5 * len(steps) + 5.2
        figure = Figure(figsize=(width, num_images * (0.82 * num_layers + 0.45) + 0.5), layout="constrained")
        grid = figure.subplots(num_images, 3, width_ratios=(1.5, 1.5 * len(steps), 3.0), squeeze=False)
        for number, (left, middle, right) in enumerate(grid):
            _draw_image(left, images_NHWC[number], f"true class:\n{_short(names[labels[number]])}")
            _draw_maps(middle, [each[:, number].numpy() for each in unrolling.states], steps)
            _draw_probabilities(right, unrolling.probabilities[:, number].numpy(), labels[number], names)
        figure.suptitle(f"{title}: states and answers over the recurrent steps", fontsize=11)
        figure.savefig(file, dpi=DPI)


def _draw_image(axes: Axes, image_HWC: np.ndarray, title: str) -> None:
    axes.imshow(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC, cmap="gray", vmin=0, vmax=255)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def _draw_maps(axes: Axes, states: Sequence[np.ndarray], steps: Sequence[int]) -> None:
    """A row for each layer, a column for each step, in each cell the maps of the layer that are most active or change most."""
    side = max(each.shape[-1] for each in states)
    cells = []
    for state_TKHW in states:
        chosen_TKHW = state_TKHW[:, _telling_maps(state_TKHW)]
        largest = max(float(chosen_TKHW.max()), 1e-12)
        cells += [
            _mosaic([_enlarged(each, side) for each in chosen_TKHW[step] / largest], MAP_COLUMNS) for step in steps
        ]
    picture = _mosaic(cells, len(steps), gap=6)
    axes.imshow(picture, cmap=_with_white("magma"), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    high, wide = cells[0].shape
    axes.set_xticks([column * (wide + 6) + wide / 2 for column in range(len(steps))], [f"t = {step}" for step in steps])
    sizes = [f"layer {number}\n{each.shape[-1]} x {each.shape[-2]}" for number, each in enumerate(states, start=1)]
    axes.set_yticks([row * (high + 6) + high / 2 for row in range(len(states))], sizes)
    axes.tick_params(length=0, labelsize=8)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)


def _telling_maps(state_TKHW: np.ndarray) -> np.ndarray:
    """Half of those shown are the most active maps after the last step, half are those that change most; in their order."""
    active_K = state_TKHW[-1].mean((1, 2))
    change_K = np.abs(np.diff(state_TKHW, axis=0)).mean((0, 2, 3)) if len(state_TKHW) > 1 else active_K
    first = np.argsort(-change_K, kind="stable")[: NUM_MAPS_SHOWN // 2].tolist()
    others = [each for each in np.argsort(-active_K, kind="stable").tolist() if each not in first]
    return np.sort(first + others[: NUM_MAPS_SHOWN - len(first)])


def _draw_probabilities(axes: Axes, probabilities_TC: np.ndarray, label: int, names: Sequence[str]) -> None:
    """Of the true class, and of those that were ever most probable."""
    likely = np.argsort(-probabilities_TC.max(0), kind="stable").tolist()
    shown = [label, *(each for each in likely if each != label)][:MOST_CLASSES]
    for number, each in enumerate(shown):
        text = f"{_short(names[each])}{' (true)' if each == label else ''}"
        axes.plot(
            100 * probabilities_TC[:, each], color=COLORS[number], marker=MARKERS[number], ms=5, lw=1.4, label=text,
            ls="-" if each == label else "--",
        )  # fmt: skip
    axes.set(ylim=(-4, 104), ylabel="probability, %", xlabel="recurrent steps t")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=2)
    _finish(axes)


def draw_fields(fields: Sequence[ReceptiveField], title: str, file: Path) -> None:
    """Draws the gradient of each layer's central unit after each step, and the sides of what it sees over the steps."""
    layers = sorted({field.layer for field in fields})
    steps = _shown(max(field.num_steps for field in fields) + 1)
    figure = Figure(figsize=(1.15 * len(steps) + 5.6, 1.15 * len(layers) + 0.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15 * len(steps) + 0.6, 4.6))
    _draw_gradients(left, {(field.layer, field.num_steps): field for field in fields}, layers, steps)
    for layer in layers:
        _draw_sides(right, [field for field in fields if field.layer == layer])
    right.axhline(min(fields[0].gradient.shape), color="black", lw=0.8)
    right.text(
        0.01,
        min(fields[0].gradient.shape),
        " side of the image",
        fontsize=8,
        va="bottom",
        transform=right.get_yaxis_transform(),
    )
    right.set(xlabel="recurrent steps t", ylabel="side of the receptive field, pixels", yscale="log")
    right.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    right.yaxis.set_major_formatter(ScalarFormatter())
    right.yaxis.set_minor_locator(MaxNLocator(nbins=1))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.plot([], [], color="black", ls=":", label="theory")
    right.plot([], [], color="black", label="95 % of the gradient")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _finish(right)
    figure.suptitle(f"{title}: what the central unit sees", fontsize=11)
    figure.savefig(file, dpi=DPI)


def _draw_sides(axes: Axes, fields: Sequence[ReceptiveField]) -> None:
    number = (fields[0].layer - 1) % len(COLORS)
    steps = [field.num_steps for field in fields]
    axes.plot(
        steps, [field.central_side for field in fields], color=COLORS[number], marker=MARKERS[number], ms=5, lw=1.4,
        label=f"layer {fields[0].layer}",
    )  # fmt: skip
    axes.plot(steps, [field.theoretical_side for field in fields], color=COLORS[number], ls=":", lw=1.2)


def _draw_gradients(
    axes: Axes, fields: dict[tuple[int, int], ReceptiveField], layers: Sequence[int], steps: Sequence[int]
) -> None:
    """A row for each layer, a column for each step; the dotted square is what theory allows."""
    shown = [fields[layer, step] for layer in layers for step in steps]
    cells = [np.sqrt(each.gradient.numpy() / max(float(each.gradient.max()), 1e-30)) for each in shown]
    high, wide = cells[0].shape
    gap = max(2, wide // 14)
    axes.imshow(_mosaic(cells, len(steps), gap=gap), cmap=_with_white("magma"), vmin=0, vmax=1, interpolation="nearest")
    for number, field in enumerate(shown):
        row, column = divmod(number, len(steps))
        _draw_box(axes, field, row * (high + gap), column * (wide + gap), high, wide)
    axes.set_xticks(
        [column * (wide + gap) + wide / 2 for column in range(len(steps))], [f"t = {step}" for step in steps]
    )
    axes.set_yticks(
        [row * (high + gap) + high / 2 for row in range(len(layers))], [f"layer {layer}" for layer in layers]
    )
    axes.tick_params(length=0, labelsize=8)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    axes.set_xlabel("square root of the mean |gradient|; dotted: theory", fontsize=8)


def _draw_box(axes: Axes, field: ReceptiveField, top: int, left: int, high: int, wide: int) -> None:
    """The theoretical square, cut at the borders of the image."""
    rows, columns = np.clip(field.box[0::2], 0, high), np.clip(field.box[1::2], 0, wide)
    corner = (left + columns[0] - 0.5, top + rows[0] - 0.5)
    box = Rectangle(corner, columns[1] - columns[0], rows[1] - rows[0], fill=False, ec="#56b4e9", ls=":", lw=1.2)
    axes.add_patch(box)


def draw_corruptions(rows: Sequence[StudyRow], gallery: Sequence[Sequence[np.ndarray]], title: str, file: Path) -> None:
    """Draws the error against the strength of each corruption, and an image with each.

    Args:
        rows: the model as it is, then `CORRUPTIONS` at each strength.
        gallery: images (H, W, C) for each corruption, from strength 0 on.
        title: above the picture.
        file: a PNG file.
    """
    plain, errors = rows[0].error, {row.condition: row.error for row in rows}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for number, name in enumerate(CORRUPTIONS):
        line = [plain, *(errors[f"{name}/{strength}"] for strength in range(1, NUM_STRENGTHS + 1))]
        left.plot(100 * np.array(line), color=COLORS[number], marker=MARKERS[number], ms=5, lw=1.4, label=name)
    left.set(xlabel="strength (0: as it is)", ylabel=f"error on {rows[0].num_rows:,} test rows, %", ylim=(0, None))
    left.legend(frameon=False)
    _finish(left)
    _draw_gallery(right, gallery)
    figure.suptitle(f"{title}: robustness", fontsize=11)
    figure.savefig(file, dpi=DPI)


def _draw_gallery(axes: Axes, gallery: Sequence[Sequence[np.ndarray]]) -> None:
    tiles = [np.broadcast_to(each / 255, (*each.shape[:2], 3)) for line in gallery for each in line]
    high, wide = tiles[0].shape[:2]
    axes.imshow(_mosaic(tiles, len(gallery[0]), fill=1.0, gap=2), interpolation="nearest")
    axes.set_yticks([row * (high + 2) + high / 2 for row in range(len(gallery))], CORRUPTIONS)
    axes.set_xticks(
        [column * (wide + 2) + wide / 2 for column in range(len(gallery[0]))], map(str, range(len(gallery[0])))
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _mosaic(tiles: Sequence[np.ndarray], num_columns: int, *, fill: float = np.nan, gap: int = 1) -> np.ndarray:
    """Images of one size in a grid, with `fill` between them and after the last."""
    height, width, *channels = tiles[0].shape
    num_rows = -(-len(tiles) // num_columns)
    whole = np.full((num_rows * (height + gap) - gap, num_columns * (width + gap) - gap, *channels), fill)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, num_columns)
        top, left = row * (height + gap), column * (width + gap)
        whole[top : top + height, left : left + width] = tile
    return whole


def _enlarged(map_HW: np.ndarray, side: int) -> np.ndarray:
    """The map with each unit repeated, so that it is `side` wide and as high in proportion."""
    height = max(1, round(side * map_HW.shape[0] / map_HW.shape[1]))
    rows, columns = (np.arange(size) * of // size for size, of in ((height, map_HW.shape[0]), (side, map_HW.shape[1])))
    return np.asarray(map_HW[rows][:, columns])


def _shown(num_times: int) -> list[int]:
    """At most `MOST_STEPS_SHOWN` steps, the first and the last among them."""
    return sorted({round(step) for step in np.linspace(0, num_times - 1, min(num_times, MOST_STEPS_SHOWN))})


def _with_white(name: str) -> Colormap:
    """A colour map in which gaps are white."""
    return colormaps[name].with_extremes(bad="white")


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
