"""The device that a sweep computes on, as its parts see it: memory, streams and events.

What is enqueued on one stream happens in order; two streams know nothing of each other but what `Stream.wait` says. The
maths runs on ``compute``; weights, residual rows and outputs travel on streams of their own, beside it. On the CPU all
of it happens at once and the words cost nothing, so that there is one path through the parts and no ladder of devices.

The module does not know what travels, nor why.
"""

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import RequestError

PAGE = mmap.PAGESIZE


class Event(Protocol):
    """A moment on a stream."""

    def synchronize(self) -> None:
        """The caller waits until it has come."""
        ...

    def seconds_since(self, earlier: "Event") -> float:
        """Between two moments that both have come."""
        ...


class Stream(Protocol):
    """A queue of work on the device. May be used by one thread at a time."""

    def copy(self, out: Tensor, source: Tensor) -> None:
        """Enqueue ``out.copy_(source)``; neither may be touched elsewhere until an event behind it has come."""
        ...

    def record(self, *used: Tensor) -> Event:
        """The moment at which all that was enqueued so far is done. used: memory that this work reads or writes."""
        ...

    def wait(self, event: Event) -> None:
        """What is enqueued from here on begins after ``event``; the caller goes on at once."""
        ...


class Device(Protocol):
    """``compute``: the stream that torch's operations run on. asynchronous: whether work outlives the call."""

    torch: torch.device
    compute: Stream
    asynchronous: bool

    def stream(self) -> Stream:
        """A new stream."""
        ...

    def memory(self, size: int) -> Tensor:
        """uint8 ``[size]`` on the device, beginning at a multiple of a page; not initialised."""
        ...

    def pinned(self, size: int) -> Tensor:
        """uint8 ``[size]`` in RAM from which the device can copy by itself, beginning at a page; not initialised."""
        ...


def pages(size: int) -> Tensor:
    """uint8 ``[size]`` in RAM, beginning at a page; takes memory as it is touched. Raises `RequestError`."""
    try:  # a shared map has small pages
        room = mmap.mmap(-1, max(PAGE, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RequestError(
            f"{size:,} bytes of memory cannot be had: {error.strerror or error}; "
            "give a smaller memory=, or leave it more (other programs, ulimit -v)"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= 1 << 24:
        with contextlib.suppress(OSError):  # a kernel without large pages
            room.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(room, dtype=np.uint8, count=size))


class _Now:
    """The stream, and every event, of a device that does everything at once."""

    def copy(self, out: Tensor, source: Tensor) -> None:
        out.copy_(source)

    def record(self, *used: Tensor) -> Event:
        return self

    def wait(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def seconds_since(self, earlier: Event) -> float:
        return 0.0


class Cpu:
    """The CPU: nothing is later than its call."""

    torch = torch.device("cpu")
    asynchronous = False

    def __init__(self) -> None:
        self.compute: Stream = _Now()

    def stream(self) -> Stream:
        return _Now()

    def memory(self, size: int) -> Tensor:
        return pages(size)

    def pinned(self, size: int) -> Tensor:
        return pages(size)


class _Moment:
    def __init__(self, device: torch.device, stream: torch.Stream) -> None:
        self._event = torch.Event(device, enable_timing=True)
        self._event.record(stream)

    def synchronize(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _Moment)
        return earlier._event.elapsed_time(self._event) / 1000


class _Queue:
    """One stream of an accelerator."""

    def __init__(self, device: torch.device, stream: torch.Stream) -> None:
        self._device, self._stream = device, stream

    def copy(self, out: Tensor, source: Tensor) -> None:
        with self._stream:
            out.copy_(source, non_blocking=True)

    def record(self, *used: Tensor) -> Event:
        return _Moment(self._device, self._stream)

    def wait(self, event: Event) -> None:
        assert isinstance(event, _Moment)
        self._stream.wait_event(event._event)


class Accelerator:
    """Whatever `torch.accelerator` finds."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        index = torch.accelerator.current_device_index() if device.index is None else device.index
        self.torch = torch.device(device.type, index)
        self.compute: Stream = _Queue(self.torch, torch.accelerator.current_stream(self.torch))

    def stream(self) -> Stream:
        return _Queue(self.torch, torch.Stream(self.torch))

    def memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.torch)

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def open_device(device: torch.device) -> Device:
    """The device of this name; the CPU is one too."""
    return Cpu() if device.type == "cpu" else Accelerator(device)


class Room:
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
