"""The way of outputs out of the maths: on the CPU at once, from an accelerator beside it.

There `put` leaves a copy behind and returns; the copy travels on a stream of its own into a ring of pinned memory, and
a thread hands it on when it is there. `write` is called by one thread at a time, in the order of the `put`s.

The module does not know where outputs go, nor who made them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .device import Device, Event
from .interrupt import Check, at_work, patiently
from .store import Record

RING = 1 << 26
"""Bytes of outputs that are on their way from a device at once: pinned, and as much there."""
ALIGNED = 64
"""Bytes: where a value begins in the ring."""


class Outbox:
    """Hands ``values [b, ...]`` of ``sample_ids [b]`` to ``write``, on the CPU and in the record's dtype.

    ring_bytes: of pinned memory, and of copies on the device, that are under way at most. What ``write`` raises comes
    out of the next `put` or `flush`, and of every one after it. check: raises if the run is to stop, in waits.
    """

    def __init__(
        self,
        write: Callable[[Record, Tensor, Tensor], None],
        device: Device,
        *,
        ring_bytes: int,
        check: Check = lambda: None,
    ) -> None:
        self._write, self._device, self._room, self._check = write, device, ring_bytes, check
        self._ring: Tensor | None = None
        self._out = device.stream()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fpwap-outbox")
        self._under_way: deque[tuple[range, Future[None]]] = deque()

    def put(self, record: Record, values: Tensor, sample_ids: Tensor) -> None:
        """Take some prompts' values; the caller may reuse them at once. Waits only where the ring is full."""
        if not self._device.asynchronous:
            self._write(record, values.detach().to(record.dtype).cpu(), sample_ids)
            return
        self._forget()
        size = values.numel() * record.dtype.itemsize
        if size > self._room or values.device != self._device.torch:
            self.flush()  # one thread writes at a time
            self._write(record, values.detach().to(record.dtype).cpu(), sample_ids)
            return
        place = self._place(max(1, size))
        ours = torch.empty_like(values, dtype=record.dtype, memory_format=torch.contiguous_format)
        ours.copy_(values.detach())
        host = self._memory()[place.start : place.start + size].view(record.dtype).view(values.shape)
        self._out.wait(self._device.compute.record(ours))
        self._out.copy(host, ours)
        there = self._out.record(host, ours)
        job = self._thread.submit(self._hand_on, record, host, sample_ids, there, ours)
        self._under_way.append((place, job))

    def flush(self) -> None:
        """Everything that was put has been written when this returns."""
        while self._under_way:
            self._next()

    def close(self) -> None:
        """Ends the thread; what was put and not flushed may be lost. May be called twice, and after a failure."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._out.record().synchronize()
        self._under_way.clear()
        self._ring = None

    def _hand_on(self, record: Record, host: Tensor, sample_ids: Tensor, there: Event, ours: Tensor) -> None:
        """On the thread. ours: kept until the copy of it is there."""
        with at_work(lambda: f"an output was taken off the device: {record}"):
            there.synchronize()
            self._write(record, host, sample_ids)

    def _memory(self) -> Tensor:
        if self._ring is None:
            self._ring = self._device.pinned(self._room)
        return self._ring

    def _place(self, size: int) -> range:
        """Room in the ring; waits for the eldest until there is some."""
        taken = [place for place, _ in self._under_way]
        while (place := free(taken, size, self._room)) is None:
            self._next()
            del taken[0]
        return place

    def _forget(self) -> None:
        """What was written without anybody's waiting for it gives back its room; a failure is raised."""
        while self._under_way and self._under_way[0][1].done():
            self._next()

    def _next(self) -> None:
        patiently(self._under_way[0][1], self._check)
        self._under_way.popleft()


def free(taken: Sequence[range], size: int, room: int) -> range | None:
    """Where ``size`` bytes, one or more, fit behind the newest of ``taken``, eldest first, in a ring of ``room`` bytes.

    Not where it would go round the end: it begins at 0 then, if there is room before the eldest.
    """
    if not taken:
        return range(size)
    begin, end = taken[0].start, -(-taken[-1].stop // ALIGNED) * ALIGNED
    if taken[-1].start < begin:  # the newest one has gone round
        return range(end, end + size) if end + size <= begin else None
    if end + size <= room:
        return range(end, end + size)
    return range(size) if size <= begin else None
