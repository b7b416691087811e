"""Who is told how a flow run ended: real flow runs, and a web server that takes the messages."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling

from flows import notify
from flows.notify import VARIABLE, hooks
from rcnn.errors import ConfigError
from rcnn.results import IngestResult

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("prefect_server")]


class Inbox:
    """A web address, and the messages that came there."""

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []
        inbox = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                inbox.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"json://user:a-password@127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> "Inbox":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with Inbox() as inbox:
        yield inbox


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(notify, "say", lines.append)
    return lines


def run(what: Any) -> None:
    """Runs a flow that does this, as far as it gets."""

    @flow(name="rcnn", flow_run_name="digits RCNN-8", **hooks())
    def ends() -> Any:
        if isinstance(what, Exception):
            raise what
        return what

    ends(return_state=True)


def test_a_run_that_succeeds_tells_its_figures(
    inbox: Inbox, digits: IngestResult, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setenv(VARIABLE, inbox.url)
    run({"ingest": digits.model_dump(mode="json")})
    [message] = inbox.messages
    assert (message["title"], message["type"]) == ("digits RCNN-8: Completed", "success")
    for label, value in digits.highlights(lambda name: name).items():
        assert f"{label}: {value}" in message["message"]
    assert said == []


def test_a_run_that_fails_tells_why_and_where_to_look(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, inbox.url)
    run(ConfigError("is not to be had", where="data.root", remedy="Get it"))
    [message] = inbox.messages
    assert (message["title"], message["type"]) == ("digits RCNN-8: Failed", "failure")
    assert "data.root: is not to be had. Get it" in message["message"]


def test_a_run_that_is_cancelled_is_no_failure(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect calls the hook while the run is still Cancelling."""
    monkeypatch.setenv(VARIABLE, inbox.url)
    notify.notify(None, FlowRun(flow_id=uuid4(), name="digits RCNN-8"), Cancelling())
    [message] = inbox.messages
    assert (message["title"], message["type"]) == ("digits RCNN-8: Cancelled", "warning")


def test_nobody_is_told_unless_the_variable_says_so(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    run({})
    assert inbox.messages == []


def test_addresses_that_cannot_be_used_are_counted_and_never_shown(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    nobody = inbox.url.replace("json://user:a-password@127.0.0.1", "json://user:a-password@127.0.0.9")
    monkeypatch.setenv(VARIABLE, f"nonsense://a-password {nobody} {inbox.url}")
    run({})
    assert len(inbox.messages) == 1
    assert said == [
        f"  {VARIABLE}: Apprise does not know 1 of 3 addresses (see its list of services)",
        f"  {VARIABLE}: not every address took the message that this flow run ended",
    ]
    assert "a-password" not in caplog.text
