"""The residual store: every tier is a table of rows, whatever is late, short or failing."""

import errno
import itertools
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deaf import fails, waits
from hypothesis import given, settings
from hypothesis import strategies as st
from late import Late
from torch import Tensor

from fpwap.device import Cpu, Device
from fpwap.errors import StoreError
from fpwap.residual import OnDisk, Residual, Tier, open_residual

WIDTH = 3
TIERS: tuple[Tier, ...] = ("device", "ram", "disk")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread and no descriptor outlives a test."""
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


def opened(tier: Tier, rows: int, device: Device, folder: Path, **widths: int) -> Residual:
    return open_residual(tier, rows, widths or {"residual": WIDTH}, torch.float32, device, folder)


def values(rows: slice, group: int, width: int = WIDTH) -> Tensor:
    """What group ``group`` writes: no two rows of no two groups are alike."""
    first = torch.arange(rows.start, rows.stop, dtype=torch.float32) + 1000.0 * group
    return first[:, None] * torch.arange(1, width + 1)


def slices(sizes: list[int]) -> list[slice]:
    stops = list(itertools.accumulate(sizes))
    return [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def sweep(store: Residual, parts: list[slice], groups: int, device: Device, ahead: int = 1) -> None:
    """What the engine does, each visit's values from those before; ``ahead`` slices are announced."""
    for group in range(groups):
        for place, rows in enumerate(parts):
            if group:
                for following in parts[place + (ahead > 0) : place + ahead + 1]:
                    store.fetch(following)
                x = torch.empty(rows.stop - rows.start, WIDTH)
                store.read(rows, x)
                assert torch.equal(x, values(rows, group - 1)), (group, rows)
                device.compute.record(x)
            y = values(rows, group)
            store.write(rows, y)
            y.fill_(torch.nan)  # the caller's own again
        store.turn()


# --- a table of rows ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    tier=st.sampled_from(TIERS),
    seed=st.none() | st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    groups=st.integers(1, 4),
    ahead=st.integers(0, 3),
)
def test_every_tier_gives_back_what_the_group_before_wrote(
    tier: Tier, seed: int | None, sizes: list[int], groups: int, ahead: int
) -> None:
    device: Device = Cpu() if seed is None else Late(seed)
    with tempfile.TemporaryDirectory() as folder:
        store = opened(tier, sum(sizes), device, Path(folder) / "scratch")
        try:
            sweep(store, slices(sizes), groups, device, ahead)
        finally:
            store.close()
        assert os.listdir(folder) == []


@settings(max_examples=60, deadline=None)
@given(tier=st.sampled_from(TIERS), seed=st.none() | st.integers(0, 10_000), data=st.data())
def test_against_a_dict_of_rows(tier: Tier, seed: int | None, data: st.DataObject) -> None:
    """Other slices in every group, in any order, some not read and some not written, announced rightly or wrongly."""
    device: Device = Cpu() if seed is None else Late(seed)
    rows = data.draw(st.integers(1, 12))
    before: dict[int, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = opened(tier, rows, device, Path(folder))
        try:
            for group in range(data.draw(st.integers(1, 4))):
                cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1)))) if rows > 1 else []
                parts = [slice(a, b) for a, b in itertools.pairwise([0, *cuts, rows])]
                now: dict[int, Tensor] = {}
                for part in data.draw(st.permutations(parts)):
                    if data.draw(st.booleans()) and before:
                        unwritten = [p for p in parts if p.start not in now]
                        store.fetch(data.draw(st.sampled_from(unwritten)))
                    if data.draw(st.booleans()) and before:
                        out = torch.empty(part.stop - part.start, WIDTH)
                        store.read(part, out)
                        assert torch.equal(out, torch.stack([before[row] for row in range(part.start, part.stop)]))
                    made = values(part, group)
                    now |= dict(zip(range(part.start, part.stop), made.clone(), strict=True))
                    store.write(part, made)
                store.turn()
                before = now
        finally:
            store.close()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tier", TIERS)
def test_what_was_announced_and_not_read_is_not_kept_for_the_next_group(tier: Tier, late: bool, tmp_path: Path) -> None:
    for seed in range(10):
        device: Device = Late(seed) if late else Cpu()
        store, rows = opened(tier, 4, device, tmp_path), slice(0, 4)
        for group in range(3):
            store.write(rows, values(rows, group))
            store.turn()
            store.fetch(rows)
        store.write(rows, values(rows, 3))
        store.turn()
        out = torch.empty(4, WIDTH)
        store.read(rows, out)
        assert torch.equal(out, values(rows, 3))
        store.close()


@pytest.mark.parametrize("tier", TIERS)
def test_waves_begin_at_the_first_row_again(tier: Tier, tmp_path: Path) -> None:
    device = Late(3)
    store = opened(tier, 10, device, tmp_path)
    for sizes in ([4, 4, 2], [3, 3]):
        sweep(store, slices(sizes), 3, device)
    store.close()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tier", TIERS)
def test_several_tensors(tier: Tier, late: bool, tmp_path: Path) -> None:
    device: Device = Late(5) if late else Cpu()
    store = opened(tier, 4, device, tmp_path, residual=2, router=5)
    for part in slices([2, 2]):
        store.write(part, values(part, 0, 2))
        store.write(part, values(part, 7, 5), "router")
    store.turn()
    for part in slices([2, 2]):
        store.fetch(part)
        small, wide = torch.empty(2, 2), torch.empty(2, 5)
        store.read(part, wide, "router")
        store.read(part, small)
        assert torch.equal(small, values(part, 0, 2))
        assert torch.equal(wide, values(part, 7, 5))
    store.close()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tier", TIERS)
def test_16_bit_rows_out_of_a_longer_tensor(tier: Tier, late: bool, tmp_path: Path) -> None:
    """What the engine has are the first rows of whole tiles; what is written need not be contiguous."""
    device: Device = Late(5) if late else Cpu()
    store = open_residual(tier, 5, {"residual": WIDTH}, torch.bfloat16, device, tmp_path)
    tiles = torch.randn(WIDTH, 8).bfloat16().t()
    store.write(slice(0, 5), tiles[:5])
    store.turn()
    out = torch.zeros(8, WIDTH, dtype=torch.bfloat16)
    store.read(slice(0, 5), out[:5])
    assert torch.equal(out[:5], tiles[:5])
    assert not out[5:].any()
    store.close()


def test_a_store_without_rows(tmp_path: Path) -> None:
    for tier in TIERS:
        for device in (Cpu(), Late(1)):
            store = opened(tier, 0, device, tmp_path / "scratch")
            store.turn()
            store.close()
            store.close()
            assert os.listdir(tmp_path) == []


# --- beside an accelerator ------------------------------------------------------------------------------------------


def in_ram(device: Late) -> None:
    store = opened("ram", 12, device, Path())
    try:
        sweep(store, slices([3, 4, 2, 3]), 4, device, ahead=2)
    finally:
        device.finish()


def on_disk(device: Late) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = opened("disk", 12, device, Path(folder))
        try:
            sweep(store, slices([3, 4, 2, 3]), 4, device, ahead=2)
        finally:
            store.close()
            device.finish()


@pytest.mark.parametrize("scenario", [in_ram, on_disk])
def test_every_wait_is_needed(scenario: Any) -> None:
    """All but those for the allocator's sake, which have tests of their own below."""
    places = {place for place in waits(scenario) if place[0] not in ("take", "close")}
    assert len(places) == {in_ram: 5, on_disk: 4}[scenario]
    for place in places:
        assert fails(scenario, place), f"{place}: nothing notices that this wait is missing"


def test_a_larger_buffer_comes_when_the_smaller_one_is_done_with() -> None:
    device = Late(0, eager=0.0)
    store = opened("ram", 10, device, Path())
    copies = list[Tensor]()

    def copied(out: Tensor, source: Tensor) -> bool:
        copies.append(out)
        return True

    device.copied = copied  # type: ignore[method-assign]
    for part in slices([2, 2]):
        store.fetch(part)
    assert copies == []  # nothing has run yet
    store.fetch(slice(4, 10))
    assert len(copies) == 1  # into the buffer that made room


def test_pinned_rows_are_given_back_when_no_copy_is_under_way() -> None:
    device = Late(0, eager=0.0)
    store = opened("ram", 4, device, Path())
    store.write(slice(0, 2), values(slice(0, 2), 0))
    store.turn()
    store.fetch(slice(2, 4))
    store.close()
    assert not any(stream.entries for stream in device._streams[1:])


class Counted(Late):
    """How much memory was asked for."""

    def __init__(self) -> None:
        super().__init__(7)
        self.near, self.far = list[int](), list[int]()

    def memory(self, size: int) -> Tensor:
        self.near.append(size)
        return super().memory(size)

    def pinned(self, size: int) -> Tensor:
        self.far.append(size)
        return super().pinned(size)


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_memory_is_four_slices_on_the_device_and_two_of_the_disk_in_ram(tier: Tier, tmp_path: Path) -> None:
    device, slice_bytes = Counted(), 4 * WIDTH * 4
    store = opened(tier, 400, device, tmp_path)
    sweep(store, slices([4] * 100), 3, device)
    store.close()
    assert sum(device.near) == 4 * slice_bytes
    assert sum(device.far) == (100 * slice_bytes if tier == "ram" else 2 * slice_bytes)


def test_the_caller_never_waits_for_pinned_rows() -> None:
    """With nothing running by itself, only what is read is waited for: the writes before it are not."""
    device = Late(0, eager=0.0)
    store = opened("ram", 6, device, Path())
    for part in slices([2, 2]):
        store.write(part, values(part, 0))
    assert sum(len(stream.entries) for stream in device._streams) > 4
    store.close()


# --- on disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_the_system_may_read_and_write_less_than_it_was_asked_for(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, preadv, some = os.pwrite, os.preadv, random.Random(0)
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[: some.randint(1, len(view))], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][: some.randint(1, 9)]], at))
    device: Device = Late(1) if late else Cpu()
    store = opened("disk", 12, device, tmp_path)
    sweep(store, slices([5, 4, 3]), 3, device)
    store.close()


def failing(number: int) -> Any:
    def fail(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    words = r"scratch/residual\.a: No space left on device: 120 bytes needed, \d+ bytes free; free space there or give"
    with pytest.raises(StoreError, match=words) as caught:
        opened("disk", 10, Cpu(), tmp_path / "scratch")
    assert isinstance(caught.value.__cause__, OSError)
    assert os.listdir(tmp_path) == []


def test_a_disk_too_full_for_the_folder_itself_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", lambda path, **options: failing(errno.ENOSPC)())
    words = r"file .*run/scratch: No space left on device: 240 bytes needed, \d+ bytes free; free space there or give"
    with pytest.raises(StoreError, match=words):
        opened("disk", 10, Cpu(), tmp_path / "run" / "scratch")
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_cannot_reserve_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    store = opened("disk", 10, Cpu(), tmp_path)
    sweep(store, slices([5, 5]), 2, Cpu())
    store.close()


@pytest.mark.parametrize("call", ["write", "turn", "fetch", "read"])
def test_a_failed_write_comes_out_of_the_next_call_and_all_others(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened("disk", 10, Cpu(), tmp_path / "scratch")
    assert isinstance(store, OnDisk)
    sweep(store, slices([5, 5]), 1, Cpu())
    monkeypatch.setattr(os, "pwrite", failing(errno.EIO))
    rows = slice(0, 5)
    store.write(rows, values(rows, 1))
    store._writer.submit(int).result()  # behind it
    calls: dict[str, Callable[[], None]] = {
        "write": lambda: store.write(rows, values(rows, 1)),
        "turn": store.turn,
        "fetch": lambda: store.fetch(rows),
        "read": lambda: store.read(rows, torch.empty(5, WIDTH)),
    }
    for again in (call, *calls):
        with pytest.raises(StoreError, match=r"residual stream's file .*residual\.a: Input/output error") as caught:
            calls[again]()
        assert isinstance(caught.value.__cause__, OSError)
    store.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("announced", [False, True])
def test_a_failed_read_comes_out_of_the_read(announced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows = opened("disk", 10, Cpu(), tmp_path), slice(0, 5)
    sweep(store, slices([5, 5]), 1, Cpu())
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    if announced:
        store.fetch(rows)
    with pytest.raises(StoreError, match=r"residual\.b: Input/output error") as caught:
        store.read(rows, torch.empty(5, WIDTH))
    assert isinstance(caught.value.__cause__, OSError)
    store.close()


def test_a_file_that_was_truncated(tmp_path: Path) -> None:
    store = opened("disk", 10, Cpu(), tmp_path)
    sweep(store, slices([5, 5]), 1, Cpu())
    os.truncate(tmp_path / "residual.b", 100)
    with pytest.raises(StoreError, match=r"residual\.b ends at byte 100: it was truncated"):
        store.read(slice(5, 10), torch.empty(5, WIDTH))
    store.close()


def test_writing_is_behind_and_no_further_than_two_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, go = os.pwrite, threading.Event()

    def held(fd: int, view: memoryview, at: int) -> int:
        assert go.wait(60)
        return pwrite(fd, view, at)

    monkeypatch.setattr(os, "pwrite", held)
    store = opened("disk", 6, Cpu(), tmp_path)
    assert isinstance(store, OnDisk)
    parts = slices([2, 2, 2])
    for part in parts[:2]:
        store.write(part, values(part, 0))  # returns though nothing can be written
    third = threading.Thread(target=store.write, args=(parts[2], values(parts[2], 0)))
    third.start()
    third.join(0.05)
    assert third.is_alive()
    assert len(store._writes) == 2
    go.set()
    third.join()
    store.turn()
    out = torch.empty(6, WIDTH)
    store.read(slice(0, 6), out)
    assert torch.equal(out, values(slice(0, 6), 0))
    store.close()


def test_closed_while_reading_and_writing(tmp_path: Path) -> None:
    store = opened("disk", 6, Cpu(), tmp_path / "scratch")
    for part in slices([2, 2, 2]):
        store.fetch(part)
        store.write(part, values(part, 0))
    store.close()
    store.close()
    assert os.listdir(tmp_path) == []


def test_which_store(tmp_path: Path) -> None:
    for tier, device, kind in (("ram", Late(0), "Pinned"), ("ram", Cpu(), "InMemory"), ("device", Late(0), "InMemory")):
        store = opened(tier, 2, device, tmp_path)  # type: ignore[arg-type]
        assert type(store).__name__ == kind
        store.close()
