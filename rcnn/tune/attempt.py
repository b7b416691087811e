"""One attempt at a search: it is the only one, it has a scratch folder of its own, and it knows the minutes used so far.

In: the folder of the search. Out: a lock and a scratch folder that end with the attempt, and a clock that all attempts at
the search share.
"""

import hashlib
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rcnn.progress import say
from rcnn.storage import StageFolder

SCRATCH = "ray-"
MINUTES = "minutes.json"
SECONDS_BETWEEN_NOTES = 10.0


@contextmanager
def only_attempt(target: StageFolder) -> Iterator[None]:
    """Waits until no other process of this machine works on the search, then keeps others out while the body runs.

    The lock belongs to the process and ends with it, however it ends. Attempts on other machines share it only where the
    storage is a folder whose file system locks across machines.

    Raises:
        ClusterError: the storage cannot be written.
    """
    path = _lock_path(target)
    with target.storage.writing(path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock, owner = FileLock(path), path.with_suffix(".pid")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            say(f"  {_process_in(owner)} is running the same search: waiting for it to end")
            lock.acquire()
        owner.write_text(f"{os.getpid()} {socket.gethostname()}")
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _lock_path(target: StageFolder) -> Path:
    """Beside the search, not in it: `--fresh` deletes its folder. For an object store, which has no locks, on this machine."""
    name = target.name.replace("/", "-")
    if target.storage.is_local:
        return target.storage.local_path(f".locks/{name}.lock")
    root = hashlib.sha256(target.storage.root.encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir(), f"rcnn-locks-{os.getuid()}", f"{root}-{name}.lock")


def _process_in(owner: Path) -> str:
    try:
        pid, host = owner.read_text().split()
    except (OSError, ValueError):  # it is just starting, or just ending
        return "another process"
    return f"process {pid} on {host}"


@contextmanager
def scratch(target: StageFolder) -> Iterator[str]:
    """A folder for what Ray Tune writes, deleted at the end; those of killed attempts of this machine are deleted at once.

    To be entered by the only attempt of this machine. Those of other machines may be in use and are left as they are.
    """
    prefix = f"{SCRATCH}{socket.gethostname()}-"
    for folder in target.storage.list_folders(target.name):
        if folder.startswith(prefix):
            target.storage.delete(target.path(folder))
    own = target.path(f"{prefix}{uuid.uuid4().hex[:8]}")
    try:
        yield own
    finally:
        target.storage.delete(own)


class Budget:
    """The minutes that a search has used, over all attempts.

    They are noted in the search's folder now and then, so that a killed attempt counts, but for its last seconds.

    Args:
        target: the folder of the search.
        max_minutes: all that it may use; 0: any number.
    """

    def __init__(self, target: StageFolder, *, max_minutes: float):
        self.target, self.max_minutes = target, max_minutes
        self._before = minutes_noted(target)
        self._started = self._noted = time.monotonic()

    @property
    def minutes_used(self) -> float:
        """By this attempt and those before it."""
        return self._before + (time.monotonic() - self._started) / 60

    def is_spent(self) -> bool:
        """Whether the search must end; to be asked often, since this also notes the minutes."""
        if time.monotonic() - self._noted > SECONDS_BETWEEN_NOTES:
            self.note()
        return 0 < self.max_minutes <= self.minutes_used

    def note(self) -> None:
        """Writes down the minutes used.

        Raises:
            ClusterError: the storage cannot be written.
        """
        self._noted = time.monotonic()
        self.target.storage.write_json(self.target.path(MINUTES), {"minutes": round(self.minutes_used, 3)})


def minutes_noted(target: StageFolder) -> float:
    """What earlier attempts at the search have used; 0 where the note is damaged."""
    try:
        tree = target.storage.read_json(target.path(MINUTES))
        return max(0.0, float(tree["minutes"])) if tree else 0.0
    except (ValueError, TypeError, KeyError):
        return 0.0
