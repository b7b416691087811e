"""A finished table for people and machines: Markdown, HTML, Parquet, and a plot of error against parameters.

An experiment that was not run has a row that says so. All errors of a table are on one data set, which the column names: a
figure on CIFAR-10-JPEG does not stand under CIFAR-10.
"""

import io
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rcnn.evaluate.plots import BLUE, ORANGE
from rcnn.progress import as_duration
from rcnn.reproduce.cells import Row
from rcnn.text import counted, printable

TEMPLATE = Path(__file__).with_name("table.html.j2")
MARKDOWN, HTML, PARQUET, PLOT = "table.md", "table.html", "table.parquet", "error-against-parameters.png"
TITLES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "mnist": "MNIST",
    "svhn": "SVHN",
    "cifar10-jpeg": "CIFAR-10-JPEG",
}


@dataclass(frozen=True)
class Finished:
    """All that a report says.

    Attributes:
        title: of the table.
        data_set: its name.
        rows: one for each experiment.
        command: repeats it.
        commit: of the code.
    """

    title: str
    data_set: str
    rows: Sequence[Row]
    command: str
    commit: str

    @property
    def data_title(self) -> str:
        """The data set as people write it."""
        return TITLES.get(self.data_set, self.data_set)

    def conditions(self) -> dict[str, str]:
        """Under which the figures hold."""
        config = self.rows[0].cell.config
        rows = f"{config.train.num_rows:,} training images" if config.train.num_rows else "all training images"
        epochs = " or ".join(f"{each:,}" for each in sorted({row.cell.config.train.epochs for row in self.rows}))
        worker = "a GPU" if config.execution.use_gpu else counted(config.execution.cpus_per_worker, "CPU core")
        return {
            "data set": self.data_title,
            "training": f"{rows}, {epochs} epochs, on {worker}",
            "machine": f"{platform.machine()}, {counted(os.cpu_count() or 1, 'core')}, torch {_torch_version()}",
            "commit": self.commit or "unknown",
            "command": self.command,
            "date": f"{datetime.now(UTC):%d %B %Y}",
        }

    def cells(self) -> list[dict[str, str]]:
        """The rows as text, without columns that are empty in all of them."""
        rows = [_cells_of(row, self.data_title) for row in self.rows]
        filled = [name for name in rows[0] if any(row[name] for row in rows)]
        return [{name: row[name] for name in filled} for row in rows]


def _torch_version() -> str:
    from importlib.metadata import version

    return version("torch")


def _cells_of(row: Row, data_title: str) -> dict[str, str]:
    outcome = row.outcome
    difference = ""
    if outcome.difference is not None:
        low, high = (100 * (outcome.difference + sign * outcome.half_width) for sign in (-1, 1))
        difference = f"{100 * outcome.difference:+.2f} ({low:+.2f} to {high:+.2f})"
    sure = f" ({row.cell.experiment.sure})" if outcome.published is not None else ""
    return {
        "network": row.cell.title,
        "training": how_trained(row),
        "parameters": "" if row.num_parameters is None else f"{row.num_parameters:,}",
        f"error on {data_title}, %": written_error(row),
        "seeds": str(len(row.seeds)),
        "all seeds as one, %": "" if row.ensemble is None else f"{100 * row.ensemble.error:.2f}",
        "published, %": "-" if outcome.published is None else f"{100 * outcome.published:.2f}{sure}",
        "difference (95 %)": difference,
        "verdict": outcome.verdict,
        "a training": "" if row.seconds is None else as_duration(row.seconds),
    }


def how_trained(row: Row) -> str:
    """What the images go through in training; rows that differ in this are not one column."""
    augment, crop = row.cell.config.augment, row.cell.config.model.crop
    parts = [
        f"crops of {crop}" * bool(crop),
        f"shifts of {augment.max_shift}" * bool(augment.max_shift),
        "flips" * augment.flip,
        f"cutout of {augment.cutout}" * bool(augment.cutout),
    ]
    augmented = ", ".join(filter(None, parts)) or "no augmentation"
    without, views = row.cell.experiment.without, row.cell.experiment.views
    how = augmented + f"; without {without}" * bool(without)
    return how + (f"; {VIEWS[views]} at test time" if views else "")


VIEWS = {"crops": "nine crops", "mirrored": "mirrored views"}


def written_error(row: Row) -> str:
    """Mean and standard deviation in per cent, or that there is none."""
    outcome = row.outcome
    if outcome.mean is None:
        return "not run"
    return f"{100 * outcome.mean:.2f}" + ("" if outcome.spread is None else f" ± {100 * outcome.spread:.2f}")


def as_markdown(table: Finished) -> str:
    """The table, and below it what it rests on."""
    cells = table.cells()
    lines = [f"# {table.title}", "", _line(list(cells[0])), _line(["---"] * len(cells[0]))]
    lines += [_line(list(row.values())) for row in cells]
    lines += [
        "",
        *(f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in table.conditions().items()),
    ]
    lines += ["", *(f"- {note}" for note in NOTES)]
    return "\n".join(lines) + "\n"


NOTES = (
    "errors are means over seeds ± their standard deviation",
    "all seeds as one: the mean of their probabilities for each image, of one view, at the cost of that many forward passes",
    "the interval takes the published error for one more run with the spread of ours; with one seed, for a model that errs "
    "independently",
    '"unverified" figures are from memory of the paper',
)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(printable(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def as_html(table: Finished, picture: str) -> str:
    """One file without links, scripts or outside parts; `picture` is a PNG in base64."""
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text("utf-8")
    )
    cells = table.cells()
    return template.render(
        title=table.title,
        cells=cells,
        conditions=table.conditions(),
        notes=NOTES,
        picture=picture,
        header=list(cells[0]),
    )


def as_parquet(table: Finished) -> bytes:
    """A row for each experiment; shares, not per cent."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([_record(row, table.data_set) for row in table.rows], SCHEMA), buffer)
    return buffer.getvalue()


SCHEMA = pa.schema(
    [
        ("experiment", pa.string()), ("network", pa.string()), ("k", pa.int64()), ("t", pa.int64()),
        ("data_set", pa.string()), ("parameters", pa.int64()), ("seeds", pa.list_(pa.int64())),
        ("errors", pa.list_(pa.float64())), ("mean", pa.float64()), ("standard_deviation", pa.float64()),
        ("published", pa.float64()), ("sure", pa.string()), ("difference", pa.float64()), ("half_width", pa.float64()),
        ("verdict", pa.string()), ("seconds", pa.float64()), ("mlflow_run_ids", pa.list_(pa.string())),
        ("ensemble_error", pa.float64()),
    ]
)  # fmt: skip


def _record(row: Row, data_set: str) -> Mapping[str, object]:
    outcome, model = row.outcome, row.cell.config.model
    return {
        "experiment": row.cell.experiment.name,
        "network": row.cell.title,
        "k": model.k if "k" in model.reads else None,
        "t": model.t if "t" in model.reads else None,
        "data_set": data_set,
        "parameters": row.num_parameters,
        "seeds": list(row.seeds),
        "errors": list(outcome.errors),
        "mean": outcome.mean,
        "standard_deviation": outcome.spread,
        "published": outcome.published,
        "sure": row.cell.experiment.sure,
        "difference": outcome.difference,
        "half_width": outcome.half_width if outcome.errors else None,
        "verdict": outcome.verdict,
        "seconds": row.seconds,
        "mlflow_run_ids": list(row.run_ids),
        "ensemble_error": None if row.ensemble is None else row.ensemble.error,
    }


def plot_errors(table: Finished, file: Path) -> None:
    """Draws error against parameters: ours with all seeds, the published ones hollow."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for row in table.rows:
        if row.num_parameters is not None:
            _plot_row(axes, row, row.num_parameters)
    axes.set(xlabel="parameters", ylabel=f"test error on {table.data_title}, %", xscale="log", title=table.title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    first = {label: handle for handle, label in zip(reversed(handles), reversed(labels), strict=True)}
    axes.legend(list(first.values()), list(first), frameon=False)
    figure.savefig(file, dpi=130)


def _plot_row(axes: Axes, row: Row, parameters: int) -> None:
    outcome = row.outcome
    if outcome.published is not None:
        axes.scatter(
            [parameters], [100 * outcome.published],
            label="published", facecolors="none", edgecolors=ORANGE, marker="s", s=42,
        )  # fmt: skip
    if outcome.mean is None:
        return
    errors = [100 * error for error in outcome.errors]
    axes.scatter([parameters] * len(errors), errors, color=BLUE, alpha=0.35, s=18, label="ours, each seed")
    axes.scatter([parameters], [100 * outcome.mean], color=BLUE, s=42, label="ours, mean")
    place = (parameters, 100 * outcome.mean)
    axes.annotate(row.cell.title, place, xytext=(6, 4), textcoords="offset points", fontsize=8)
