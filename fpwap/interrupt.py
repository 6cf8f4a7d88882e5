"""SIGINT and SIGTERM as a flag that a run looks at between two operations.

Handlers are installed in the main thread only and restored afterwards; elsewhere, and for the second signal of a kind,
Python's own behaviour stays.
"""

import signal
import threading
from types import FrameType
from typing import Any

from .errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
