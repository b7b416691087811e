"""Prefect's temporary server, started before anything else, so that other work fills the time that it takes.

Prefect would start the same server when the flow begins, wait for it, and import
all of its code into this process too.
"""

import atexit
import http.client
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    get_current_settings,
    temporary_settings,
)

from rcnn.errors import ClusterError

PORTS = range(8400, 9000)
"""Below those that the system gives out (Ray takes many of these while the server starts), above Ray's dashboard."""
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_STOP = 5


class Server(Protocol):
    """What `prefect_server` yields."""

    def wait(self) -> None:
        """Returns when the server answers."""


@contextmanager
def prefect_server() -> Iterator[Server]:
    """Starts the temporary server, unless Prefect's settings name one; in the body, the settings lead to it.

    It runs until the process ends, since Prefect sends the last logs and events after the flow.
    """
    if PREFECT_API_URL.value() or not PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        yield _SetServer()
        return
    server = _TemporaryServer()
    atexit.register(server.stop)
    server.start()
    with temporary_settings({PREFECT_API_URL: server.api_url}):
        yield server


class _SetServer:
    """One that the user set: whether it answers is found by the flow."""

    def wait(self) -> None:
        pass


class _TemporaryServer:
    """The server that Prefect calls ephemeral, without its UI, on loopback."""

    def __init__(self) -> None:
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._output: Any = None

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def start(self) -> None:
        self.port = _free_port()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the server runs)
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error", "--lifespan", "on"]
        self._process = subprocess.Popen(
            command, env=_environment(), stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output
        )

    def wait(self) -> None:
        """Returns when the server answers.

        Raises:
            ClusterError: it ended, or did not answer in time.
        """
        limit = PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
        deadline = time.monotonic() + limit
        while not self._answers():
            assert self._process is not None, "the server was started"
            if (exit_code := self._process.poll()) is not None:
                raise self._fault(f"ended with exit code {exit_code}")
            if time.monotonic() > deadline:
                raise self._fault(f"does not answer after {limit} s")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def stop(self) -> None:
        """Ends the server."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.api_url}/health", timeout=SECONDS_TO_STOP).close()  # noqa: S310  (loopback)
        except (OSError, http.client.HTTPException):
            return False
        return True

    def _fault(self, what: str) -> ClusterError:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        return ClusterError(
            f"Prefect's temporary server {what}" + (f" ({lines[-1][:200]})" if lines else ""),
            where=f"PREFECT_HOME = {get_current_settings().home}",
            remedy="Try once more, or start a server with `make up`",
            retryable=True,
        )


def _environment() -> Mapping[str, str]:
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    # As Prefect marks the server that it starts itself: no UI, and only the services that one flow needs.
    marks = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    return {**os.environ, **settings, **marks}


def _free_port() -> int:
    """A port that nothing listens on, chosen at random: two pipelines may start at once."""
    for port in secrets.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise ClusterError(
        "no port is free for Prefect's temporary server",
        where=f"127.0.0.1, {PORTS.start} to {PORTS.stop - 1}",
        remedy="Stop what listens there, or set PREFECT_API_URL to a server",
    )
