"""The network interface on which training workers reach each other."""

import os

import pytest
import ray.util

from rcnn.train.rendezvous import INTERFACE, name_interface


@pytest.fixture(autouse=True)
def _node_is_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv(INTERFACE, "")  # so that it is restored
    monkeypatch.delenv(INTERFACE)


def test_gloo_takes_the_interface_of_the_nodes_address() -> None:
    name_interface()
    assert os.environ[INTERFACE] == "lo"


def test_a_users_own_interface_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERFACE, "ib0")
    name_interface()
    assert os.environ[INTERFACE] == "ib0"
