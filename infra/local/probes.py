"""Whether a process is there and answers: what the parts of a stack are asked.

In: processes, ports, addresses. Out: plain answers; what has ended, or cannot be asked, counts as not there.
"""

import json
import urllib.error
import urllib.request
from typing import Any

import psutil

SECONDS_TO_ANSWER = 5


def tree_of(process: psutil.Process) -> list[psutil.Process]:
    """A process and its descendants that are alive."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def name_of(process: psutil.Process) -> str:
    """A process's name; empty where it has ended."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.name())
    except psutil.Error:
        return ""


def listens(process: psutil.Process, port: int) -> bool:
    """Whether a process listens on a port."""
    try:
        connections = process.net_connections(kind="tcp")
    except psutil.Error:
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections)


def answers(url: str) -> bool:
    """Whether a server answers."""
    try:
        urllib.request.urlopen(url, timeout=SECONDS_TO_ANSWER).close()  # noqa: S310  (our own loopback address)
    except urllib.error.HTTPError as error:
        return bool(error.code == 401)  # it requires a token, so it is up
    except OSError:
        return False
    return True


def ask(url: str, data: bytes | None = None) -> Any:
    """A server's answer; None where there is none."""
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER) as answer:  # noqa: S310
            return json.load(answer)
    except (OSError, ValueError):
        return None
