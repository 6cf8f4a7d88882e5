"""The residual stream of every token between two layer groups: on the device, in RAM, or in two files on disk.

`read` and `write` take slices of the rows, counted from the wave's first; `fetch` says what is read next, so that it
can come meanwhile. `turn` ends a group: what it wrote is what the next one reads. On disk one file is read while the
other is written, so that a group never overwrites what it was made from. The store can hold several named per-token
tensors; today there is one, "residual".

What travels beside the maths goes through two buffers each way, of the largest slice seen, however many rows there
are. The module does not know layers, prompts or why a row is where it is.
"""

import contextlib
import errno
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from .device import Device, Event
from .errors import StoreError, reported

Tier = Literal["device", "ram", "disk"]
DEPTH = 2
"""Buffers each way: one that is filled while the other is emptied."""
T = TypeVar("T")


class Residual(Protocol):
    """``[rows, width]`` of each named tensor, in the model's dtype. In a group, rows are read before they are written.

    Failures of a thread come out of the next call.
    """

    def fetch(self, rows: slice) -> None:
        """Bring these rows of every tensor nearer: they are read next. A hint; of more than two the eldest is lost."""
        ...

    def read(self, rows: slice, out: Tensor, name: str = "residual") -> None:
        """Fill ``out [rows, width]`` with what the group before wrote; on an accelerator ``compute`` does."""
        ...

    def write(self, rows: slice, values: Tensor, name: str = "residual") -> None:
        """Keep ``values [rows, width]``; the caller may reuse them at once."""
        ...

    def turn(self) -> None:
        """All rows of a group are written: the next group reads them."""
        ...

    def close(self) -> None:
        """Nothing is kept, no thread, descriptor or file is left. May be called twice, and after a failure."""
        ...


class InMemory:
    """Where the maths itself reaches. One tensor: a visit reads its rows before it writes them."""

    def __init__(self, rows: int, widths: Mapping[str, int], dtype: torch.dtype, device: Device) -> None:
        self._tensors = {name: _table(device.memory, rows, width, dtype) for name, width in widths.items()}

    def fetch(self, rows: slice) -> None:
        pass

    def read(self, rows: slice, out: Tensor, name: str = "residual") -> None:
        out.copy_(self._tensors[name][rows])

    def write(self, rows: slice, values: Tensor, name: str = "residual") -> None:
        self._tensors[name][rows].copy_(values)

    def turn(self) -> None:
        pass

    def close(self) -> None:
        self._tensors.clear()


class Pinned:
    """In RAM, beside an accelerator: one tensor, one copy stream each way. The calling thread never waits.

    The order of one row's copies needs no further wait: it is written from what was computed from what was read.
    """

    def __init__(self, rows: int, widths: Mapping[str, int], dtype: torch.dtype, device: Device) -> None:
        self._tensors = {name: _table(device.pinned, rows, width, dtype) for name, width in widths.items()}
        self._compute, self._bring, self._keep = device.compute, device.stream(), device.stream()
        self._landing: dict[str, _Landing[Event]] = {name: _Landing(device) for name in widths}
        self._leaving = {name: _Ring(device) for name in widths}

    def fetch(self, rows: slice) -> None:
        for name, landing in self._landing.items():
            if not landing.holds(rows):
                self._start(rows, name)

    def _start(self, rows: slice, name: str) -> None:
        source = self._tensors[name][rows]
        berth = self._landing[name].vacant()
        buffer = berth.take(source.shape, source.dtype)
        self._bring.wait(berth.free)
        self._bring.copy(buffer, source)
        berth.free = self._bring.record(buffer)
        self._landing[name].started(rows, berth, buffer, berth.free)

    def read(self, rows: slice, out: Tensor, name: str = "residual") -> None:
        if not self._landing[name].holds(rows):
            self._start(rows, name)
        berth, buffer, come = self._landing[name].arrived(rows)
        self._compute.wait(come)
        out.copy_(buffer)
        berth.free = self._compute.record(buffer)

    def write(self, rows: slice, values: Tensor, name: str = "residual") -> None:
        berth = self._leaving[name].next()
        buffer = berth.take(values.shape, self._tensors[name].dtype)
        self._compute.wait(berth.free)
        buffer.copy_(values)
        self._keep.wait(self._compute.record(buffer))
        self._keep.copy(self._tensors[name][rows], buffer)
        berth.free = self._keep.record(buffer)

    def turn(self) -> None:
        for landing in self._landing.values():
            landing.lose()
        self._bring.wait(self._keep.record())

    def close(self) -> None:
        for stream in (self._bring, self._keep):
            stream.record().synchronize()
        for held in (self._tensors, self._landing, self._leaving):
            held.clear()


class OnDisk:
    """Two files per tensor under ``folder``, removed by `close`; one thread reads ahead, another writes behind.

    On an accelerator the threads also carry rows between their pinned buffer and the device.
    """

    def __init__(self, rows: int, widths: Mapping[str, int], dtype: torch.dtype, device: Device, folder: Path) -> None:
        self._folder, self._dtype, self._widths = folder, dtype, dict(widths)
        self._needed = 2 * sum(rows * width for width in widths.values()) * dtype.itemsize
        self._compute, self._bring, self._keep = device.compute, device.stream(), device.stream()
        near = not device.asynchronous  # the maths reaches what the threads read and write
        self._arriving, self._departing = (None if near else _Room(device.pinned) for _ in range(2))
        self._landing: dict[str, _Landing[Future[None]]] = {name: _Landing(device) for name in widths}
        self._leaving = {name: _Ring(device) for name in widths}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fpwap-residual-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="fpwap-residual-write")
        self._writes: deque[Future[None]] = deque()
        self._reading = 0
        self._files: dict[tuple[str, int], int] = {}
        try:
            with self._reported(folder):
                folder.mkdir(parents=True, exist_ok=True)
                for name, width in widths.items():
                    for side in (0, 1):
                        self._make(name, side, rows * width * dtype.itemsize)
        except StoreError:
            self.close()
            raise

    def _make(self, name: str, side: int, size: int) -> None:
        path = self._path(name, side)
        with self._reported(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            self._files[name, side] = fd
            try:
                os.posix_fallocate(fd, 0, max(1, size))
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                os.ftruncate(fd, size)  # space is then found missing when a row comes

    def fetch(self, rows: slice) -> None:
        self._settle(DEPTH)
        for name, landing in self._landing.items():
            if not landing.holds(rows):
                self._start(rows, name)

    def _start(self, rows: slice, name: str) -> None:
        berth = self._landing[name].vacant()
        buffer = berth.take((rows.stop - rows.start, self._widths[name]), self._dtype)
        job = self._reader.submit(self._arrive, name, self._reading, rows, buffer, berth.free)
        self._landing[name].started(rows, berth, buffer, job)

    def read(self, rows: slice, out: Tensor, name: str = "residual") -> None:
        self._settle(DEPTH)
        if not self._landing[name].holds(rows):
            self._start(rows, name)
        berth, buffer, job = self._landing[name].arrived(rows)
        job.result()
        out.copy_(buffer)
        berth.free = self._compute.record(buffer)

    def write(self, rows: slice, values: Tensor, name: str = "residual") -> None:
        self._settle(DEPTH - 1)
        berth = self._leaving[name].next()
        buffer = berth.take(values.shape, self._dtype)
        buffer.copy_(values)
        made = self._compute.record(buffer)
        self._writes.append(self._writer.submit(self._depart, name, 1 - self._reading, rows, buffer, made))

    def turn(self) -> None:
        self._settle(0)
        for landing in self._landing.values():
            landing.lose()
        self._reading = 1 - self._reading

    def _settle(self, most: int) -> None:
        """Wait until at most so many writes are under way. A failed one stays: from then on every call raises."""
        while self._writes and (len(self._writes) > most or self._writes[0].done()):
            self._writes[0].result()
            self._writes.popleft()

    def close(self) -> None:
        for pool in (self._reader, self._writer):
            pool.shutdown(wait=True, cancel_futures=True)
        for (name, side), fd in self._files.items():
            os.close(fd)
            self._path(name, side).unlink(missing_ok=True)
        for held in (self._files, self._landing, self._leaving, self._writes):
            held.clear()
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    # --- on the threads ---

    def _arrive(self, name: str, side: int, rows: slice, buffer: Tensor, free: Event) -> None:
        """Rows of a file into ``buffer``, which has been read when ``free`` has come."""
        if self._arriving is None:
            self._read_file(name, side, rows, buffer)
            return
        host = self._arriving.take(buffer.shape, self._dtype)
        self._read_file(name, side, rows, host)
        self._bring.wait(free)
        self._bring.copy(buffer, host)
        self._bring.record(buffer, host).synchronize()

    def _depart(self, name: str, side: int, rows: slice, buffer: Tensor, made: Event) -> None:
        """``buffer`` into a file; what is in it has been computed when ``made`` has come."""
        if self._departing is None:
            self._write_file(name, side, rows, buffer)
            return
        host = self._departing.take(buffer.shape, self._dtype)
        self._keep.wait(made)
        self._keep.copy(host, buffer)
        self._keep.record(host, buffer).synchronize()
        self._write_file(name, side, rows, host)

    def _read_file(self, name: str, side: int, rows: slice, host: Tensor) -> None:
        view, at = _bytes(host), rows.start * self._widths[name] * self._dtype.itemsize
        begin = at
        with self._reported(self._path(name, side)):
            while view:
                got = os.preadv(self._files[name, side], [view], at)
                if got == 0:
                    raise StoreError(
                        f"{self._path(name, side)} ends before row {rows.stop}: it was truncated; run again"
                    )
                view, at = view[got:], at + got
            os.posix_fadvise(self._files[name, side], begin, at - begin, os.POSIX_FADV_DONTNEED)

    def _write_file(self, name: str, side: int, rows: slice, host: Tensor) -> None:
        view, at = _bytes(host), rows.start * self._widths[name] * self._dtype.itemsize
        with self._reported(self._path(name, side)):
            while view:
                done = os.pwrite(self._files[name, side], view, at)
                view, at = view[done:], at + done

    def _path(self, name: str, side: int) -> Path:
        return self._folder / f"{name}.{'ab'[side]}"

    def _reported(self, path: Path) -> AbstractContextManager[None]:
        return reported(path, self._needed, "the residual stream's file ")


def open_residual(
    tier: Tier, rows: int, widths: Mapping[str, int], dtype: torch.dtype, device: Device, folder: Path
) -> Residual:
    """The store of a tier for ``rows`` rows; ``folder`` is used by "disk" only and belongs to the store alone."""
    if tier == "disk":
        return OnDisk(rows, widths, dtype, device, folder)
    if tier == "ram" and device.asynchronous:
        return Pinned(rows, widths, dtype, device)
    return InMemory(rows, widths, dtype, device)


# --- buffers --------------------------------------------------------------------------------------------------------


def _table(make: Callable[[int], Tensor], rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return _Room(make).take((rows, width), dtype)


def _bytes(host: Tensor) -> memoryview:
    return host.view(torch.uint8).numpy().data.cast("B")


class _Room:
    """Memory that one slice after the other is put into; it grows to the largest."""

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        self._make, self._memory = make, make(0)

    def fits(self, size: int) -> bool:
        return len(self._memory) >= size

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape, full of whatever was left there."""
        size = math.prod(shape) * dtype.itemsize
        if not self.fits(size):
            self._memory = self._make(0)  # the smaller one goes before the larger one comes
            self._memory = self._make(size)
        return self._memory[:size].view(dtype).view(*shape)


class _Berth(_Room):
    """Room on the device. free: the moment at which the last that used it, on whichever stream, is done with it."""

    def __init__(self, device: Device) -> None:
        super().__init__(device.memory)
        self._compute = device.compute
        self.free = device.compute.record()

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.fits(math.prod(shape) * dtype.itemsize):
            return super().take(shape, dtype)
        self.free.synchronize()
        room = super().take(shape, dtype)
        self.free = self._compute.record(room)  # the allocator gives memory that earlier maths may yet be reading
        return room


class _Ring:
    """The buffers of one way, in turn."""

    def __init__(self, device: Device) -> None:
        self._berths = [_Berth(device) for _ in range(DEPTH)]

    def next(self) -> _Berth:
        self._berths.append(self._berths.pop(0))
        return self._berths[-1]


class _Landing(Generic[T]):
    """The buffers of the way in. Of each slice that was started and not yet read: its buffer, and when it is there."""

    def __init__(self, device: Device) -> None:
        self._vacant = [_Berth(device) for _ in range(DEPTH)]
        self._coming: dict[tuple[int, int], tuple[_Berth, Tensor, T]] = {}

    def holds(self, rows: slice) -> bool:
        return (rows.start, rows.stop) in self._coming

    def vacant(self) -> _Berth:
        """A buffer for the next slice; the eldest that nobody came for is lost if there is no other."""
        if not self._vacant:
            self._lose(next(iter(self._coming)))
        return self._vacant.pop(0)

    def started(self, rows: slice, berth: _Berth, buffer: Tensor, come: T) -> None:
        self._coming[rows.start, rows.stop] = berth, buffer, come

    def arrived(self, rows: slice) -> tuple[_Berth, Tensor, T]:
        """What was started for these rows; its buffer is the next one's as soon as it is read."""
        berth, buffer, come = self._coming.pop((rows.start, rows.stop))
        self._vacant.append(berth)
        return berth, buffer, come

    def lose(self) -> None:
        """What nobody came for was of an earlier group."""
        for rows in list(self._coming):
            self._lose(rows)

    def _lose(self, rows: tuple[int, int]) -> None:
        self._vacant.append(self._coming.pop(rows)[0])
