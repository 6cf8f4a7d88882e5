"""Bytes of shards, read past the page cache where the system lets us.

`Shards` holds the files open and knows a truncated or replaced one. A `Reader` fills memory from spans of them, by
O_DIRECT, in whole pages; where that is refused by buffered reads, whose pages are given back. `gather` joins spans
whose pages touch and says where in memory each begins: at its file offset modulo a page, so that it lies as in a map.

What the bytes mean is not known here, nor who waits for them.
"""

import errno
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .checkpoint import Entry
from .device import PAGE
from .errors import ModelError

CHUNK = 1 << 26
"""Bytes of one read call: far below the 2 GiB at which one call stops short, and soon done when a run is closed."""
KEPT = 4
"""Files that one reader has open past the page cache at once."""


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
        try:
            for name in names:
                self._open[name] = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise ModelError(f"{folder / name} cannot be opened: {error.strerror}") from error

    def descriptor(self, shard: str) -> int:
        return self._open[shard]

    def check(self, entries: Iterable[Entry]) -> None:
        """Raises `ModelError` if a shard no longer holds these tensors, or another file has its name."""
        sizes: dict[str, int] = {}
        for entry in entries:
            if entry.shard not in sizes:
                sizes[entry.shard] = self._size(entry.shard)
            if sizes[entry.shard] < entry.start + entry.size:
                path = self.folder / entry.shard
                raise ModelError(f"{path} was truncated while it was read: {entry.name} is cut off; download it again")

    def _size(self, shard: str) -> int:
        held, path = os.fstat(self._open[shard]), self.folder / shard
        try:
            named = os.stat(path)
        except FileNotFoundError:  # what is open stays whole
            return held.st_size
        if (named.st_dev, named.st_ino) != (held.st_dev, held.st_ino):
            raise ModelError(f"{path} was replaced while it was read: run again with the file that is there now")
        return held.st_size

    def close(self) -> None:
        """Readers stop at their next chunk; call again when they have, since descriptors are closed here."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class Reader:
    """One thread's reads. direct: past the page cache, or at least out of it again; else as the system likes."""

    def __init__(self, shards: Shards, *, direct: bool) -> None:
        self._shards, self._past = shards, direct
        self._direct: dict[str, int] = {}
        self._refused: set[str] = set()

    def read(self, extent: Span, out: Tensor) -> None:
        """Fills uint8 ``out``, which begins at a page and has room for whole pages, however short single reads are.

        Raises `ModelError` if the file ends before the extent does, and `Closed`.
        """
        room, done = out.numpy().data, 0
        descriptor = self._open_direct(extent.shard)
        direct = descriptor is not None
        buffered = self._shards.descriptor(extent.shard)
        while done < extent.size:
            if self._shards.closing.is_set():
                raise Closed
            part = room[done : min(done + CHUNK, whole_pages(extent.size))]
            try:
                got = os.preadv(
                    descriptor if direct and descriptor is not None else buffered, [part], extent.begin + done
                )
            except OSError as error:
                if direct and error.errno == errno.EINVAL:
                    self._refuse(extent.shard)
                    direct = False
                    continue
                path = self._shards.folder / extent.shard
                at = extent.begin + done
                raise ModelError(f"{path} cannot be read at byte {at}: {error.strerror or error}") from error
            if got == 0:
                path = self._shards.folder / extent.shard
                raise ModelError(f"{path} ends at byte {extent.begin + done}: it was truncated while it was read")
            if self._past and not direct:
                os.posix_fadvise(buffered, extent.begin + done, got, os.POSIX_FADV_DONTNEED)
            done += got
            direct = direct and done % PAGE == 0  # the rest of a page cannot be read past the cache

    def close(self) -> None:
        for descriptor in self._direct.values():
            os.close(descriptor)
        self._direct.clear()

    def _open_direct(self, shard: str) -> int | None:
        if not self._past or shard in self._refused:
            return None
        if shard not in self._direct:
            if len(self._direct) == KEPT:
                os.close(self._direct.pop(next(iter(self._direct))))
            try:  # the file that is held open, whatever has its name by now
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT
                self._direct[shard] = os.open(f"/proc/self/fd/{self._shards.descriptor(shard)}", flags)
            except OSError:
                self._refused.add(shard)
                return None
        return self._direct[shard]

    def _refuse(self, shard: str) -> None:
        self._refused.add(shard)
        os.close(self._direct.pop(shard))
