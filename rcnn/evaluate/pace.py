"""The pace of scoring: its end, predicted from the first pieces of work, and the fact."""

import math
import time
from collections.abc import Callable

ROUNDS_TIMED = 3  # after the first one; enough for a small error, few enough to be over soon


class Pace:
    """Predicts from the first pieces how long scoring takes, and measures how long it took.

    Args:
        num_rows: rows to score.
        num_at_once: pieces that are scored at a time. They end together, so whole rounds of them are timed.
        clock: seconds.
    """

    def __init__(self, num_rows: int, *, num_at_once: int, clock: Callable[[], float] = time.perf_counter):
        self.num_rows, self._num_at_once, self._clock = num_rows, num_at_once, clock
        self._last_timed = 1 + ROUNDS_TIMED * num_at_once
        self._num_pieces = self._num_done = self._num_first = 0
        self._warm = 0.0
        self.started, self.seconds, self.predicted_seconds = clock(), 0.0, 0.0

    @property
    def images_per_second(self) -> float:
        """Rows scored so far by the time they took; 0 before the first ones."""
        return self._num_done / self.seconds if self.seconds else 0.0

    @property
    def warm_images_per_second(self) -> float:
        """The same without the first piece, where there was another one: for what is computed after them."""
        num_rows, seconds = self._num_done - self._num_first, self.seconds - self._warm
        return num_rows / seconds if num_rows and seconds > 0 else self.images_per_second

    def start(self) -> None:
        """Counts from now: models are loaded, and the first pieces begin."""
        self.started = self._clock()

    def advance(self, num_rows: int) -> None:
        """Notes the end of a piece. The first one, which warms up, predicts the whole only where there are few."""
        self.seconds = self._clock() - self.started
        self._num_pieces, self._num_done = self._num_pieces + 1, self._num_done + num_rows
        if self._num_pieces == 1:
            self._warm, self._num_first = self.seconds, num_rows
            self.predicted_seconds = self._warm * math.ceil(self.num_rows / num_rows / self._num_at_once)
        elif self._num_pieces == self._last_timed:
            per_row = (self.seconds - self._warm) / (self._num_done - self._num_first)
            self.predicted_seconds = self._warm + per_row * (self.num_rows - self._num_first)
