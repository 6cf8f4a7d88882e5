"""SIGINT and SIGTERM as a flag that a run looks at between two operations.

Handlers are installed in the main thread only and restored afterwards; elsewhere, and for the second signal of a kind,
Python's own behaviour stays. Whoever waits for a thread waits by `patiently`, and so hears the signal.
"""

import concurrent.futures
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import Any, TypeVar

from .errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 0.5
"""Seconds that are waited at most until somebody asks again whether the run is to stop."""
Check = Callable[[], None]
"""Raises if the run is to stop."""
T = TypeVar("T")


class Interruptible:
    """``with Interruptible() as stop: ... stop.check()`` raises `Interrupted` after the first signal."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._signum: int | None = None

    def __enter__(self) -> "Interruptible":
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        signal.signal(signum, self._before[signum])  # a second one takes effect at once

    def check(self) -> None:
        if self._signum is not None:
            raise Interrupted(self._signum)


def patiently(future: Future[T], check: Check) -> T:
    """What a thread made of it, waited for as long as ``check`` raises nothing."""
    check()
    while not future.done():
        concurrent.futures.wait((future,), PATIENCE)
        check()
    return future.result()  # not with a timeout: a disk's own TimeoutError would pass for it
