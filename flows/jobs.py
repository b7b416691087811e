"""Runs a stage as a Ray job: submits it, follows its log, attaches to it again, stops it.

The job's id is derived from the stage's folder, so a retried flow finds the job that is still running and attaches to it, and
two flows that need the same result share one job.
"""

import asyncio
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from rcnn import errors
from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, RcnnError
from rcnn.progress import say
from rcnn.results import StageResult
from rcnn.stages import STAGES, Parent, Results, finished, nothing_to_do, results_from_json, stage_code, stage_folder
from rcnn.storage import JOB, JOB_OUTCOME, Storage

FLOW_RUN_TAG = "rcnn.prefect_flow_run"
SUBMISSION_TAG = "rcnn.ray_submission"
UNFINISHED = ("PENDING", "RUNNING")
SECONDS_BETWEEN_LOOKS = 2


def run_as_job(
    config: PipelineConfig, name: str, results: Results, *, fresh: bool = False, parent: Parent | None = None
) -> StageResult:
    """Runs one stage on the cluster at `ray.address`, as `rcnn.stages.run_stage` does in this process.

    Raises:
        ClusterError: the cluster cannot be reached, or the job was stopped or lost.
        RcnnError: the error of the stage itself.
    """
    parent = parent or Parent()
    target = stage_folder(config, name, results)
    done = None if fresh else finished(config, name, results)
    if done is not None:
        say(nothing_to_do(name, target))
        return done
    job_id = f"rcnn-{os.path.basename(target.name)}"
    replaces = fresh and STAGES[name].replaces_whole
    if fresh and not replaces:
        target.storage.delete(target.name)  # before the job is submitted: a retry must not find the old result
    with _reachable(config.ray.address):
        client = JobSubmissionClient(config.ray.address)
        if _status(client, job_id) in UNFINISHED:
            say(f"{name}: attaching to Ray job {job_id}, which is running")
        else:
            _submit(client, job_id, config, name, results, parent, fresh=replaces)
            say(f"{name}: submitted as Ray job {job_id}")
        target.storage.write_text(_mark_of(job_id, dict(parent.tags).get(FLOW_RUN_TAG, "")), "")
        status = asyncio.run(_follow(client, job_id))
    return _outcome(status, job_id, config, name)


def stop_jobs_of(flow: Any, flow_run: Any, state: Any) -> None:
    """Stops the running jobs of a cancelled or crashed flow run (a hook of the flow)."""
    parameters = flow_run.parameters.get("config")
    config = PipelineConfig.model_validate(parameters or {}).placed_by(os.environ)
    if not config.ray.address.startswith("http"):
        return
    storage = Storage(config.storage)
    with _reachable(config.ray.address):
        client = JobSubmissionClient(config.ray.address)
        for job in client.list_jobs():
            is_running = str(job.status.value) in UNFINISHED
            if job.submission_id and is_running and storage.exists(_mark_of(job.submission_id, str(flow_run.id))):
                client.stop_job(job.submission_id)


def _mark_of(job_id: str, flow_run_id: str) -> str:
    """The file that marks that this flow run submitted the job or attached to it."""
    return f"{_result_folder(job_id)}/followed-by-{flow_run_id or 'no-flow-run'}"


@contextmanager
def _reachable(address: str) -> Iterator[None]:
    """Reports errors of Ray's client, which raises those of its HTTP library and server, as a retryable `ClusterError`."""
    try:
        yield
    except (OSError, RuntimeError, AuthenticationError) as error:
        raise ClusterError(
            f"the Ray cluster cannot be used ({' '.join(str(error).split())[:300]})",
            where=f"ray.address = {address}",
            remedy="Start it with `make up`, or correct the address; set RAY_AUTH_MODE=token if it requires a token",
            retryable=True,
        ) from error


def _status(client: Any, job_id: str) -> str | None:
    jobs = {job.submission_id: job.status for job in client.list_jobs()}
    return str(jobs[job_id].value) if job_id in jobs else None


def _submit(
    client: Any, job_id: str, config: PipelineConfig, name: str, results: Results, parent: Parent, *, fresh: bool
) -> None:
    if _status(client, job_id) is not None:
        client.delete_job(job_id)  # of an earlier attempt that has ended: Ray accepts each id once
    storage = Storage(config.storage)
    storage.delete(_result_folder(job_id))
    on_cluster = config.with_settings({"ray.address": "auto", "storage": storage.root})
    # In a file: an argument would end at 128 KiB, and be seen in `ps` and in the dashboard.
    inputs = {
        "config": on_cluster.model_dump(mode="json"),
        "results": {key: result.model_dump(mode="json") for key, result in results.items()},
        "code": stage_code(config, name),
        "parent": {"run_id": parent.run_id, "tags": dict(parent.tags) | {SUBMISSION_TAG: job_id}},
    }
    storage.write_json(f"{_result_folder(job_id)}/{JOB}", inputs)
    command = ["rcnn", name, "--job", storage.below(_result_folder(job_id)).root]
    command += ["--fresh"] if fresh else []
    client.submit_job(
        entrypoint=shlex.join(command),
        submission_id=job_id,
    )


def _result_folder(job_id: str) -> str:
    return f"runs/jobs/{job_id}"


async def _follow(client: Any, job_id: str) -> str:
    """Prints the job's log until the job ends, reconnecting if the connection breaks; returns its status."""
    lines_seen = 0
    while True:
        lines = 0
        try:
            async for text in client.tail_job_logs(job_id):
                for line in filter(str.strip, text.splitlines()):
                    lines += 1
                    if lines > lines_seen:
                        say(f"  | {line}")
        except (RuntimeError, OSError, ClientError) as error:
            say(f"  lost the connection to the log of {job_id} ({type(error).__name__}); reconnecting")
        lines_seen = max(lines, lines_seen)
        status = _status(client, job_id)
        if status not in UNFINISHED:
            return str(status)
        await asyncio.sleep(SECONDS_BETWEEN_LOOKS)


def _outcome(status: str, job_id: str, config: PipelineConfig, name: str) -> StageResult:
    outcome = Storage(config.storage).read_json(f"{_result_folder(job_id)}/{JOB_OUTCOME}") or {}
    if status == "SUCCEEDED" and "result" in outcome:
        return results_from_json({name: outcome["result"]})[name]  # type: ignore[no-any-return]
    if "error" in outcome:
        raise _error_from(outcome["error"])
    what = "succeeded, but its result cannot be seen from here" if status == "SUCCEEDED" else f"ended as {status}"
    raise ClusterError(
        f"Ray job {job_id} {what}",
        where=f"ray.address = {config.ray.address}, storage = {config.storage}",
        remedy=f"rcnn must be installed on the cluster and see the same storage; see `ray job logs {job_id}`",
        retryable=status == "FAILED",
    )


def _error_from(tree: dict[str, Any]) -> RcnnError:
    kind = getattr(errors, tree.pop("kind"))
    return kind(tree.pop("what"), **tree)  # type: ignore[no-any-return]
