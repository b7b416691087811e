"""One thin task per stage: its cache key and its retries."""

from functools import cache
from typing import Any

from prefect import Task
from prefect.runtime import task_run

from flows.jobs import run_as_job
from rcnn.config import PipelineConfig
from rcnn.errors import RcnnError
from rcnn.stages import Parent, Results, results_from_json, run_stage, runs_as_job, stage_folder
from rcnn.storage import RESULT

RETRY_DELAYS_SECONDS = [5, 30, 60]


def _run_one(
    config: PipelineConfig,
    name: str,
    trees: dict[str, Any],
    fresh: bool,
    parent: Parent,
    stop_running: bool = False,
) -> dict[str, Any]:
    results = results_from_json(trees)
    if runs_as_job(config, name):
        result = run_as_job(config, name, results, fresh=fresh, stop_running=stop_running, parent=parent)
    else:
        # A retry resumes what the first attempt left, if that got as far as deleting the old result.
        is_resumed = (task_run.run_count or 1) > 1 and not _has_result(config, name, results)
        result = run_stage(config, name, results, fresh=fresh and not is_resumed, parent=parent)
    return result.model_dump(mode="json")


def _has_result(config: PipelineConfig, name: str, results: Results) -> bool:
    target = stage_folder(config, name, results)
    return target.storage.exists(target.path(RESULT))


def _cache_key(context: Any, parameters: dict[str, Any]) -> str:
    """The stage's folder, whose name holds the hash of settings, data and code, and the storage that it lies in."""
    target = stage_folder(parameters["config"], parameters["name"], results_from_json(parameters["trees"]))
    return f"rcnn-{target.unique_name}"  # Prefect makes it a file name: no slashes


def _may_succeed_later(task: Any, run: Any, state: Any) -> bool:
    """Retries what a network or a busy machine may have caused, and nothing else: a wrong setting stays wrong."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, RcnnError) and error.retryable


@cache
def task_of(name: str) -> Task[Any, Any]:
    """The Prefect task of a row of the table."""
    return Task(
        _run_one,
        name=name,
        task_run_name=name,
        cache_key_fn=_cache_key,
        persist_result=True,
        result_serializer="json",
        retries=len(RETRY_DELAYS_SECONDS),
        retry_delay_seconds=RETRY_DELAYS_SECONDS,
        retry_condition_fn=_may_succeed_later,
    )
