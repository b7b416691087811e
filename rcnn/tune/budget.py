"""The minutes that a search has used, over all attempts.

In: the folder of the search. Out: a clock that all attempts at it share.
"""

import time

from rcnn.storage import StageFolder

MINUTES = "minutes.json"
SECONDS_BETWEEN_NOTES = 10.0


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
