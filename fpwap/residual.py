"""The residual stream of every token between two layer groups: on the device, in RAM, or in two files on disk.

`read` and `write` take slices of the rows, counted from the wave's first; `fetch` says what is read next, so that it
can come meanwhile. `turn` ends a group: what it wrote is what the next one reads. On disk one file is read while the
other is written, so that a group never overwrites what it was made from. The store can hold several named per-token
tensors; today there is one, "residual".

`save` is for a run that goes on later. On disk the files themselves are kept: `hold` keeps a group from writing over
the one before as long as nobody can go on from behind it. Memory is copied to two files by turns, by a thread while the
maths goes on; a row that is written meanwhile waits until it has been copied. `restore` takes up what was saved. Blocks
of rows are hashed as they are written, and compared when they are read back.

What travels beside the maths goes through two buffers each way, of the largest slice seen, however many rows there
are. The module does not know layers, prompts or why a row is where it is.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from xxhash import xxh3_128_digest

from .device import Device, Event, Room, Stream
from .errors import StoreError, reported
from .files import File, bytes_of, sync_folder
from .interrupt import Check, patiently
from .slots import WHAT, Blocks, Copies, Saved, Slot, path_of, read_back

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

    def save(self, first: int) -> Callable[[], tuple[Saved, float]]:
        """The rows as they are now, for a run that goes on from here; first: the row that will be written next.

        To be called where nothing of an earlier one is under way. What it returns is called once, by any thread: it
        waits until all of it is on the disk; the number is of seconds that a thread was busy with it.
        """
        ...

    def hold(self, durable: Future[None]) -> None:
        """What is saved may be gone on with when ``durable`` has come: what came before is not written over until then.

        Called behind `turn`.
        """
        ...

    def restore(self, saved: Saved) -> None:
        """Before anything else: the rows as `save` found them. Raises `StoreError` where a file is not what it was."""
        ...

    def give_up(self) -> None:
        """What `save` began and has not ended will not end well: nobody waits for it any more."""
        ...

    def close(self) -> None:
        """No thread or descriptor is left, and no file that was not saved. May be called twice, and after a failure."""
        ...


class _Copied:
    """What lies in memory is saved by copies. keeps: the stream on which rows are written."""

    def __init__(
        self, tensors: dict[str, Tensor], keeps: Stream, device: Device, folder: Path, check: Check, *, near: bool
    ) -> None:
        self._tensors, self._keep = tensors, keeps
        self._copies = Copies(tensors, device, folder, check, near=near)

    def save(self, first: int) -> Callable[[], tuple[Saved, float]]:
        return self._copies.begin(first, self._keep.record())

    def hold(self, durable: Future[None]) -> None:
        pass

    def restore(self, saved: Saved) -> None:
        self._copies.restore(saved)

    def give_up(self) -> None:
        self._copies.give_up()

    def close(self) -> None:
        self._copies.close()
        self._tensors.clear()


class InMemory(_Copied):
    """Where the maths itself reaches. One tensor: a visit reads its rows before it writes them."""

    def __init__(
        self, rows: int, widths: Mapping[str, int], dtype: torch.dtype, device: Device, folder: Path, check: Check
    ) -> None:
        tensors = {name: _table(device.memory, rows, width, dtype) for name, width in widths.items()}
        super().__init__(tensors, device.compute, device, folder, check, near=not device.asynchronous)

    def fetch(self, rows: slice) -> None:
        pass

    def read(self, rows: slice, out: Tensor, name: str = "residual") -> None:
        out.copy_(self._tensors[name][rows])

    def write(self, rows: slice, values: Tensor, name: str = "residual") -> None:
        self._copies.before(rows)
        self._tensors[name][rows].copy_(values)

    def turn(self) -> None:
        pass


class Pinned(_Copied):
    """In RAM, beside an accelerator: one tensor, one copy stream each way. The calling thread never waits.

    The order of one row's copies needs no further wait: it is written from what was computed from what was read.
    """

    def __init__(
        self, rows: int, widths: Mapping[str, int], dtype: torch.dtype, device: Device, folder: Path, check: Check
    ) -> None:
        tensors = {name: _table(device.pinned, rows, width, dtype) for name, width in widths.items()}
        super().__init__(tensors, device.stream(), device, folder, check, near=True)
        self._compute, self._bring = device.compute, device.stream()
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
        self._copies.before(rows)
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
        super().close()
        for held in (self._landing, self._leaving):
            held.clear()


class OnDisk:
    """Two files per tensor under ``folder``; one thread reads ahead, another writes behind.

    On an accelerator the threads also carry rows between their pinned buffer and the device.
    """

    def __init__(
        self, rows: int, widths: Mapping[str, int], dtype: torch.dtype, device: Device, folder: Path, check: Check
    ) -> None:
        self._folder, self._dtype, self._widths = folder, dtype, dict(widths)
        self._check = check
        self._compute, self._bring, self._keep = device.compute, device.stream(), device.stream()
        near = not device.asynchronous  # the maths reaches what the threads read and write
        self._arriving, self._departing = (None if near else Room(device.pinned) for _ in range(2))
        self._landing: dict[str, _Landing[Future[None]]] = {name: _Landing(device) for name in widths}
        self._leaving = {name: _Ring(device) for name in widths}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fpwap-residual-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="fpwap-residual-write")
        self._writes: deque[Future[None]] = deque()
        self._reading, self._saved = 0, False
        self._held: Future[None] | None = None
        self._files: dict[tuple[str, int], File] = {}
        self._blocks: dict[tuple[str, int], Blocks] = {(name, side): {} for name in widths for side in (0, 1)}

        try:
            with reported(folder, 2 * rows * sum(widths.values()) * dtype.itemsize, WHAT):
                folder.mkdir(parents=True, exist_ok=True)
            for name, side in self._blocks:
                path, size = path_of(folder, name, side), rows * widths[name] * dtype.itemsize
                self._saved |= path.exists()
                self._files[name, side] = File.kept(path, size, WHAT)
                self._files[name, side].reserve()
        except StoreError:
            self.close()
            raise

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
        patiently(job, self._check)
        out.copy_(buffer)
        berth.free = self._compute.record(buffer)

    def write(self, rows: slice, values: Tensor, name: str = "residual") -> None:
        if self._held is not None:
            patiently(self._held, self._check)
            self._held = None
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
        for name in self._widths:
            self._blocks[name, 1 - self._reading] = {}

    def save(self, first: int) -> Callable[[], tuple[Saved, float]]:
        self._settle(0)
        reading = self._reading
        files = [
            (Slot(self._files[name, side], name, side), dict(blocks))
            for (name, side), blocks in self._blocks.items()
            if blocks
        ]

        def finish() -> tuple[Saved, float]:
            for slot, _ in files:
                slot.file.sync()
            sync_folder(self._folder)
            self._saved = True
            return {"reading": reading, "files": [slot.words(blocks) for slot, blocks in files]}, 0.0

        return finish

    def hold(self, durable: Future[None]) -> None:
        self._held = durable

    def restore(self, saved: Saved) -> None:
        self._saved, self._reading = True, saved["reading"]
        for words in saved["files"]:
            name, side = words["tensor"], words["side"]
            file, row = self._files[name, side], self._widths[name] * self._dtype.itemsize
            found = read_back(file, words, row, self._check)
            self._blocks[name, side] = {rows.start: (rows.stop, digest) for rows, _, digest in found}

    def give_up(self) -> None:
        pass

    def _settle(self, most: int) -> None:
        """Wait until at most so many writes are under way. A failed one stays: from then on every call raises."""
        while self._writes and (len(self._writes) > most or self._writes[0].done()):
            patiently(self._writes[0], self._check)
            self._writes.popleft()

    def close(self) -> None:
        for pool in (self._reader, self._writer):
            pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.close()
            if not self._saved:
                file.path.unlink(missing_ok=True)
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
        file, view, at = self._files[name, side], bytes_of(host), rows.start * self._row(name)
        file.read(view, at)
        file.forget(at, view.nbytes)

    def _write_file(self, name: str, side: int, rows: slice, host: Tensor) -> None:
        view = bytes_of(host)
        self._files[name, side].write(view, rows.start * self._row(name))
        self._blocks[name, side][rows.start] = rows.stop, xxh3_128_digest(view)

    def _row(self, name: str) -> int:
        return self._widths[name] * self._dtype.itemsize


def open_residual(
    tier: Tier,
    rows: int,
    widths: Mapping[str, int],
    dtype: torch.dtype,
    device: Device,
    folder: Path,
    check: Check = lambda: None,
) -> Residual:
    """The store of a tier for ``rows`` rows. folder: for its files. check: raises if the run is to stop, in waits."""
    if tier == "disk":
        return OnDisk(rows, widths, dtype, device, folder, check)
    if tier == "ram" and device.asynchronous:
        return Pinned(rows, widths, dtype, device, folder, check)
    return InMemory(rows, widths, dtype, device, folder, check)


# --- buffers --------------------------------------------------------------------------------------------------------


def _table(make: Callable[[int], Tensor], rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return Room(make).take((rows, width), dtype)


class _Berth(Room):
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
