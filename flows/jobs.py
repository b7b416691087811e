"""Runs a stage as a Ray job: submits it, follows its log, attaches to it again, stops it.

The job's id is derived from the stage's folder, so a retried flow finds the job that is still running and attaches to it, and
two flows that need the same result share one job. A job ends with the flows that follow it only where these are cancelled:
one that loses its flow keeps running, since the next flow attaches to it.
"""

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import TerminationSignal
from prefect.runtime import deployment, flow_run
from prefect.utilities.urls import url_for

from flows.code_package import program_of_jobs, runtime_env_of_jobs
from flows.followers import Followers
from flows.job_server import UNFINISHED, JobServer
from rcnn import errors
from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, RcnnError
from rcnn.lease import held
from rcnn.progress import say
from rcnn.results import StageResult
from rcnn.stages import (
    STAGES,
    Parent,
    Results,
    finished,
    nothing_to_do,
    planned,
    results_from_json,
    run_stage,
    runs_as_job,
    stage_code,
    stage_folder,
)
from rcnn.storage import JOB, JOB_OUTCOME, StageFolder, Storage
from rcnn.tracking import FLOW_PAGE_TAG, JOB_PAGE_TAG

FLOW_RUN_TAG = "rcnn.prefect_flow_run"
SUBMISSION_TAG = "rcnn.ray_submission"
JOBS = "runs/jobs"
SECONDS_BETWEEN_LOOKS = 2
SECONDS_TO_ANSWER = 5
LINES_TO_CATCH_UP = 5
MINUTES_TO_STOP = 1
"""How long a head that is away is waited for by a flow that is being cancelled."""


def tags_of_flow() -> dict[str, str]:
    """What leads from MLflow's runs and Ray's jobs to the flow run that asks for them; nothing outside of one."""
    if not flow_run.id:
        return {}
    # Without a deployment, the server may be one that ends with the command.
    page = url_for("flow-run", flow_run.id) if deployment.id else None
    return {FLOW_RUN_TAG: str(flow_run.id)} | ({FLOW_PAGE_TAG: page} if page else {})


def job_page(config: PipelineConfig, name: str, results: Results) -> str:
    """The page of the Ray job that works on a stage; empty where it runs in this process."""
    if not runs_as_job(config, name):
        return ""
    server = JobServer(config.ray.address, minutes=config.ray.reconnect_minutes)
    return server.page_of(job_id_of(stage_folder(config, name, results)))


def job_id_of(target: StageFolder) -> str:
    """The id of the Ray job whose result goes to a folder."""
    return f"rcnn-{target.unique_name}"


def run_as_job(
    config: PipelineConfig,
    name: str,
    results: Results,
    *,
    fresh: bool = False,
    stop_running: bool = False,
    parent: Parent | None = None,
    follower: str = "",
) -> StageResult:
    """Runs one stage on the cluster at `ray.address`, as `rcnn.stages.run_stage` does in this process.

    Args:
        config: the whole config.
        name: a key of `STAGES`.
        results: the results of the stages before it.
        fresh: does the work again; an attempt that is repeated continues what the first one submitted.
        stop_running: with `fresh`, stops a running job that works on the same result.
        parent: the MLflow run to hang under.
        follower: who follows the job, outside of a flow: an id of this call.

    Raises:
        ClusterError: the cluster cannot be used, the job was stopped or lost, or `fresh` is refused because a job is running.
        RcnnError: the error of the stage itself.
    """
    done = None if fresh else finished(config, name, results)
    if done is not None:
        say(nothing_to_do(name, stage_folder(config, name, results)))
        return done
    job = _Job(config, name, results, fresh=fresh, parent=parent or Parent(), follower=follower)
    try:
        with ending_with_flow(lambda: stop_jobs(config, job.follower)):
            if fresh and not job.followers.include_us():
                job.make_way(stop_running=stop_running)
            with (
                job.followers.following()
            ):  # before the submission, so that cancelling the flow stops this job in any case
                return job.run()
    finally:
        if follower:  # a flow that is retried keeps its mark; a call from a shell has another id the next time
            job.followers.forget_us()


def run_until(
    config: PipelineConfig,
    last: str,
    *,
    fresh: bool = False,
    stop_running: bool = False,
    parent: Parent | None = None,
    follower: str = "",
) -> Results:
    """Runs the stages up to `last`, those of the cluster as Ray jobs where there is one; `fresh` does the last one again."""
    results: Results = {}
    for name in planned(config, last):
        again = fresh and name == last
        if runs_as_job(config, name):
            how = {"fresh": again, "stop_running": again and stop_running}
            results[name] = run_as_job(config, name, results, parent=parent, follower=follower, **how)
        else:
            results[name] = run_stage(config, name, results, fresh=again, parent=parent)
    return results


@contextmanager
def ending_with_flow(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` where a person ends the flow or the command of the body, by Ctrl-C or by cancelling the flow.

    Any other SIGTERM is that of a worker or machine that goes down, and leaves the job. The hook `stop_jobs_of` does the same
    for a flow that does not answer, but later: its process has to end first, and another one to load the flow.
    """
    try:
        yield
    except KeyboardInterrupt:
        stop()
        raise
    except TerminationSignal:
        if is_being_cancelled():
            stop()
        raise


def is_being_cancelled() -> bool:
    """Whether Prefect wants this flow run to end."""
    try:
        with get_client(sync_client=True, httpx_settings={"timeout": SECONDS_TO_ANSWER}) as client:
            state = client.read_flow_run(UUID(str(flow_run.id))).state
    except (httpx.HTTPError, RuntimeError, ValueError):
        return False
    return state is not None and state.is_cancelling()


def stop_jobs_of(flow: Any, flow_run: Any, state: Any) -> None:
    """Stops the running jobs of a cancelled flow run, unless another flow follows them (a hook of the flow)."""
    parameters = flow_run.parameters.get("config")
    config = PipelineConfig.model_validate(parameters or {}).placed_by(os.environ)
    if config.ray.address.startswith("http"):
        stop_jobs(config, str(flow_run.id))


def stop_jobs(config: PipelineConfig, follower: str) -> None:
    """Stops the running jobs that this flow run, or call from a shell, is the last to follow.

    Raises:
        ClusterError: the cluster cannot be used; the jobs keep running.
    """
    storage, server = Storage(config.storage), JobServer(config.ray.address, minutes=MINUTES_TO_STOP)
    for job_id in storage.list_folders(JOBS):
        followers = Followers(storage, f"{JOBS}/{job_id}", follower)
        if not followers.include_us() or not server.is_running(job_id):
            continue
        if followers.leave():
            say(f"  stopping Ray job {job_id}")
            server.stop(job_id)
        else:
            say(f"  Ray job {job_id} keeps running, since another flow follows it")


def left_jobs(config: PipelineConfig) -> Iterator[tuple[Any, ...]]:
    """A check of `rcnn doctor`: jobs of this storage that are running, and that no living flow follows.

    Raises:
        ClusterError: the cluster cannot be used.
    """
    storage, server = Storage(config.storage), JobServer(config.ray.address, minutes=0)
    left = [
        job_id
        for job_id in storage.list_folders(JOBS)
        if server.is_running(job_id) and not Followers(storage, f"{JOBS}/{job_id}", "").are_there()
    ]
    for job_id in left:
        text = f"Ray job {job_id} is running, and no flow follows it"
        remedy = "The pipeline's command, run again, attaches to it; `rcnn doctor --mend` stops it"
        yield text, remedy, partial(server.stop, job_id)
    if not left:
        yield ("no job runs without a flow",)


class _Job:
    """A stage as a job: its id, and its folder, which holds what it is to do, how it ended, and who follows it."""

    def __init__(
        self,
        config: PipelineConfig,
        name: str,
        results: Results,
        *,
        fresh: bool,
        parent: Parent,
        follower: str = "",
    ):
        self._config, self._name, self._results, self._fresh, self._parent = config, name, results, fresh, parent
        self._target = stage_folder(config, name, results)
        self.id = job_id_of(self._target)
        self.follower = follower or dict(parent.tags).get(FLOW_RUN_TAG, "")
        self.followers = Followers(Storage(config.storage), f"{JOBS}/{self.id}", self.follower)
        self._folder = Storage(config.storage).below(f"{JOBS}/{self.id}")
        self._server = JobServer(config.ray.address, minutes=config.ray.reconnect_minutes)
        self._runtime_env = runtime_env_of_jobs(config)  # may be refused: before anything is removed

    def make_way(self, *, stop_running: bool) -> None:
        """Removes what `--fresh` does again.

        Raises:
            ClusterError: a job is writing it.
        """
        if self._server.is_running(self.id):
            if not stop_running:
                raise ClusterError(
                    f"Ray job {self.id} is running and works on the result that --fresh would delete",
                    where=f"ray.address = {self._config.ray.address}",
                    remedy=f"Wait for it, stop it with `ray job stop --address {self._server.address} {self.id}`, or have it "
                    "stopped by --stop-running (in Prefect: the parameter stop_running)",
                )
            say(f"{self._name}: stopping Ray job {self.id}")
            self._server.stop_and_wait(self.id)
        with held(self._target, waits=False):  # a process may be working on it outside of a job
            if not STAGES[self._name].replaces_whole:
                self._target.storage.delete(self._target.name)
            self._forget_outcome()  # before the job is submitted: a retry must not find the old result or outcome

    def run(self) -> StageResult:
        """Attaches to the job, or submits it; returns its result when it has ended."""
        log = JobLog()
        if self._server.is_running(self.id):
            say(f"{self._name}: attaching to Ray job {self.id}, which is running: {self._server.page_of(self.id)}")
            log = JobLog.from_its_end(self._server.whole_log(self.id))
        elif self._fresh and "result" in (outcome := self._outcome()):
            return self._result_in(outcome)  # of an earlier attempt of this flow run: `make_way` removed any other
        else:
            log = self._submit()
            say(f"{self._name}: submitted as Ray job {self.id}: {self._server.page_of(self.id)}")
        status = self._follow(log)
        return self._result(status)

    def _submit(self) -> "JobLog":
        """Submits the job; returns its log, without that of an earlier job with this id, which Ray writes to the same file."""
        num_old = len(self._server.whole_log(self.id)) if self._server.status(self.id) is not None else 0
        self._forget_outcome()
        self.followers.forget_dead()
        on_cluster = self._config.with_settings({"ray.address": "auto", "storage": Storage(self._config.storage).root})
        # In a file: an argument would end at 128 KiB, and be seen in `ps` and in the dashboard.
        own_tags = {SUBMISSION_TAG: self.id, JOB_PAGE_TAG: self._server.page_of(self.id)}
        inputs = {
            "config": on_cluster.model_dump(mode="json"),
            "results": {key: result.model_dump(mode="json") for key, result in self._results.items()},
            "code": stage_code(self._config, self._name),
            "parent": {"run_id": self._parent.run_id, "tags": dict(self._parent.tags) | own_tags},
        }
        self._folder.write_json(JOB, inputs)
        metadata = {"stage": self._name, "recipe": self._config.recipe, "model": self._config.model.title}
        shown = {"prefect_flow_run": FLOW_RUN_TAG, "prefect_page": FLOW_PAGE_TAG}
        metadata |= {key: value for key, tag in shown.items() if (value := dict(self._parent.tags).get(tag))}
        self._server.submit(self.id, self._command(), metadata=metadata, runtime_env=self._runtime_env)
        return JobLog(num_old)

    def _command(self) -> str:
        command = [*program_of_jobs(self._config), self._name, "--job", self._folder.root]
        command += ["--fresh"] if self._fresh and STAGES[self._name].replaces_whole else []
        return shlex.join(command)

    def _follow(self, log: "JobLog") -> str:
        """Prints the job's log until the job ends, and submits it again if the cluster forgets it; returns its status."""
        while True:
            self._server.read_log(self.id, log.begin())
            status = self._server.status(self.id)
            if status is None and "result" not in self._outcome():  # an error may come from the loss of the cluster
                say(f"{self._name}: the Ray cluster no longer knows job {self.id}; submitting it again")
                log = self._submit()
            elif status not in UNFINISHED:
                if status is not None:
                    log.begin()(self._server.whole_log(self.id))
                log.end()
                return status or "unknown"
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _outcome(self) -> dict[str, Any]:
        return self._folder.read_json(JOB_OUTCOME) or {}

    def _forget_outcome(self) -> None:
        if self._folder.exists(JOB_OUTCOME):
            self._folder.delete_file(JOB_OUTCOME)

    def _result(self, status: str) -> StageResult:
        outcome = self._outcome()
        if "result" in outcome:
            return self._result_in(outcome)
        if "error" in outcome:
            raise _error_from(outcome["error"])
        what = "succeeded, but its result cannot be seen from here" if status == "SUCCEEDED" else f"ended as {status}"
        raise ClusterError(
            f"Ray job {self.id} {what}",
            where=f"ray.address = {self._config.ray.address}, storage = {self._config.storage}",
            remedy=f"rcnn must be installed on the cluster and see the same storage; see `ray job logs {self.id}`",
            retryable=status == "FAILED",
        )

    def _result_in(self, outcome: dict[str, Any]) -> StageResult:
        return results_from_json({self._name: outcome["result"]})[self._name]  # type: ignore[no-any-return]


_RAYS_OWN = re.compile(r"INFO job_manager\.py:|^Running entrypoint for job ")
"""Lines of Ray in each job's log, mostly at its beginning, which say what the flow has said."""


class JobLog:
    """A job's log, printed line by line; what comes again after a reconnection is skipped.

    Args:
        num_taken: characters at its beginning that are not printed.
    """

    def __init__(self, num_taken: int = 0) -> None:
        self._num_taken, self._line = num_taken, ""

    @classmethod
    def from_its_end(cls, text: str) -> "JobLog":
        """The log of a job that has run for a while, from its last lines on."""
        lines = text.split("\n")
        shown = [number for number, line in enumerate(lines) if _is_shown(line)][-LINES_TO_CATCH_UP:]
        return cls(sum(len(line) + 1 for line in lines[: shown[0] if shown else 0]))

    def begin(self) -> Callable[[str], None]:
        """Takes the log from its beginning; returns what to call with each piece."""
        position = 0

        def take(text: str) -> None:
            nonlocal position
            new = text[max(0, self._num_taken - position) :]
            position += len(text)
            self._num_taken = max(self._num_taken, position)
            *lines, self._line = (self._line + new).split("\n")
            for line in lines:
                _print_line(line)

        return take

    def end(self) -> None:
        """Prints a last line that does not end."""
        _print_line(self._line)


def _is_shown(line: str) -> bool:
    return bool(line.strip()) and not _RAYS_OWN.search(line)


def _print_line(line: str) -> None:
    if _is_shown(line):
        say(f"  | {line}")


def _error_from(tree: dict[str, Any]) -> RcnnError:
    kind = getattr(errors, tree.pop("kind"))
    return kind(tree.pop("what"), **tree)  # type: ignore[no-any-return]
