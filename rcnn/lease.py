"""Leases: at most one process at a time works on a key, across machines and retries.

In: a stage's folder. Out: the folder with a lease, which a heartbeat renews while the body runs. Those who write ask the
folder first (`StageFolder.require_held`), so a process that was silent for too long, and lost its lease to another one,
writes nothing more.

    .leases/<folder>.json     who holds it: a token (new for each holder), a counter of beats, and the process

A holder counts as dead when its process on this machine has ended, or when its counter has not changed for a minute by the
clock of the process that waits: clocks of different machines are not compared.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil

from rcnn import conditional
from rcnn.errors import ClusterError, LeaseLost
from rcnn.progress import say
from rcnn.storage import StageFolder, Storage
from rcnn.text import parse_json

FOLDER = ".leases"
SECONDS_BETWEEN_BEATS = 10.0
SECONDS_TO_EXPIRE = 60.0
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_LINES = 600.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        token: of this holding; empty: the lease is free.
        beat: how often it was renewed.
        host, space, pid: the process, and the namespace that its pid belongs to (containers may share a host's name).
        born: when it was started, since pids are used again.
        seen: when it was last renewed, by the holder's clock, for people to read.
        work: the folder.
    """

    token: str = ""
    beat: int = 0
    host: str = ""
    space: str = ""
    pid: int = 0
    born: str = ""
    seen: str = ""
    work: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def seems_alive(self) -> bool:
        """Whether it is probably working. For another machine, this trusts its clock to within an hour."""
        if self.is_gone or self.is_here:
            return not self.is_gone
        return datetime.now(UTC) - datetime.fromisoformat(self.seen) < timedelta(hours=1)

    @property
    def is_gone(self) -> bool:
        """Whether it is known to be dead: its process was on this machine and has ended."""
        if not self.token or not self.is_here:
            return not self.token
        with suppress(psutil.NoSuchProcess):
            is_dead = psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
            return is_dead or _born(self.pid) != self.born
        return True

    @property
    def is_here(self) -> bool:
        """Whether its pid can be looked up by this process."""
        return (self.host, self.space) == (socket.gethostname(), _space())

    def renewed(self) -> "Holder":
        """The same, one beat later."""
        return replace(self, beat=self.beat + 1, seen=datetime.now(UTC).isoformat(timespec="seconds"))


class Lease:
    """An acquired lease, as seen by its holder and by the workers that write for it.

    Args:
        storage: where it lies.
        name: the stage's folder.
        token: of the holding.
    """

    def __init__(self, storage: Storage, name: str, token: str):
        self.storage, self.name, self.token = storage, name, token
        self.on_lost: Callable[[LeaseLost], None] = lambda error: None
        """Called once, in the thread of the heartbeat, when another process has taken the lease."""

    def require(self) -> None:
        """Checks that the lease is still held.

        Raises:
            LeaseLost: another process has it.
            ClusterError: the storage cannot be read.
        """
        holder, _ = read_holder(self.storage, self.name)
        if holder.token != self.token:
            raise LeaseLost(
                f"{holder if holder.token else 'another process'} took over this work",
                where=self.storage.uri(self.name),
                remedy=f"No work is lost, that process continues it: this one did not respond for {SECONDS_TO_EXPIRE:g} s",
            )


@contextmanager
def held(target: StageFolder, *, waits: bool = True, says_so: bool = True) -> Iterator[StageFolder]:
    """Takes the lease of a stage's folder and keeps it while the body runs; yields the folder with it.

    Where storage is neither a local folder nor S3, there are no leases, and a line says so.

    Args:
        target: the folder.
        waits: whether to wait for another holder that is alive.
        says_so: whether to say for whom.

    Raises:
        ClusterError: another process holds it, and `waits` is off; or the storage cannot be used.
    """
    if not conditional.can_swap(target.storage):
        if says_so:
            say(f"  this kind of storage has no leases: let no other process work on {target.name} now")
        yield target
        return
    holder, version = _take(target, waits, says_so)
    lease = Lease(target.storage, target.name, holder.token)
    beats = _Heartbeat(lease, holder, version)
    try:
        yield replace(target, lease=lease)
    finally:
        beats.stop_and_release()


def is_held(storage: Storage, name: str) -> bool:
    """Whether a process is probably working on a folder (see `Holder.seems_alive`).

    Raises:
        ClusterError: the storage cannot be read.
    """
    return conditional.can_swap(storage) and read_holder(storage, name)[0].seems_alive


def all_holders(storage: Storage) -> list[Holder]:
    """The holders in all records of a storage, dead ones included."""
    files = storage.list_sizes(FOLDER) if conditional.can_swap(storage) else {}
    holders = [
        holder_from_json(conditional.read(storage, f"{FOLDER}/{file}")[0]) for file in files if file.endswith(".json")
    ]
    return [holder for holder in holders if holder.token]


def break_lease(storage: Storage, holder: Holder) -> None:
    """Frees the lease of a dead holder, unless another process has acquired it since."""
    found, version = read_holder(storage, holder.work)
    if found == holder:
        _write(storage, holder.work, Holder(), version)


def read_holder(storage: Storage, name: str) -> tuple[Holder, str]:
    """The holder of a folder's lease, and the version of the record; a damaged record counts as a free lease.

    Raises:
        ClusterError: the storage cannot be read.
    """
    text, version = conditional.read(storage, _file(name))
    return holder_from_json(text), version


def holder_from_json(text: str) -> Holder:
    """A holder from its record; what is not one counts as a free lease."""
    with suppress(ValueError, TypeError):
        return Holder(**parse_json(text))
    return Holder()


def _file(name: str) -> str:
    return f"{FOLDER}/{name.replace('/', '-')}.json"


def _write(storage: Storage, name: str, holder: Holder, version: str) -> str | None:
    return conditional.swap(storage, _file(name), json.dumps(asdict(holder)) + "\n", version)


def _take(target: StageFolder, waits: bool, says_so: bool) -> tuple[Holder, str]:
    """Takes the lease once it is free or its holder dead. Returns this process as the holder, and the record's version."""
    mine, watch = this_process(target.name), _Watch()
    while True:
        other, version = read_holder(target.storage, target.name)
        if other.token == mine.token:  # our own write arrived, although its answer was lost
            return mine, version
        watch.look(other)
        if other.is_gone or watch.is_silent:
            if taken := _write(target.storage, target.name, mine, version):
                return mine, taken
            continue
        if waits and says_so:
            watch.say_now_and_then(other)
        elif not waits and watch.is_alive:
            raise ClusterError(
                f"{other} is working on it",
                where=target.storage.uri(target.name),
                remedy="Wait until it has ended, or stop it first",
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)


def this_process(work: str) -> Holder:
    """This process as the holder of a new lease."""
    pid = os.getpid()
    return Holder(uuid.uuid4().hex, 0, socket.gethostname(), _space(), pid, _born(pid), work=work).renewed()


def _space() -> str:
    """The namespace of this process's pid; empty where there are none."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _born(pid: int) -> str:
    """When a process was started, by a clock that is never set: boot and ticks since then; elsewhere than on Linux, seconds."""
    with suppress(OSError):
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {ticks}"
    return f"{psutil.Process(pid).create_time():.0f}"


class _Watch:
    """Watches another holder by one's own clock.

    Attributes:
        is_alive: whether it is known to be: its process is on this machine, or it was seen to renew the lease.
    """

    def __init__(self) -> None:
        self.is_alive = False
        self._last: tuple[str, int] | None = None
        self._since = time.monotonic()
        self._said = self._since - SECONDS_BETWEEN_LINES

    @property
    def is_silent(self) -> bool:
        """Whether it has not renewed the lease for so long that it is taken for dead."""
        return time.monotonic() - self._since > SECONDS_TO_EXPIRE

    def look(self, other: Holder) -> None:
        """Notes what the record says now."""
        if (other.token, other.beat) != self._last:
            self.is_alive = self._last is not None or other.is_here
            self._last, self._since = (other.token, other.beat), time.monotonic()

    def say_now_and_then(self, other: Holder) -> None:
        """Says who is waited for."""
        if time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            say(f"  {other} is working on the same result: waiting for it")
            self._said = time.monotonic()


class _Heartbeat:
    """Renews a lease in a thread of its own."""

    def __init__(self, lease: Lease, holder: Holder, version: str):
        self._lease, self._holder, self._version = lease, holder, version
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_BEATS):
            # Keep working if the storage cannot be reached: the next successful beat shows whether the lease was lost.
            try:
                if not self._put(self._holder.renewed()):
                    self._lease.require()
            except LeaseLost as error:
                self._lease.on_lost(error)
                return
            except ClusterError:
                continue

    def _put(self, holder: Holder) -> bool:
        """Writes the record, unless another process has the lease; returns whether it was written."""
        lease = self._lease
        written = _write(lease.storage, lease.name, holder, self._version)
        if not written:  # perhaps by a write of our own, whose answer was lost
            found, version = read_holder(lease.storage, lease.name)
            written = _write(lease.storage, lease.name, holder, version) if found.token == lease.token else None
        if written:
            self._holder, self._version = holder, written
        return bool(written)

    def stop_and_release(self) -> None:
        """Ends the thread, and frees the lease if it is still ours."""
        self._stop.set()
        self._thread.join()
        with suppress(
            ClusterError
        ):  # the next holder sees that this process has ended, or that the lease is not renewed
            self._put(Holder())
