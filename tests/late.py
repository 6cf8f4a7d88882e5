"""A device for tests: its streams run late, and out of order between each other, as far as waits allow.

Copies are queued and run at odd moments (seeded), or when somebody needs them: `synchronize`, or a wait of the maths.
The maths itself is what the calling thread does at once, so it sees old values where a wait for a copy is missing. What
it leaves behind by ``compute.record(tensor, ...)`` counts as under way until that entry's turn comes, late too: a copy
that touches such a tensor before is a `Race`. Fresh memory is full of a pattern that is NaN in every dtype.

    for seed in range(20):
        device = Late(seed)
        ...                 # the part under test
        device.finish()     # whatever is still queued runs now
"""

import random
from collections import deque
from collections.abc import Callable
from threading import RLock

import torch
from torch import Tensor

from fpwap.device import Event, Stream, pages


class Race(AssertionError):
    """Memory was touched by a copy while the maths was still using it."""


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _overlap(one: Tensor, other: Tensor) -> bool:
    (a, b), (c, d) = _span(one), _span(other)
    return a < d and c < b


class LateEvent:
    def __init__(self, stream: "LateStream") -> None:
        self.stream, self.come = stream, False

    def synchronize(self) -> None:
        self.stream.device.force(self)

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, LateEvent)
        assert earlier.come and self.come
        return 0.0


class LateStream:
    """Entries are functions that return False where they cannot run yet."""

    def __init__(self, device: "Late") -> None:
        self.device = device
        self.entries: deque[Callable[[], bool]] = deque()

    def copy(self, out: Tensor, source: Tensor) -> None:
        self._put(lambda: self.device.copied(out, source))

    def record(self, *used: Tensor) -> Event:
        event = LateEvent(self)

        def come() -> bool:
            event.come = True
            return True

        self._put(come)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, LateEvent)
        self._put(lambda: event.come)

    def _put(self, entry: Callable[[], bool]) -> None:
        with self.device.lock:
            self.entries.append(entry)
            self.device.drift()


class Maths(LateStream):
    """The stream on which the calling thread computes, at once."""

    def copy(self, out: Tensor, source: Tensor) -> None:
        out.copy_(source)

    def record(self, *used: Tensor) -> Event:
        with self.device.lock:
            self.device.busy += used

            def done() -> bool:
                for tensor in used:
                    place = next(at for at, other in enumerate(self.device.busy) if other is tensor)
                    del self.device.busy[place]
                return True

            self.entries.append(done)
            return super().record()

    def wait(self, event: Event) -> None:
        assert isinstance(event, LateEvent)
        self.device.force(event)


class Late:
    """`fpwap.device.Device` in RAM. eager: how likely an entry runs by itself at each call."""

    torch = torch.device("cpu")
    asynchronous = True

    def __init__(self, seed: int, eager: float | None = None) -> None:
        self._random = random.Random(seed)
        self._eager = self._random.choice((0.0, 0.1, 0.5, 0.9)) if eager is None else eager
        self.lock = RLock()
        self.busy: list[Tensor] = []
        self._maths = Maths(self)
        self.compute: Stream = self._maths
        self._streams: list[LateStream] = [self._maths]

    def stream(self) -> Stream:
        with self.lock:
            self._streams.append(LateStream(self))
            return self._streams[-1]

    def memory(self, size: int) -> Tensor:
        return pages(size).fill_(0xFF)

    def pinned(self, size: int) -> Tensor:
        return pages(size).fill_(0xFF)

    # --- how entries get their turn ---

    def copied(self, out: Tensor, source: Tensor) -> bool:
        for tensor in (out, source):
            if any(_overlap(tensor, used) for used in self.busy):
                raise Race("a copy ran before the maths that uses its memory was done")
        out.copy_(source)
        return True

    def drift(self) -> None:
        """Some entries run by themselves, from whichever stream."""
        with self.lock:
            while self._random.random() < self._eager:
                ready = [stream for stream in self._streams if stream.entries]
                if not ready:
                    return
                self._turn(self._random.choice(ready))

    def force(self, event: LateEvent) -> None:
        """Everything that the event waits for runs, other streams' entries here and there too."""
        with self.lock:
            while not event.come:
                if not self._turn(event.stream):
                    others = [stream for stream in self._streams if stream.entries and stream is not event.stream]
                    assert others, "an event is waited for that nothing can bring"
                    self._turn(self._random.choice(others))
            self.drift()

    def finish(self) -> None:
        with self.lock:
            while left := [stream for stream in self._streams if stream.entries]:
                self._turn(self._random.choice(left))

    def _turn(self, stream: LateStream) -> bool:
        """The first entry of a stream, if it can run."""
        if not stream.entries or not stream.entries[0]():
            return False
        stream.entries.popleft()
        return True
