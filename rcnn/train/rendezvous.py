"""Where the training workers meet: on loopback if one node has them all, else at the addresses by which Ray's nodes reach each
other.

In: Ray Train's group of workers. Out: a torch process group. Torch's own store listens on all interfaces of the machine, and
whoever reaches it can write to it; it takes a socket that is already bound, which is the way out where there is one node.
Imports torch: to be imported where a group is needed.
"""

import os
import socket
from datetime import timedelta
from typing import Any

from rcnn import ray_session  # noqa: F401  (sets what Ray reads when it is imported)  # isort: skip

import psutil
import ray
import ray.util
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

LOOPBACK = "127.0.0.1"
INTERFACE = "GLOO_SOCKET_IFNAME"
"""The variable that Gloo reads."""


class GroupConfig(TorchConfig):
    """`TorchConfig`, whose workers meet on loopback if they share a node, else on the network interface of Ray's addresses.

    By itself, Gloo takes the address that the host's own name leads to. On Debian and Ubuntu that is 127.0.1.1, and in many
    containers 127.0.0.1, so that workers on other machines were refused; elsewhere it may be another network than Ray's.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What starts the process group."""
        return _Group


class _Group(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Starts the process group; overrides a private class, so look here when the pinned version of Ray changes."""
        if len(set(worker_group.execute(_node_id))) > 1:
            worker_group.execute(name_interface)
            super().on_start(worker_group, backend_config)
            return
        has_gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        worker_group.execute(_set_torch_distributed_env_vars)
        port = worker_group.execute_single(0, _listen)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    _join,
                    backend="nccl" if has_gpus else "gloo",
                    world_rank=rank,
                    num_workers=len(worker_group),
                    port=port,
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(len(worker_group))
            ]
        )


_listener: socket.socket | None = None


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _listen() -> int:
    """Binds the socket of the store, in the first worker; returns its port."""
    global _listener
    _listener = socket.create_server((LOOPBACK, 0))
    return int(_listener.getsockname()[1])


def _join(*, backend: str, world_rank: int, num_workers: int, port: int, timeout_s: float) -> None:
    """Joins the process group, in each worker."""
    global _listener
    os.environ[INTERFACE] = _interface_of(LOOPBACK)
    fd = {"master_listen_fd": _listener.detach()} if world_rank == 0 and _listener else {}  # the store closes it
    _listener = None
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(LOOPBACK, port, num_workers, world_rank == 0, timeout=timeout, **fd)
    dist.init_process_group(backend, store=store, rank=world_rank, world_size=num_workers, timeout=timeout)


def name_interface() -> None:
    """Runs on each worker of a group on several nodes. A user's own choice stays."""
    if name := _interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault(INTERFACE, name)


def _interface_of(address: str) -> str:
    """The network interface that has an address: of loopback, `lo` on Linux and `lo0` on macOS. Empty where none has it."""
    found = (name for name, there in psutil.net_if_addrs().items() if any(each.address == address for each in there))
    return next(found, "")
