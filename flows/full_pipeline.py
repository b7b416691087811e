"""The flow "rcnn": ingest -> tune -> train -> evaluate -> register.

In: a config, the flow's typed parameter, which the Prefect UI draws as a form. Out: the result of each stage, as JSON.
"""

import logging
import os
from typing import Any

from prefect import flow
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run

from flows.jobs import stop_jobs_of
from flows.stages import TASKS
from rcnn.config import PipelineConfig
from rcnn.progress import say, show_on_screen
from rcnn.recipes import demo
from rcnn.stages import Parent, Results, finished, nothing_to_do, planned, results_from_json, stage_folder


@flow(name="rcnn", on_cancellation=[stop_jobs_of], on_crashed=[stop_jobs_of])
def full_pipeline(config: PipelineConfig = demo(), fresh: bool = False) -> dict[str, Any]:
    """Trains the model that the config describes, and registers it.

    Args:
        config: every setting; what it leaves at its default, the worker's RCNN_... variables may fill in.
        fresh: does all stages again, although their results are there.
    """
    show_on_screen()
    config = config.filled_from(os.environ)
    with _log_in_prefect(), _PipelineRun(config, fresh) as run:
        trees: dict[str, Any] = {}
        for name in planned(config):
            trees[name] = _run_task(config, name, trees, fresh, run.parent)
        return trees


def _run_task(config: PipelineConfig, name: str, trees: dict[str, Any], fresh: bool, parent: Parent) -> Any:
    """Runs a stage's task; Prefect's cache is trusted only where what it points to is still there."""
    results = results_from_json(trees)
    done = not fresh and finished(config, name, results) is not None
    state = TASKS[name].with_options(refresh_cache=not done)(
        config=config, name=name, trees=trees, fresh=fresh, parent=parent, return_state=True
    )
    if state.name == "Cached":
        say(nothing_to_do(name, stage_folder(config, name, results)))
    return state.result()


class _PipelineRun:
    """The MLflow run above the stages' own; where there is nothing to do, none is opened."""

    def __init__(self, config: PipelineConfig, fresh: bool):
        self.config, self.fresh, self.parent, self.tracker = config, fresh, Parent(), None

    def __enter__(self) -> "_PipelineRun":
        if self.fresh or not self._is_done():
            from rcnn.registry.mlflow_store import open_run

            tags = {"rcnn.prefect_flow_run": str(flow_run.id)} if flow_run.id else {}
            key = f"pipeline-{self.config.hash()}"
            self.tracker = open_run(self.config, "pipeline", key=key, tags=tags, fresh=self.fresh)
            self.parent = Parent(self.tracker.run_id, tuple(tags.items()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if self.tracker is not None:
            self.tracker.finish(failed=kind is not None)

    def _is_done(self) -> bool:
        results: Results = {}
        for name in planned(self.config):
            result = finished(self.config, name, results)
            if result is None:
                return False
            results[name] = result
        return True


class _log_in_prefect:  # noqa: N801  (used like a function)
    """Sends what the stages say to the log of the Prefect run too."""

    def __enter__(self) -> None:
        self.handler = APILogHandler()
        logging.getLogger("rcnn").addHandler(self.handler)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("rcnn").removeHandler(self.handler)
