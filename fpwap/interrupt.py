"""SIGINT and SIGTERM as a flag that a run looks at between two operations.

Handlers are installed in the main thread only and restored afterwards; elsewhere, and for the second signal of a kind,
Python's own behaviour stays. Whoever waits for a thread waits by `patiently`, and so hears the signal; what a thread
does it does `at_work`, so that an error says at what. Who does not look at the flag for a while - an operation on very
many rows, a callback that computes - is stopped between two lines of Python.
"""

import concurrent.futures
import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import Any, TypeVar

from .errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 0.5
"""Seconds that are waited at most until somebody asks again whether the run is to stop."""
LONGEST = 2.5
"""Seconds after a signal at which the main thread is stopped wherever it is, if nobody has asked meanwhile."""
Check = Callable[[], None]
"""Raises if the run is to stop."""
T = TypeVar("T")


class Interruptible:
    """``with Interruptible() as stop: ... stop.check()`` raises `Interrupted` after the first signal."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._signum: int | None = None
        self._heard = self._insisting = False
        self._main = threading.main_thread().ident or 0
        self._noted: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # a handler may put into it at any moment
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Interruptible":
        if threading.get_ident() == self._main:
            self._thread = threading.Thread(target=self._insist, name="fpwap-signal", daemon=True)
            self._thread.start()
            self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._heard = True
        try:
            if self._thread is not None:
                self._noted.put(None)
                self._thread.join()
        finally:
            for signum, handler in self._before.items():
                signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is None:
            self._noted.put(signum)
        self._signum = signum
        signal.signal(signum, self._again)

    def _again(self, signum: int, frame: FrameType | None) -> None:
        """A second one takes effect at once; one of our own, where nobody has looked at the first."""
        if not self._insisting:
            signal.signal(signum, self._before[signum])
            signal.raise_signal(signum)
        elif not self._heard:
            self.check()
        self._insisting = False

    def check(self) -> None:
        if self._signum is not None:
            self._heard, self._insisting = True, False
            raise Interrupted(self._signum)

    def _insist(self) -> None:
        """On a thread of its own: sends the signal to the main thread again if it is not heard."""
        signum = self._noted.get()
        if signum is None:
            return
        try:
            self._noted.get(timeout=LONGEST)
        except queue.Empty:
            if not self._heard:
                self._insisting = True
                signal.pthread_kill(self._main, signum)


def patiently(future: Future[T], check: Check) -> T:
    """What a thread made of it, waited for as long as ``check`` raises nothing."""
    check()
    while not future.done():
        concurrent.futures.wait((future,), PATIENCE)
        check()
    return future.result()  # not with a timeout: a disk's own TimeoutError would pass for it


@contextlib.contextmanager
def at_work(words: Callable[[], str]) -> Iterator[None]:
    """Whatever is raised within says in a note at which work; it stays the error that it is."""
    try:
        yield
    except BaseException as error:
        note = f"while {words()}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise
