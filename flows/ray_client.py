"""Ray's client of a job server, with a time limit for each request and for each piece of a log."""

from collections.abc import AsyncIterator
from typing import Any

from aiohttp import ClientSession, ClientWSTimeout, WSMsgType
from ray.job_submission import JobSubmissionClient

SECONDS_OF_SILENCE = 30
"""After which a log is read again: Ray's server answers no pings, so silence is the only sign of a dead connection."""


class Client(JobSubmissionClient):
    """As Ray's, which waits without end.

    Args:
        address: of the job server.
        seconds_to_answer: the limit of a request.
    """

    def __init__(self, address: str, *, seconds_to_answer: float):
        self._seconds_to_answer = seconds_to_answer
        super().__init__(address)

    def _do_request(self, *arguments: Any, **options: Any) -> Any:
        return super()._do_request(*arguments, timeout=self._seconds_to_answer, **options)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """As Ray's, which waits for the next piece without end, and leaves its connection open when it is cancelled."""
        url = f"{self._address}/api/jobs/{job_id}/logs/tail"
        limits = ClientWSTimeout(ws_receive=SECONDS_OF_SILENCE, ws_close=1)
        async with (
            ClientSession(cookies=self._cookies, headers=self._headers) as session,
            session.ws_connect(url, ssl=self._ssl_context or True, timeout=limits) as socket,
        ):
            async for message in socket:
                if message.type is not WSMsgType.TEXT:  # an error of the connection
                    return
                yield message.data
