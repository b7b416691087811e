"""The nodes of a Ray cluster, one by one: whether they see and write the storage, have our code, and agree on the time.

In: a storage, from a process that has joined Ray. Out: facts of each node, and an error where the cluster cannot do the work.
To be imported after `ray_session.py`, which sets what Ray reads when it is imported.
"""

import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rcnn.errors import ClusterError, RcnnError
from rcnn.keys import code_of_the_package, differing
from rcnn.storage import Storage
from rcnn.tracking import needs_server

SECONDS_TO_ANSWER = 60
SECONDS_OF_SKEW = 60.0
"""How far clocks may be apart: object stores refuse signatures that are minutes off, and logs would be out of order."""
SEEN = ".seen"  # a folder for what nodes write to show that they can


@dataclass(frozen=True)
class Node:
    """What a node says of itself.

    Attributes:
        name: host and the beginning of the node's id.
        cpus, gpus: that it offers to Ray.
        fault: why it cannot take part, as text after its name; empty: it can.
        remedy: what to do about that.
        free_bytes: of the storage, where that is a folder.
    """

    name: str
    cpus: float
    gpus: float
    fault: str = ""
    remedy: str = ""
    free_bytes: int | None = None


def look_at_nodes(storage: Storage) -> list[Node]:
    """Asks every living node, all at once."""
    mark = f"{SEEN}/{uuid.uuid4().hex[:8]}"
    nodes = living_nodes()
    before = time.time()
    answers = _ask_each(nodes, _look, storage.root, mark)
    seen = storage.list_sizes(mark)
    alive = {node["NodeID"] for node in living_nodes()}  # Ray takes half a minute to notice that a node is gone
    found = [_judge(node, answers[node["NodeID"]], seen, storage, before) for node in nodes if node["NodeID"] in alive]
    storage.delete(mark)
    return found


def require_alike(storage: Storage) -> None:
    """Checks a cluster of several nodes, before anything long starts.

    Raises:
        ClusterError: a node cannot take part; the message names it.
    """
    if len(living_nodes()) == 1:
        return
    nodes = look_at_nodes(storage)
    ailing = [node for node in nodes if node.fault]
    if ailing:
        raise ClusterError(
            f"node {ailing[0].name} {ailing[0].fault} ({len(ailing)} of {len(nodes)} nodes have a fault)",
            where=f"storage = {storage.root}",
            remedy=ailing[0].remedy,
            retryable=True,
        )


def require_seen(path: Path, *, setting: str) -> None:
    """Checks that every node sees a path.

    Raises:
        ClusterError: one does not, or does not answer.
    """
    nodes = living_nodes()
    if len(nodes) == 1:
        return
    answers = _ask_each(nodes, os.path.exists, str(path))
    blind = [_name(node) for node in nodes if answers[node["NodeID"]] is not True]
    if blind:
        raise ClusterError(
            f"node {blind[0]} does not see it ({len(blind)} of {len(nodes)} nodes do not)",
            where=f"{setting} = {path}",
            remedy=f"Set {setting} to a folder that all nodes mount, or to a URI such as s3://bucket/prefix",
            retryable=True,
        )


def living_nodes() -> list[dict[str, Any]]:
    """The nodes that are alive, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"


def _ask_each(nodes: Sequence[dict[str, Any]], function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What a function returns on each node, by the node's id; an exception where it raised one or does not answer."""
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {
        node["NodeID"]: remote.options(label_selector={"ray.io/node-id": node["NodeID"]}).remote(*arguments)
        for node in nodes
    }
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
    answers: dict[str, Any] = {}
    for name, answer in asked.items():
        try:
            answers[name] = ray.get(answer) if answer in ready else TimeoutError(f"no answer in {SECONDS_TO_ANSWER} s")
        except Exception as error:  # of any kind: rcnn may be missing there
            answers[name] = error
    return answers


def _look(root: str, mark: str) -> dict[str, Any]:
    """Runs on each node."""
    storage, fault = Storage(root), ""
    try:
        storage.write_text(f"{mark}/{ray.get_runtime_context().get_node_id()}", socket.gethostname())
    except RcnnError as error:
        fault = error.what
    free = shutil.disk_usage(root).free if storage.is_local and os.path.isdir(root) else None
    return {"fault": fault, "free_bytes": free, "time": time.time(), "code": code_of_the_package()}


def _judge(node: dict[str, Any], answer: Any, seen: dict[str, int], storage: Storage, before: float) -> Node:
    """What an answer says of a node."""
    name, has = _name(node), node["Resources"]
    fault, remedy = _fault(answer, node["NodeID"] in seen, storage, before)
    free = answer["free_bytes"] if isinstance(answer, dict) else None
    return Node(name, has.get("CPU", 0), has.get("GPU", 0), fault, remedy, free)


def _fault(answer: Any, is_seen: bool, storage: Storage, before: float) -> tuple[str, str]:
    install = "Install the same version of rcnn on all nodes"
    if not isinstance(answer, dict):
        last_line = next(iter(str(answer).strip().splitlines()[-1:]), type(answer).__name__)
        return f"does not answer ({last_line})", install if "rcnn" in last_line else "Look at its log, or remove it"
    if answer["fault"]:
        return (
            f"cannot write the storage: {answer['fault']}",
            "Give all nodes the right to write there, and credentials",
        )
    if not is_seen:
        share = "Set storage to a folder that all nodes mount, or to a URI such as s3://bucket/prefix"
        return "has a folder of its own in the place of the storage: what it writes is not seen here", share
    modules = differing(code_of_the_package(), answer["code"])
    if modules:
        return f"has other code in {', '.join(modules[:3])}", install
    skew = max(before - answer["time"], answer["time"] - time.time())
    if skew > SECONDS_OF_SKEW:
        return f"has a clock that is {skew:,.0f} s off", "Run NTP on all machines"
    return "", ""


def require_one_machine(uri: str) -> None:
    """Checks that a cluster of several machines has an MLflow server.

    Raises:
        ConfigError: it has none: several machines would write one SQLite file, which shared folders do not protect.
    """
    hosts = {node["NodeManagerAddress"] for node in living_nodes()}
    if len(hosts) > 1 and not uri:
        raise needs_server(f"Ray on {len(hosts)} machines")
