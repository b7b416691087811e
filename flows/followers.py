"""Who follows a Ray job: each flow run, or call from a shell, leaves a mark beside the job's inputs, and renews it while it
lives.

A job that two flows share is stopped when the last of them is cancelled; a flow that was killed stops renewing its mark and
no longer counts. The mark names its process, so that on the same machine this is known at once.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from rcnn.errors import ClusterError
from rcnn.lease import holder_from_json, this_process
from rcnn.progress import say
from rcnn.storage import Storage

SECONDS_BETWEEN_RENEWALS = 15.0
SECONDS_ALIVE = 60.0
"""The age at which a mark no longer counts: a storage that is away for a moment stops no job."""
SECONDS_BETWEEN_LOOKS = 1.0
PREFIX = "followed-by-"
CLOCK = "clock"


class Followers:
    """The flow runs that follow one job.

    Args:
        storage: where the marks are.
        folder: the job's folder.
        follower: our id; empty: we only look.
    """

    def __init__(self, storage: Storage, folder: str, follower: str):
        self._storage, self._folder = storage, folder
        self._has_id, self._name = bool(follower), f"{PREFIX}{follower or 'observer'}"

    def include_us(self) -> bool:
        """Whether we, or an earlier attempt of our flow run, submitted the job or attached to it."""
        return self._has_id and self._storage.exists(self._path(self._name))

    @contextmanager
    def following(self) -> Iterator[None]:
        """Marks the job as followed by us, and renews the mark until the body ends; the mark stays."""
        self._renew()
        is_over = threading.Event()
        thread = threading.Thread(target=self._renew_until, args=(is_over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def are_there(self) -> bool:
        """Whether a living flow follows the job."""
        return any(age < SECONDS_ALIVE for age in self._ages().values())

    def leave(self) -> bool:
        """Removes our mark; returns whether we were the last.

        A young mark may be of a flow that has just been killed on another machine: this waits until it is renewed or too old.
        """
        self.forget_us()
        ages = self._ages()
        if ages:
            say(f"  looking whether others follow the job, which takes up to {SECONDS_ALIVE:.0f} s")
        while any(age < SECONDS_ALIVE for age in ages.values()):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            before, ages = ages, self._ages()
            if any(age < before.get(name, SECONDS_ALIVE) for name, age in ages.items()):  # renewed, or new
                return False
        return True

    def forget_us(self) -> None:
        """Removes our mark."""
        self._remove(self._name)

    def forget_dead(self) -> None:
        """Removes the marks of others that no longer count."""
        for name, age in self._ages().items():
            if age >= SECONDS_ALIVE and name != self._name:
                self._remove(name)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _renew(self) -> None:
        self._storage.write_text(self._path(self._name), json.dumps(asdict(this_process(self._folder))))

    def _renew_until(self, is_over: threading.Event) -> None:
        while not is_over.wait(SECONDS_BETWEEN_RENEWALS):
            try:
                self._renew()
            except ClusterError as error:
                say(f"  the mark that this flow follows its job is not renewed: {error}")

    def _remove(self, name: str) -> None:
        if self._storage.exists(self._path(name)):
            self._storage.delete_file(self._path(name))

    def _ages(self) -> dict[str, float]:
        """The seconds since each mark was renewed, by the storage's clock, which need not agree with this machine's.

        Those of processes that are known to be dead are as old as marks that no longer count.
        """
        names = [name for name in self._storage.list_sizes(self._folder) if name.startswith(PREFIX)]
        self._storage.write_text(self._path(CLOCK), "")
        now = self._changed(CLOCK)
        names = [name for name in names if not name.endswith(".part")]
        return {name: max(now - self._changed(name), SECONDS_ALIVE * self._is_of_the_dead(name)) for name in names}

    def _is_of_the_dead(self, name: str) -> bool:
        try:
            holder = holder_from_json(self._storage.read_text(self._path(name)))
        except FileNotFoundError:
            return True  # it has just been removed
        return bool(holder.token) and holder.is_gone

    def _changed(self, name: str) -> float:
        """When a file was written; 0 where it has just been removed."""
        path = self._storage.path(self._path(name))
        return float((self._storage.filesystem.get_file_info(path).mtime_ns or 0) / 1e9)
