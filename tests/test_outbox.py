"""The outbox: what is put is written, once, in order and unchanged, however late it travels."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deaf import fails, waits
from hypothesis import given, settings
from hypothesis import strategies as st
from late import Late
from torch import Tensor

from fpwap.device import Cpu, Device
from fpwap.outbox import ALIGNED, Outbox, free
from fpwap.store import Record

RECORD = Record(layer=1, hook="residual_post", name=None, per="prompt", rest=(3,), dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    threads = threading.active_count()
    yield
    assert threading.active_count() == threads


class Written(list[tuple[Record, Tensor, Tensor]]):
    """Keeps what it is given as the store does: the memory is not its own."""

    def __call__(self, record: Record, values: Tensor, sample_ids: Tensor) -> None:
        assert values.device.type == "cpu"
        assert values.dtype == record.dtype
        self.append((record, values.clone(), sample_ids))


def scenario(device: Device, sizes: list[int], ring: int = 256) -> None:
    """Values that the maths goes on to write into."""
    written = Written()
    box = Outbox(written, device, ring_bytes=ring)
    try:
        for number, rows in enumerate(sizes):
            acts = torch.arange(6 * rows, dtype=torch.float32).view(3, 2 * rows).t() + 1000 * number
            box.put(RECORD, acts[::2], torch.arange(rows) + number)
            device.compute.record(acts)
            acts.fill_(torch.nan)
        box.flush()
        assert len(written) == len(sizes)
        for number, (rows, (record, values, ids)) in enumerate(zip(sizes, written, strict=True)):
            expected = torch.arange(6 * rows, dtype=torch.float32).view(3, 2 * rows).t()[::2] + 1000 * number
            assert record == RECORD
            assert torch.equal(values, expected.bfloat16())
            assert torch.equal(ids, torch.arange(rows) + number)
    finally:
        box.close()


@settings(max_examples=100, deadline=None)
@given(seed=st.none() | st.integers(0, 10_000), sizes=st.lists(st.integers(0, 60), max_size=12))
def test_everything_is_written_in_order(seed: int | None, sizes: list[int]) -> None:
    """Values of up to 360 bytes, some larger than the ring, some empty."""
    scenario(Cpu() if seed is None else Late(seed), sizes)


def test_every_wait_is_needed() -> None:
    def some(device: Late) -> None:
        scenario(device, [4, 7, 10, 1, 12, 12, 3])

    places = {place for place in waits(some) if place[0] != "close"}
    assert len(places) == 2
    for place in places:
        assert fails(some, place), f"{place}: nothing notices that this wait is missing"


def test_a_view_of_what_the_maths_works_on_in_its_own_dtype_is_copied() -> None:
    """Nothing to cast, nothing to gather: still the caller's memory, written into by the next operation."""
    devices: list[Device] = [Cpu(), *(Late(seed) for seed in range(20))]
    for device in devices:
        written, acts = Written(), torch.ones(4, 3, dtype=torch.bfloat16)
        box = Outbox(written, device, ring_bytes=256)
        box.put(RECORD, acts, torch.arange(4))
        acts.fill_(2)
        box.flush()
        box.close()
        assert written[0][1].eq(1).all()


def test_put_does_not_wait_for_the_copy() -> None:
    device, go, written = Late(0, eager=0.0), threading.Event(), Written()

    def held(*output: Any) -> None:
        assert go.wait(60)
        written(*output)

    box = Outbox(held, device, ring_bytes=256)
    for number in range(4):  # 4 x 24 bytes, each beginning at a multiple of 64
        box.put(RECORD, torch.full((4, 3), float(number)), torch.arange(4))
    assert written == []
    full = threading.Thread(target=box.put, args=(RECORD, torch.zeros(4, 3), torch.arange(4)))
    full.start()
    full.join(0.05)
    assert full.is_alive()  # the ring is full
    go.set()
    full.join()
    box.flush()
    assert [int(values[0, 0]) for _, values, _ in written] == [0, 1, 2, 3, 0]
    box.close()


@pytest.mark.parametrize("call", ["put", "flush", "large"])
def test_what_writing_raises_comes_out_of_the_next_call_with_its_traceback(call: str) -> None:
    def full(*output: Any) -> None:
        raise OSError("the disk is full")

    box = Outbox(full, Late(2), ring_bytes=256)
    box.put(RECORD, torch.zeros(4, 3), torch.arange(4))
    box._thread.submit(int).result()  # behind it
    calls = {
        "put": lambda: box.put(RECORD, torch.zeros(4, 3), torch.arange(4)),
        "large": lambda: box.put(RECORD, torch.zeros(400, 3), torch.arange(400)),
        "flush": box.flush,
    }
    for again in (call, *calls):
        with pytest.raises(OSError, match="the disk is full") as caught:
            calls[again]()
        assert caught.traceback[-1].name == "full"
    box.close()
    box.close()


def test_on_the_cpu_it_comes_out_of_the_put() -> None:
    def full(*output: Any) -> None:
        raise OSError("the disk is full")

    box = Outbox(full, Cpu(), ring_bytes=256)
    with pytest.raises(OSError, match="the disk is full"):
        box.put(RECORD, torch.zeros(4, 3), torch.arange(4))
    box.close()


class Counted(Late):
    def __init__(self) -> None:
        super().__init__(7)
        self.asked = list[int]()

    def pinned(self, size: int) -> Tensor:
        self.asked.append(size)
        return super().pinned(size)


def test_memory_is_the_ring_and_nothing_where_nothing_is_put() -> None:
    device = Counted()
    box = Outbox(Written(), device, ring_bytes=256)
    assert device.asked == []
    for _ in range(50):
        box.put(RECORD, torch.zeros(4, 3), torch.arange(4))
    box.flush()
    box.close()
    assert device.asked == [256]


def test_the_ring_is_given_back_when_no_copy_is_under_way() -> None:
    device, go = Late(0, eager=0.0), threading.Event()
    box = Outbox(lambda *output: None, device, ring_bytes=256)
    box._thread.submit(go.wait, 60)
    box.put(RECORD, torch.zeros(4, 3), torch.arange(4))
    later = threading.Timer(0.05, go.set)
    later.start()
    box.close()  # cancels what the thread has not begun
    later.join()
    assert not any(stream.entries for stream in device._streams[1:])


@given(data=st.data(), room=st.integers(1, 4000))
def test_places_in_the_ring_never_overlap(data: st.DataObject, room: int) -> None:
    taken: list[range] = []
    for size in data.draw(st.lists(st.integers(1, 1500), max_size=40)):
        if size > room:
            continue
        while (place := free(taken, size, room)) is None:
            assert taken, "what fits into an empty ring must fit"
            del taken[0]
        assert len(place) == size
        assert place.start >= 0
        assert place.stop <= room
        assert place.start % ALIGNED == 0
        assert all(place.stop <= other.start or other.stop <= place.start for other in taken)
        taken.append(place)
