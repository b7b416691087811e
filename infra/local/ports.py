"""Ports on loopback that stay free until they are used."""

import secrets
import socket
from collections.abc import Iterable

from rcnn.errors import ClusterError

RANGE = range(20_000, 32_000)
"""Above Ray's workers, and below those that the system gives to any process: a port of the system's own range was taken in the
seconds before Ray's agent bound it, and every job hung."""


def is_free(port: int) -> bool:
    """Whether nothing listens on a port, on loopback or on all interfaces."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that has just ended does not count
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


def free_ports(count: int, *, but: Iterable[int] = ()) -> list[int]:
    """Different free ports, chosen at random: two stacks may start at once.

    Raises:
        ClusterError: there are not enough.
    """
    taken, found = set(but), list[int]()
    for port in secrets.SystemRandom().sample(RANGE, len(RANGE)):
        if len(found) == count:
            break
        if port not in taken and is_free(port):
            found.append(port)
    if len(found) < count:
        raise ClusterError(
            f"fewer than {count} ports are free",
            where=f"127.0.0.1, {RANGE.start} to {RANGE.stop - 1}",
            remedy="Stop what listens there",
        )
    return found
