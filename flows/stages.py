"""One thin task per stage: its cache key, its retries, and an artifact for the Prefect UI."""

import hashlib
import os
from typing import Any

from prefect import Task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.runtime import task_run

from flows.jobs import run_as_job
from rcnn.config import PipelineConfig
from rcnn.errors import RcnnError
from rcnn.results import EvaluateResult, IngestResult, RegisterResult, StageResult, TrainResult, TuneResult
from rcnn.stages import STAGES, Parent, results_from_json, run_stage, stage_folder
from rcnn.text import printable

RETRY_DELAYS_SECONDS = [5, 30]


def _run_one(config: PipelineConfig, name: str, trees: dict[str, Any], fresh: bool, parent: Parent) -> dict[str, Any]:
    on_cluster = STAGES[name].is_heavy(config) and config.ray.address.startswith("http")
    run = run_as_job if on_cluster else run_stage
    # A retry goes on with what the first attempt left; ingest begins anew, and keeps the old data so far.
    is_resumed = (task_run.run_count or 1) > 1 and name != "ingest"
    result = run(config, name, results_from_json(trees), fresh=fresh and not is_resumed, parent=parent)
    _publish_artifact(name, result)
    return result.model_dump(mode="json")


def _cache_key(context: Any, parameters: dict[str, Any]) -> str:
    """The stage's folder, whose name holds the hash of settings, data and code, and the storage that it lies in."""
    target = stage_folder(parameters["config"], parameters["name"], results_from_json(parameters["trees"]))
    root = hashlib.sha256(target.storage.root.encode()).hexdigest()[:8]
    return f"rcnn-{os.path.basename(target.name)}-{root}"  # Prefect makes it a file name: no slashes


def _may_succeed_later(task: Any, run: Any, state: Any) -> bool:
    """Retries what a network or a busy machine may have caused, and nothing else: a wrong setting stays wrong."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, RcnnError) and error.retryable


TASKS: dict[str, Task[Any, Any]] = {
    name: Task(
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
    for name in STAGES
}


def _publish_artifact(name: str, result: StageResult) -> None:
    if isinstance(result, TuneResult):
        rows = [
            {"trial": trial.name, **trial.choice.model_dump(), **trial.model_dump(exclude={"name", "choice"})}
            for trial in result.trials
        ]
        create_table_artifact(rows, key="rcnn-tune", description=f"Best: {result.best_trial}, {result.best!s}")
    else:
        rows_of_text = "\n".join(f"| {label} | {value} |" for label, value in _figures(result).items())
        create_markdown_artifact(f"# {name}\n\n| | |\n| --- | --- |\n{rows_of_text}\n", key=f"rcnn-{name}")


def _figures(result: StageResult) -> dict[str, str]:
    if isinstance(result, IngestResult):
        rows = {f"{split} rows": f"{count:,}" for split, count in result.rows.items()}
        return {"data set": result.folder, "digest": f"`{result.digest[:16]}`", **rows}
    if isinstance(result, TrainResult):
        return {
            "model": f"{result.folder}/model",
            "validation error": f"{100 * result.val_error:.2f} % (epoch {result.best_epoch} of {result.epochs})",
            "parameters": f"{result.num_parameters:,}",
            "speed": f"{result.images_per_second:,.0f} images/s",
        }
    if isinstance(result, EvaluateResult):
        per_class = {
            f"accuracy of {printable(name)}": "no test rows" if share is None else f"{100 * share:.1f} %"
            for name, share in result.accuracy_per_class.items()
        }
        return {
            "test error": f"{100 * result.test_error:.2f} % of {result.rows:,} rows",
            "report": result.folder,
            **per_class,
        }
    assert isinstance(result, RegisterResult), f"no artifact is known for {type(result).__name__}"
    return {"model": f"{result.model_name} version {result.version}", "alias": result.alias, "why": result.reason}
