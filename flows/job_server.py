"""The job server of a Ray cluster, reached so that a head that is away for a while is waited for.

Ray's client waits without end for an answer, and its log stops without a word where a connection dies silently. Here each
call has a time limit, and is repeated while the server is away.
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from rcnn.errors import ClusterError
from rcnn.progress import as_duration, say
from rcnn.signals import SECONDS_TO_END

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

UNFINISHED = ("PENDING", "RUNNING")
SECONDS_TO_ANSWER = 30
SECONDS_BETWEEN_TRIES = 2
SECONDS_BETWEEN_REPORTS = 60
SECONDS_TO_CLEAR = 5
"""After a job's end: while its supervisor and monitor in Ray are not gone, another job with its id fails at once."""

Answer = TypeVar("Answer")


class JobServer:
    """The jobs of one cluster. Each method raises a `ClusterError` where the cluster cannot be used.

    Args:
        address: the setting `ray.address`.
        minutes: how long a server that does not answer is waited for, in each call.
    """

    def __init__(self, address: str, *, minutes: float):
        self.address, self._minutes = address, minutes
        self._client: JobSubmissionClient | None = None

    def page_of(self, job_id: str) -> str:
        """The job's page of the dashboard."""
        return f"{self.address.rstrip('/')}/#/jobs/{job_id}"

    def status(self, job_id: str) -> str | None:
        """The status of a job, or None if the cluster does not know it."""
        return self._call(lambda client: _status_of(client, job_id))

    def is_running(self, job_id: str) -> bool:
        """Whether a job has been submitted and has not ended."""
        return self.status(job_id) in UNFINISHED

    def submit(
        self,
        job_id: str,
        entrypoint: str,
        *,
        metadata: Mapping[str, str] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> None:
        """Submits a job, unless a job with this id is running: another flow's, or an attempt whose answer was lost.

        Args:
            job_id: its id.
            entrypoint: a line for the shell of its node.
            metadata: shown beside it in the dashboard.
            runtime_env: what it has besides what its node has installed, in Ray's terms.
        """

        def submit_once(client: "JobSubmissionClient") -> None:
            status = _status_of(client, job_id)
            if status in UNFINISHED:
                return
            if status is not None:  # it has ended: Ray accepts each id once
                time.sleep(SECONDS_TO_CLEAR)
                client.delete_job(job_id)
            # The job's supervisor, which stops it, has the environment of the job. Ray's default is 3 s.
            environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_END)}
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                metadata=dict(metadata or {}),
                runtime_env={**(runtime_env or {}), "env_vars": environment},
            )

        self._call(submit_once)

    def stop(self, job_id: str) -> None:
        """Asks a job to end; it has some seconds to write a checkpoint."""
        self._call(lambda client: client.stop_job(job_id))

    def stop_and_wait(self, job_id: str) -> None:
        """Stops a job; returns when it has ended."""
        self.stop(job_id)
        if self.wait_for(job_id, seconds=SECONDS_TO_END + SECONDS_TO_ANSWER) in UNFINISHED:
            raise ClusterError(f"Ray job {job_id} does not end", where=self._where, remedy="See `ray job list`")

    def wait_for(self, job_id: str, *, seconds: float) -> str | None:
        """Waits until a job has ended, or the time is up; returns its status."""
        deadline = time.monotonic() + seconds
        while (status := self.status(job_id)) in UNFINISHED and time.monotonic() < deadline:
            time.sleep(SECONDS_BETWEEN_TRIES)
        return status

    def read_log(self, job_id: str, show: Callable[[str], None]) -> None:
        """Passes a job's log on as it is written, from its beginning, in pieces of any length.

        Returns when the log ends, when the connection breaks, and when nothing has come for some time: what is right is for
        the caller to find out by `status`.
        """
        from aiohttp import ClientError

        try:
            asyncio.run(self._read_log(job_id, show))
        except TimeoutError:
            return
        except (RuntimeError, OSError, ClientError) as error:
            say(f"  lost the connection to the log of {job_id} ({type(error).__name__}); reconnecting")

    async def _read_log(self, job_id: str, show: Callable[[str], None]) -> None:
        async with asyncio.timeout(SECONDS_TO_ANSWER) as start:
            async for piece in self._connected().tail_job_logs(job_id):
                start.reschedule(None)
                show(piece)

    def whole_log(self, job_id: str) -> str:
        """The log of a job so far; empty, and a line says why, if its node is gone."""
        try:
            return str(self._connected().get_job_logs(job_id))
        except (RuntimeError, OSError) as error:
            say(f"  the end of the log of {job_id} cannot be read ({_reason(error)})")
            return ""

    def _call(self, request: "Callable[[JobSubmissionClient], Answer]") -> Answer:
        """Sends a request, and repeats it while the server is away."""
        from ray.exceptions import AuthenticationError

        outage = _Outage(self.address, self._minutes)
        while True:
            try:
                answer = request(self._connected())
            except (OSError, RuntimeError, AuthenticationError) as error:
                if not _is_away(error) or outage.is_too_long():
                    raise self._fault(error) from error
                outage.report(error)
                time.sleep(SECONDS_BETWEEN_TRIES)
            else:
                outage.end()
                return answer

    def _connected(self) -> "JobSubmissionClient":
        if self._client is None:
            # Late: Ray takes seconds to import, and a flow with nothing to do needs none.
            from flows.ray_client import Client

            self._client = Client(self.address, seconds_to_answer=SECONDS_TO_ANSWER)  # asks the server for its version
        return self._client

    @property
    def _where(self) -> str:
        return f"ray.address = {self.address}"

    def _fault(self, error: Exception) -> ClusterError:
        return ClusterError(
            f"the Ray cluster cannot be used ({_reason(error)})",
            where=self._where,
            remedy="Start it with `make up`, or correct the address; set RAY_AUTH_MODE=token if it requires a token",
        )


class _Outage:
    """The time for which a server is away: reported once a minute, and limited."""

    def __init__(self, address: str, minutes: float):
        self._address, self._seconds = address, 60 * minutes
        self._started, self._reported = time.monotonic(), 0.0

    def is_too_long(self) -> bool:
        return time.monotonic() - self._started >= self._seconds

    def report(self, error: Exception) -> None:
        now = time.monotonic()
        if self._reported and now - self._reported < SECONDS_BETWEEN_REPORTS:
            return
        self._reported = now
        left = as_duration(self._started + self._seconds - now)
        say(f"  no answer from the Ray cluster at {self._address} ({_reason(error)}); trying for {left} more")

    def end(self) -> None:
        if self._reported:
            say(f"  the Ray cluster answers again, after {as_duration(time.monotonic() - self._started)}")


def _status_of(client: "JobSubmissionClient", job_id: str) -> str | None:
    try:
        return str(client.get_job_status(job_id).value)
    except RuntimeError as error:
        if _code_of(error) == 404:
            return None
        raise


def _is_away(error: Exception) -> bool:
    """Whether the server does not answer, or is still starting: the same request may succeed later."""
    code = _code_of(error)
    if code:
        return code >= 500
    return isinstance(error, OSError) and not isinstance(error, ValueError)  # both: an answer of another kind of server


def _code_of(error: Exception) -> int:
    """The HTTP status in an error of Ray's client, which writes it in a sentence, or of its library; 0: there is none."""
    response = getattr(error, "response", None)
    if response is not None:
        return int(response.status_code)
    found = re.match(r"Request failed with status code (\d+)", str(error))
    return int(found[1]) if found else 0


def _reason(error: BaseException) -> str:
    """Why a request failed, in one line: the first cause, around which its libraries put sentences of their own."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(str(error).split())[:300] or type(error).__name__
