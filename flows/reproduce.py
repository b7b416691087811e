"""The flow that fills a table of the paper: a task for each cell, as many beside each other as there is room for.

In: the name of a table. Out: the folder of its report. A cell that was run before is found by its key, so the same call runs
what is left.
"""

import contextvars
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, Literal

from prefect import flow, task
from prefect.runtime import deployment

from flows.full_pipeline import log_in_prefect
from flows.jobs import run_until, tags_of_flow
from flows.left_runs import label_flow_run
from flows.notify import hooks
from rcnn.config import PipelineConfig
from rcnn.progress import as_duration, say, show_on_screen
from rcnn.reproduce.cells import LAST, results_of
from rcnn.reproduce.process import Processes
from rcnn.reproduce.publish import Call, publish
from rcnn.reproduce.tables import TABLES, Cell, cells_of, num_parallel
from rcnn.stages import Parent

if TYPE_CHECKING:
    TableName = str
else:  # so that the form of the Prefect UI lists them
    TableName = Literal[tuple(TABLES)]


@flow(name="rcnn", flow_run_name="reproduce {table} {budget}", **hooks())
def reproduce(
    table: TableName = "mnist",
    budget: Literal["full", "small"] = "small",
    seeds: int = 3,
    overrides: list[str] = [],  # noqa: B006  (Prefect's form wants a list)
    only: list[str] = [],  # noqa: B006
    parallel: int = 0,
    command: str = "",
) -> dict[str, Any]:
    """Trains what a table of the paper compares, and writes the table.

    Args:
        table: which one.
        budget: full: as published; small: what 2 CPU cores train in an hour or two.
        seeds: trainings of each experiment.
        overrides: settings of all trainings, such as data.root=/data.
        only: names or patterns of experiments; empty: all.
        parallel: trainings beside each other; 0: as many as fit.
        command: what the report says to repeat it; empty: this call.
    """
    show_on_screen()
    label_flow_run()
    options = {"budget": budget, "num_seeds": seeds, "overrides": overrides, "only": only, "environ": os.environ}
    cells = cells_of(table, **options)  # type: ignore[arg-type]
    with log_in_prefect():
        failures = _run_cells(cells, parallel or num_parallel(cells[0].config))
        command = command or f"prefect deployment run rcnn/reproduce ({deployment.name or table})"
        folder = publish(Call(table, budget, command), cells)
    return {"folder": folder, "failures": failures}


def _run_cells(cells: Sequence[Cell], parallel: int) -> dict[str, str]:
    """Runs what was not run before; returns the errors by cell."""
    left = [cell for cell in cells if results_of(cell.config) is None]
    if not left:
        return {}
    _ingest(left[0])
    say(f"reproduce: {len(left)} of {len(cells)} cells are to be run, {parallel} at a time")
    started, failures, num_done = time.monotonic(), dict[str, str](), 0
    # The processes end before the pool waits for its threads: an interrupted flow leaves nothing running.
    with ThreadPoolExecutor(parallel) as pool, Processes() as processes:

        @task(name="cell", task_run_name="{name}")
        def run(name: str) -> None:
            [cell] = [cell for cell in left if cell.name == name]
            _run_cell(cell, processes)

        futures = {
            pool.submit(contextvars.copy_context().run, run, cell.name, return_state=True): cell for cell in left
        }
        for future in as_completed(futures):
            num_done += 1
            name, error = futures[future].name, future.result().result(raise_on_failure=False)
            if isinstance(error, BaseException):
                failures[name] = str(error)
            remaining = (time.monotonic() - started) / num_done * (len(left) - num_done)
            rest = f"; about {as_duration(remaining)} left" if num_done < len(left) else ""
            say(f"reproduce: {name} {'failed' if name in failures else 'done'}, {num_done} of {len(left)}{rest}")
    return failures


def _ingest(cell: Cell) -> None:
    """All cells read one data set: it is made once, before the first of them."""
    _run_until(cell.config, "ingest")


def _run_cell(cell: Cell, processes: Processes) -> None:
    if cell.config.ray.address.startswith("http"):
        _run_until(cell.config, LAST)
    else:
        processes.run(cell)


def _run_until(config: PipelineConfig, last: str) -> None:
    run_until(config, last, parent=Parent(tags=tuple(tags_of_flow().items())))
