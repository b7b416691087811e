"""The flow "rcnn": ingest -> tune -> train -> evaluate -> audit -> register.

In: a config, the flow's typed parameter, which the Prefect UI draws as a form. Out: the result of each stage, as JSON.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from prefect import flow
from prefect.logging.handlers import APILogHandler
from prefect.runtime import deployment, flow_run

from flows.artifacts import Artifacts
from flows.jobs import job_page, stop_jobs_of, tags_of_flow
from flows.left_runs import label_flow_run
from flows.notify import hooks
from flows.stages import task_of
from rcnn.config import PipelineConfig
from rcnn.data.sources import looking_once
from rcnn.errors import ClusterError
from rcnn.lease import held
from rcnn.progress import say, say_lines, show_on_screen
from rcnn.recipes import demo
from rcnn.registry.outbox import send_waiting
from rcnn.stages import (
    STAGES,
    Parent,
    end_pipeline,
    finished,
    finished_until,
    nothing_to_do,
    pipeline_key,
    planned,
    results_from_json,
    stage_folder,
)
from rcnn.storage import StageFolder, Storage
from rcnn.summary import summary_lines
from rcnn.tracking import finish_failed


def flow_run_name() -> str:
    """What the Prefect UI calls a run: the data and the network."""
    given = flow_run.parameters.get("config")
    return title_of(given if isinstance(given, PipelineConfig) else PipelineConfig.model_validate(given or {}))


def title_of(config: PipelineConfig) -> str:
    """`mnist-sample RCNN-32 T=1`."""
    return f"{config.data.dataset} {config.model.short_title}"


# A crashed flow leaves its jobs running: the flow that retries it attaches to them.
@flow(name="rcnn", flow_run_name=flow_run_name, **hooks(stop_jobs_of))
def full_pipeline(config: PipelineConfig = demo(), fresh: bool = False, stop_running: bool = False) -> dict[str, Any]:
    """Trains the model that the config describes, and registers it.

    Args:
        config: every setting.
        fresh: does all stages again, although their results are there.
        stop_running: with fresh, stops Ray jobs that are running for the same results, which otherwise are a reason to refuse.
    """
    return run_pipeline(config, fresh_from=next(iter(STAGES)) if fresh else "", stop_running=stop_running)


def run_pipeline(
    config: PipelineConfig, *, last: str = "", fresh_from: str = "", stop_running: bool = False
) -> dict[str, Any]:
    """The body of a flow: runs the stages that are left, and returns the results of all.

    Args:
        config: every setting.
        last: the stage to end with; empty: all.
        fresh_from: this stage and those after it are done again; empty: none.
        stop_running: stops Ray jobs that are running for results which are made again; otherwise they are a reason to refuse.
    """
    show_on_screen()
    config = config.rooted()
    label_flow_run()
    with looking_once(), log_in_prefect():
        trees = None if fresh_from else _nothing_to_do(config, last)
        if trees is None:
            trees = _run_tasks(config, last, fresh_from, stop_running)
            end_pipeline(config, results_from_json(trees))
        if deployment.id:  # in a shell, the command prints it
            say_lines(summary_lines(config, trees))
    return trees


def _nothing_to_do(config: PipelineConfig, last: str) -> dict[str, Any] | None:
    """The results of all stages, if none is left to run: tasks, and what they would import, take longer than this look."""
    results = finished_until(config, last)
    if len(results) < len(planned(config, last)):
        return None
    for name in results:
        say(nothing_to_do(name, stage_folder(config, name, results)))
    send_waiting(config)
    return {name: result.model_dump(mode="json") for name, result in results.items()}


def _run_tasks(config: PipelineConfig, last: str, fresh_from: str, stop_running: bool) -> dict[str, Any]:
    """Runs a task for each stage, under one MLflow run; returns their results."""
    trees: dict[str, Any] = {}
    again = list(STAGES)[list(STAGES).index(fresh_from) :] if fresh_from else []
    with Artifacts(config) as artifacts, _at_work(config), _pipeline_run(config, bool(again), trees) as parent:
        for name in planned(config, last):
            given = {"config": config, "name": name, "trees": trees, "fresh": name in again, "parent": parent}
            trees[name] = _run_task(given | {"stop_running": stop_running}, artifacts)
    return trees


def _run_task(given: dict[str, Any], artifacts: Artifacts) -> Any:
    """Runs a stage's task; Prefect's cache is trusted only where what it points to is still there."""
    config, name, results = given["config"], given["name"], results_from_json(given["trees"])
    done = None if given["fresh"] else finished(config, name, results)
    state = task_of(name).with_options(refresh_cache=done is None)(**given, return_state=True)
    if done is not None and state.name == "Cached":
        say(nothing_to_do(name, stage_folder(config, name, results)))
        return done.model_dump(mode="json")  # it may be newer than what Prefect kept
    tree = state.result()
    [result] = results_from_json({name: tree}).values()
    page = job_page(config, name, results) if done is None else ""
    artifacts.publish(name, result, job_page=page, flow_run_id=flow_run.id, task_run_id=state.state_details.task_run_id)
    return tree


@contextmanager
def _pipeline_run(config: PipelineConfig, fresh: bool, trees: dict[str, Any]) -> Iterator[Parent]:
    """The MLflow run above the stages' own. The body fills `trees`."""
    from rcnn.registry.pipeline_run import finish_pipeline, open_pipeline

    tags = tags_of_flow()
    tracker = open_pipeline(config, key=pipeline_key(config), tags=tags, fresh=fresh)
    try:
        yield Parent(tracker.id, tuple(tags.items()))
    except BaseException:
        finish_failed(tracker)
        raise
    finish_pipeline(tracker, config, results_from_json(trees))


@contextmanager
def _at_work(config: PipelineConfig) -> Iterator[None]:
    """Holds a lease while the pipeline's MLflow run is open, so that one left by a crash is known; of two flows, one does."""
    with ExitStack() as stack:
        folder = StageFolder(Storage(config.storage), pipeline_key(config))
        # Another flow may run the same pipeline; a storage that is away is reported by the stages.
        with suppress(ClusterError):
            stack.enter_context(held(folder, waits=False, says_so=False))
        yield


@contextmanager
def log_in_prefect() -> Iterator[None]:
    """Sends what the stages say to the log of the Prefect run too."""
    handler = APILogHandler()
    logging.getLogger("rcnn").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("rcnn").removeHandler(handler)
