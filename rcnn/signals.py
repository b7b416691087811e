"""Ctrl-C and SIGTERM as a request: what is running may write down where it is before it ends."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rcnn.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
SECONDS_TO_STOP = 10.0
SECONDS_TO_END = int(SECONDS_TO_STOP) + 5
"""From the SIGTERM to the SIGKILL of a Ray job that is stopped: time for a checkpoint, and for the process to end."""


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Lets a SIGTERM end the body as an error does: by default Python dies of it at once, and leaves the servers it started.

    Raises:
        SystemExit: there was one; exit code 143.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _error(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stopping(ask: Callable[[], None]) -> Iterator[None]:
    """At the first signal, calls `ask`, which asks the body to end; the body then has 10 seconds.

    Outside the main thread, where Python takes no signals, it does nothing.

    Args:
        ask: called in a thread of its own.

    Raises:
        KeyboardInterrupt: there was a SIGINT: where the body has ended without an error, or in it when the time is up or at a
            second signal.
        SystemExit: the same, with exit code 143, for a SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if asked:
            raise _error(asked[0])
        asked.append(number)
        threading.Thread(target=_ask, args=(ask,), daemon=True).start()
        timer.start()

    timer = threading.Timer(SECONDS_TO_STOP, lambda: os.kill(os.getpid(), asked[0]))
    timer.daemon = True
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise _error(asked[0])


def _ask(ask: Callable[[], None]) -> None:
    say("  stopping: writing a checkpoint; a second Ctrl-C stops at once")
    ask()


def _error(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(EXIT_CODES[signal.SIGTERM])
