"""Torch's process group over Ray Train workers, at the addresses by which Ray's nodes reach each other.

In: the workers. Out: the variable that Gloo reads. Imports torch: to be imported where a group is needed.
"""

import os
from typing import Any

from rcnn import ray_session  # noqa: F401  (sets what Ray reads when it is imported)  # isort: skip

import psutil
import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


class GroupConfig(TorchConfig):
    """`TorchConfig`, with Gloo on the network interface of the node's address in Ray.

    Gloo takes the address that the host's own name leads to. On Debian and Ubuntu that is 127.0.1.1, and in many containers
    127.0.0.1, so that workers on other machines were refused; elsewhere it may be another network than Ray's. On a Ray that
    is on loopback, Gloo is too.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets up the group."""
        return _Group


class _Group(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Runs before the workers' function."""
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


def name_interface() -> None:
    """Runs on each worker. A user's own choice stays."""
    address = ray.util.get_node_ip_address()
    for name, there in psutil.net_if_addrs().items():
        if any(each.address == address for each in there):
            os.environ.setdefault(INTERFACE, name)
