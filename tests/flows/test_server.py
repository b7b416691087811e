"""Prefect's temporary server: started where none is set, and reported in one line where it cannot start."""

from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    temporary_settings,
)

from flows import server as server_module
from flows.server import prefect_server
from rcnn.errors import ClusterError

pytestmark = pytest.mark.long


def test_a_server_that_is_set_is_used_and_none_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module.subprocess, "Popen", None)  # a start would fail
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}), prefect_server() as server:
        server.wait()
        assert PREFECT_API_URL.value() == "http://127.0.0.1:1/api"


def test_a_server_that_cannot_start_is_one_line_with_its_reason(tmp_path: Path) -> None:
    database = f"sqlite+aiosqlite:///{tmp_path}/absent/prefect.db"
    settings = {PREFECT_API_URL: None, PREFECT_SERVER_DATABASE_CONNECTION_URL: database}
    with temporary_settings(settings), prefect_server() as server, pytest.raises(ClusterError) as caught:
        server.wait()
    assert "Prefect's temporary server ended with exit code 3" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("prefect_server")
def test_the_settings_lead_to_the_temporary_server() -> None:
    with get_client(sync_client=True) as client:
        assert client.api_url.host == "127.0.0.1"
        assert client.api_healthcheck() is None
