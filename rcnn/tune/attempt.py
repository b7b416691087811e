"""One attempt at a search: it has a scratch folder of its own, and it knows the minutes used so far.

In: the folder of the search. Out: a scratch folder that ends with the attempt, and a clock that all attempts at the search
share.
"""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from rcnn.storage import StageFolder

SCRATCH = "ray-"
MINUTES = "minutes.json"
SECONDS_BETWEEN_NOTES = 10.0


@contextmanager
def scratch(target: StageFolder) -> Iterator[str]:
    """A folder for what Ray Tune writes, deleted at the end; those of killed attempts are deleted at once."""
    for folder in target.storage.list_folders(target.name):
        if folder.startswith(SCRATCH):
            target.storage.delete(target.path(folder))
    own = target.path(f"{SCRATCH}{uuid.uuid4().hex[:8]}")
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
