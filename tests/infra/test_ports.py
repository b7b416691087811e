"""Ports that are chosen, and ports that are taken."""

import socket
from dataclasses import replace

import pytest

from infra.local import stack
from infra.local.parts import KINDS
from infra.local.ports import RANGE, free_ports, is_free
from rcnn.errors import ClusterError, ConfigError


@pytest.fixture
def taken() -> "socket.socket":
    return socket.create_server(("127.0.0.1", 0))


def test_a_port_that_somebody_listens_on_is_not_free(taken: socket.socket) -> None:
    with taken:
        port = taken.getsockname()[1]
        assert not is_free(port)
    assert is_free(port)


def test_free_ports_differ_and_are_below_those_that_the_system_gives_away() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(port in RANGE and is_free(port) for port in ports)
    assert not set(free_ports(len(RANGE) // 2, but=ports)) & set(ports)


def test_a_usual_port_that_is_taken_is_replaced(
    taken: socket.socket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with taken:
        port = taken.getsockname()[1]
        kind = replace(KINDS["local"], usual_ports={"MLFLOW_PORT": port})
        monkeypatch.delenv("MLFLOW_PORT", raising=False)
        found = stack._usual_ports(kind)["MLFLOW_PORT"]
    assert found != port
    assert capsys.readouterr().out == f"port {port} is in use: MLFLOW_PORT is {found}\n"


def test_a_port_that_was_asked_for_is_not_replaced(taken: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    with taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MLFLOW_PORT", str(port))
        with pytest.raises(
            ClusterError, match=f"MLFLOW_PORT: port {port} is in use. Free it, or run `make up MLFLOW_PORT="
        ):
            stack._usual_ports(KINDS["local"])
    monkeypatch.setenv("MLFLOW_PORT", "http")
    with pytest.raises(ConfigError, match="'http' is not a port"):
        stack._usual_ports(KINDS["local"])
