"""Waiting in tests for what other processes do."""

import time
from collections.abc import Callable


def wait_until(is_so: Callable[[], bool], seconds: float) -> float:
    """Waits for a condition; returns how long that took."""
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < seconds, "it did not come true"
        time.sleep(0.2)
    return time.monotonic() - started
