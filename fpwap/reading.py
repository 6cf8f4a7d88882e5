"""Bytes of shards, read past the page cache where the system lets us.

`Shards` holds the files open and knows a truncated or replaced one. A `Reader` fills memory from spans of them, by
O_DIRECT, in whole pages; where that is refused by buffered reads, whose pages are given back. `gather` joins spans
whose pages touch and says where in memory each begins: at its file offset modulo a page, so that it lies as in a map.

What the bytes mean is not known here, nor who waits for them.
"""

import contextlib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .checkpoint import Entry
from .device import PAGE
from .errors import ModelError
from .interrupt import at_work

CHUNK = 1 << 24
"""Bytes of one read call: far below the 2 GiB at which one call stops short, and soon done when a run is closed."""
READS = 2
"""Read calls under way at once: the disk is never idle between two."""


class Closed(Exception):
    """The shards were closed while this was being read; nobody waits for it."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a shard."""

    shard: str
    begin: int
    size: int

    @property
    def end(self) -> int:
        return self.begin + self.size


@dataclass(frozen=True, slots=True)
class Gathered:
    """Spans joined to extents: what is read, and where in memory.

    extents: begin at a page; each with its first byte in memory, a multiple of a page. starts: each span's first byte
    in memory. size: of that memory, whole pages.
    """

    extents: tuple[tuple[Span, int], ...]
    starts: tuple[int, ...]
    size: int


def gather(spans: Sequence[Span]) -> Gathered:
    """Sorts spans, and joins those whose pages overlap or touch."""
    extents: list[tuple[Span, int]] = []
    starts, size = [0] * len(spans), 0
    for index in sorted(range(len(spans)), key=lambda index: (spans[index].shard, spans[index].begin)):
        span = spans[index]
        begin = span.begin - span.begin % PAGE
        last, start = extents[-1] if extents else (Span("", 0, 0), 0)
        if last.shard == span.shard and begin <= whole_pages(last.end):
            extents[-1] = Span(last.shard, last.begin, max(last.end, span.end) - last.begin), start
        else:
            start = size
            extents.append((Span(span.shard, begin, span.end - begin), start))
        size = start + whole_pages(extents[-1][0].size)
        starts[index] = start + span.begin - extents[-1][0].begin
    return Gathered(tuple(extents), tuple(starts), size)


def whole_pages(size: int) -> int:
    """Bytes rounded up to pages."""
    return -(-size // PAGE) * PAGE


class Shards:
    """The open shard files of a checkpoint; may be used by several threads."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        self.closing = threading.Event()
        self._open: dict[str, int] = {}
        self._as_opened: dict[str, os.stat_result] = {}
        try:
            for name in names:
                self._open[name] = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
                self._as_opened[name] = os.fstat(self._open[name])
        except OSError as error:
            self.close()
            raise ModelError(f"{folder / name} cannot be opened: {error.strerror}") from error

    def descriptor(self, shard: str) -> int:
        return self._open[shard]

    def check(self, entries: Iterable[Entry]) -> None:
        """Raises `ModelError` if a shard lacks some of these tensors by now, is out of reach, or is not what it was."""
        found: dict[str, os.stat_result] = {}
        for entry in entries:
            if entry.shard not in found:
                found[entry.shard] = self._held(entry.shard)
            if found[entry.shard].st_size < entry.start + entry.size:
                path = self.folder / entry.shard
                raise ModelError(f"{path} was truncated while it was read: {entry.name} is cut off; download it again")
        self._unwritten(found)

    def check_all(self) -> None:
        """The same of whole shards."""
        self._unwritten({shard: self._held(shard) for shard in self._open})

    def _unwritten(self, found: Mapping[str, os.stat_result]) -> None:
        for shard, held in found.items():
            path, before = self.folder / shard, self._as_opened[shard]
            if held.st_size < before.st_size:
                raise ModelError(f"{path} was truncated while it was read: download it again")
            if held.st_mtime_ns != before.st_mtime_ns:
                raise ModelError(f"{path} was written to while it was read: run again with what is in it now")

    def _held(self, shard: str) -> os.stat_result:
        path = self.folder / shard
        try:
            held = os.fstat(self._open[shard])
            try:
                named = os.stat(path)
            except FileNotFoundError:  # what is open stays whole
                return held
        except OSError as error:
            raise ModelError(
                f"{path} can no longer be looked at: {error.strerror or error}; run again when it is back"
            ) from error
        if (named.st_dev, named.st_ino) != (held.st_dev, held.st_ino):
            raise ModelError(f"{path} was replaced while it was read: run again with the file that is there now")
        return held

    def close(self) -> None:
        """Closes the files: nobody is to read any more. One who does stops when `closing` is set, and is waited for."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class Reading:
    """Reads under way."""

    def __init__(self, parts: Sequence[Future[None]]) -> None:
        self._parts = parts

    def wait(self) -> None:
        """Until nothing more is written. Raises `ModelError` if a file could not be read, and `Closed`."""
        for part in self._parts:
            with contextlib.suppress(CancelledError):  # which `concurrent.futures.wait` would wait for
                part.exception()
        try:
            for part in self._parts:
                part.result()
        except CancelledError:
            raise Closed from None


class Reader:
    """One thread's reads, two at a time. direct: past the page cache, or at least out of it again; else through it."""

    def __init__(self, shards: Shards, *, direct: bool) -> None:
        self._shards, self._past = shards, direct
        self._pool = ThreadPoolExecutor(READS, thread_name_prefix="fpwap-reads")
        self._refused: set[str] = set()
        self._in_order = threading.Lock()

    def begin(self, extents: Sequence[tuple[Span, int]], memory: Tensor) -> Reading:
        """Reads extents to their places in uint8 ``memory``, which begins at a page and has room for whole pages.

        Memory into which nothing is read may lie anywhere; else it is RAM.
        """
        parts: list[Future[None]] = []
        room = memory.numpy().data if extents else memoryview(b"")
        for extent, start in extents:
            for first in range(0, extent.size, CHUNK):
                part = Span(extent.shard, extent.begin + first, min(CHUNK, extent.size - first))
                own = room[start + first : start + first + whole_pages(part.size)]
                parts.append(self._pool.submit(self._read, part, own))
        return Reading(parts)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, part: Span, room: memoryview) -> None:
        with at_work(lambda: f"{self._shards.folder / part.shard} was read from byte {part.begin} on"):
            done = 0 if not self._past or part.shard in self._refused else self._direct(part, room)
            if done < part.size:
                with self._in_order:  # the system reads ahead for one who reads in a row
                    self._buffered(part, room, done)

    def _direct(self, part: Span, room: memoryview) -> int:
        """Bytes read past the page cache: fewer than all where a read stopped within a page, or is refused."""
        done = 0
        try:  # the file that is held open, whatever has its name by now
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT
            descriptor = os.open(f"/proc/self/fd/{self._shards.descriptor(part.shard)}", flags)
            try:
                while done < part.size and done % PAGE == 0:
                    done += self._some(descriptor, part, room, done)
            finally:
                os.close(descriptor)
        except OSError:  # buffered reads have the last word
            self._refused.add(part.shard)
        return done

    def _buffered(self, part: Span, room: memoryview, done: int) -> None:
        descriptor = self._shards.descriptor(part.shard)
        while done < part.size:
            try:
                got = self._some(descriptor, part, room, done)
            except OSError as error:
                path = self._shards.folder / part.shard
                raise ModelError(f"{path} cannot be read at byte {part.begin + done}: {error.strerror}") from error
            if self._past:
                os.posix_fadvise(descriptor, part.begin + done, got, os.POSIX_FADV_DONTNEED)
            done += got

    def _some(self, descriptor: int, part: Span, room: memoryview, done: int) -> int:
        """Bytes of one read, however short."""
        if self._shards.closing.is_set():
            raise Closed
        got = os.preadv(descriptor, [room[done:]], part.begin + done)
        if got == 0:
            path = self._shards.folder / part.shard
            raise ModelError(f"{path} ends at byte {part.begin + done}: it was truncated while it was read")
        return got
