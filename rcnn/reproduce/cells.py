"""What was run of a table: the results of each cell, found by its key, and what the rest would cost.

A cell is the pipeline up to `evaluate`. It is not registered: the gate pays for each model that is compared with the champion,
and a table trains many that are not meant to replace it.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rcnn.config import PipelineConfig
from rcnn.evaluate.ensemble import Ensemble, ensemble_of
from rcnn.model.build import build_network, count_parameters
from rcnn.plan.bill import bill_of
from rcnn.plan.size import OFFICIAL, size_of
from rcnn.progress import as_duration
from rcnn.recipes import Experiment
from rcnn.reproduce.outcome import Outcome
from rcnn.reproduce.tables import EVERY, Cell, num_parallel
from rcnn.results import EvaluateResult
from rcnn.stages import Results, finished_until
from rcnn.storage import StageFolder, Storage

LAST = "evaluate"
COUNTED = ("tune", "train", LAST)
SECONDS_TO_START_A_CELL = 6.0  # a process and its imports: what 29 cells took on 2 cores beyond their stages


@dataclass(frozen=True)
class Row:
    """A row of the finished table.

    Attributes:
        cell: its first seed.
        outcome: of all seeds.
        seeds: those that were run.
        num_parameters: of the network; None where the images are not known yet.
        seconds: mean training time of a seed; None where none was run.
        run_ids: MLflow runs of the trainings.
        ensemble: all seeds as one model, by the mean of their probabilities; None for fewer than two.
    """

    cell: Cell
    outcome: Outcome
    seeds: tuple[int, ...]
    num_parameters: int | None
    seconds: float | None
    run_ids: tuple[str, ...]
    ensemble: Ensemble | None = None


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """A row for each experiment, from the results in the storage."""
    by_name = {name: [cell for cell in cells if cell.experiment.name == name] for name in _names(cells)}
    return [_row_of(group) for group in by_name.values()]


def _names(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.experiment.name for cell in cells))


def results_of(config: PipelineConfig) -> Results | None:
    """The results of a cell; None where it has not been run to its end."""
    results = finished_until(config, LAST)
    return results if LAST in results else None


def _row_of(cells: Sequence[Cell]) -> Row:
    found = [(cell, results) for cell in cells if (results := results_of(cell.config)) is not None]
    evaluated: list[EvaluateResult] = [results[LAST] for _, results in found]
    trained = [results["train"] for _, results in found]
    published = cells[0].experiment.error
    outcome = Outcome(
        errors=tuple(error_of(cells[0], each) for each in evaluated),
        num_rows=evaluated[0].num_rows if evaluated else 0,
        published=None if published is None else published / 100,
        is_comparable=cells[0].is_comparable,
    )
    return Row(
        cell=cells[0],
        outcome=outcome,
        seeds=tuple(cell.config.seed for cell, _ in found),
        num_parameters=trained[0].num_parameters if trained else _num_parameters(cells[0]),
        seconds=statistics.fmean(each.seconds for each in trained) if trained else None,
        run_ids=tuple(each.mlflow_run_id for each in trained),
        ensemble=_ensemble_of(cells[0], evaluated),
    )


def error_of(cell: Cell, result: EvaluateResult) -> float:
    """The test error that stands in the table: that of the experiment's views, where it has any."""
    if not cell.experiment.views:
        return result.test_error
    [row] = [row for row in result.studies["views"] if row.condition == cell.experiment.views]
    return row.error


def _ensemble_of(cell: Cell, evaluated: Sequence[EvaluateResult]) -> Ensemble | None:
    """Of single views: those are the predictions that are kept of every row."""
    if len(evaluated) < 2:
        return None
    storage = Storage(cell.config.storage)
    return ensemble_of([StageFolder(storage, each.folder) for each in evaluated])


def _num_parameters(cell: Cell) -> int | None:
    size = size_of(cell.config, finished_until(cell.config, "ingest"))
    if size is None:
        return None
    return parameters_of(cell.config, size.image_shape, size.num_classes)


def parameters_of(config: PipelineConfig, image_shape: tuple[int, int, int], num_classes: int) -> int:
    """The exact number of parameters, of images (H, W, C)."""
    height, width, channels = image_shape
    seen = (config.model.crop or height, config.model.crop or width, channels)
    return count_parameters(build_network(config.model.network, seen, num_classes, config.model.model_dump()))


def parameter_rows() -> list[dict[str, str]]:
    """The table of parameters: every experiment whose number of parameters is published, each size once."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for each in EVERY.values():
        if each.millions is not None:
            rows.setdefault((each.config().model.title, each.data), _parameter_row(each))
    return list(rows.values())


def _parameter_row(experiment: Experiment) -> dict[str, str]:
    config, size = experiment.config(), OFFICIAL[experiment.data]
    exact = parameters_of(config, size.image_shape, size.num_classes)
    published = experiment.millions
    assert published is not None
    is_same = abs(exact / 1e6 - published) < 0.0051  # published with two decimals
    return {
        "network": config.model.title,
        "data set": experiment.data,
        "published": f"{published:.2f} M",
        "parameters": f"{exact:,}",
        "verdict": "reproduced" if is_same else f"{exact / 1e6:.2f} M",
    }


@dataclass(frozen=True)
class TableBill:
    """What is left to run of a table.

    Attributes:
        rows: for a table on the screen.
        seconds: in all, with as many cells beside each other as fit; None where a cell's time is not known.
        num_left: cells that are to be run.
    """

    rows: list[dict[str, str]]
    seconds: float | None
    num_left: int

    @property
    def time(self) -> str:
        """The time in all, for people."""
        return "unknown" if self.seconds is None else as_duration(self.seconds)


def bill_of_cells(cells: Sequence[Cell], parallel: int = 0) -> TableBill:
    """The bill of a table: each experiment is timed once, since its seeds cost the same.

    Args:
        cells: of a table.
        parallel: cells beside each other; 0: as many as fit.
    """
    num_wanted = sum(results_of(cell.config) is None for cell in cells)
    at_once = min(parallel or num_parallel(cells[0].config), max(1, num_wanted))
    rows, times, num_left = [], list[float | None](), 0
    for _, group in groupby(sorted(cells, key=lambda cell: _names(cells).index(cell.experiment.name)), _experiment_of):
        members = list(group)
        left = [cell for cell in members if results_of(cell.config) is None]
        seconds = _seconds_of(left[0].config, at_once) if left else 0.0
        times += [seconds] * len(left)
        num_left += len(left)
        rows.append({
            "experiment": members[0].experiment.name,
            "network": members[0].title,
            "done": f"{len(members) - len(left)} of {len(members)} seeds",
            "a cell": "" if not left else "unknown" if seconds is None else as_duration(seconds),
            "all": "" if not left else "unknown" if seconds is None else as_duration(seconds * len(left)),
        })  # fmt: skip
    known = [each for each in times if each is not None]
    total = sum(known) / at_once if len(known) == len(times) else None
    return TableBill(rows, total, num_left)


def _experiment_of(cell: Cell) -> str:
    return cell.experiment.name


def _seconds_of(config: PipelineConfig, at_once: int) -> float | None:
    """The predicted time of a cell beside others, without ingest, which all share; None where the images are not known yet."""
    bill = bill_of(config, num_beside=0 if config.ray.address else at_once - 1)
    costs = [item.cost.seconds for item in bill.items if item.name in COUNTED and item.status.state != "done"]
    known = [seconds for seconds in costs if seconds is not None]
    start = 0.0 if config.ray.address else SECONDS_TO_START_A_CELL
    return start + sum(known) if len(known) == len(costs) else None
