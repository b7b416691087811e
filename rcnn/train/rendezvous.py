"""Where the training workers meet: on loopback if one node has them all, as Ray Train decides it otherwise.

In: Ray Train's group of workers. Out: a torch process group. Torch's own store listens on all interfaces of the machine, and
whoever reaches it can write to it; it takes a socket that is already bound, which is the way out.
"""

import os
import socket
from datetime import timedelta
from typing import Any

from rcnn import ray_session  # noqa: F401  (sets what Ray reads when it is imported)  # isort: skip

import psutil
import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

LOOPBACK = "127.0.0.1"


class LoopbackConfig(TorchConfig):  # type: ignore[misc]
    """`TorchConfig`, whose workers meet on loopback if they share a node."""

    @property
    def backend_cls(self) -> type:
        """What starts the process group."""
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Starts the process group; overrides a private class, so look here when the pinned version of Ray changes."""
        if len(set(worker_group.execute(_node_id))) > 1:
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
    os.environ["GLOO_SOCKET_IFNAME"] = _loopback_interface()  # else the one that the machine's name resolves to
    fd = {"master_listen_fd": _listener.detach()} if world_rank == 0 and _listener else {}  # the store closes it
    _listener = None
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(LOOPBACK, port, num_workers, world_rank == 0, timeout=timeout, **fd)
    dist.init_process_group(backend, store=store, rank=world_rank, world_size=num_workers, timeout=timeout)


def _loopback_interface() -> str:
    """`lo` on Linux, `lo0` on macOS."""
    found = (name for name, all_of in psutil.net_if_addrs().items() if LOOPBACK in (each.address for each in all_of))
    return str(next(found))
