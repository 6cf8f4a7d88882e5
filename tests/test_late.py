"""The late device itself: it does what streams do, and what is not ordered goes wrong on it."""

from collections.abc import Callable

import pytest
import torch
from late import Late, Race

SEEDS = range(30)


def one_way(device: Late, *, wait: bool) -> torch.Tensor:
    """Host -> device on a stream, then maths on it."""
    stream, host, slab = device.stream(), device.pinned(8).fill_(3), device.memory(8)
    stream.copy(slab, host)
    ready = stream.record()
    if wait:
        device.compute.wait(ready)
    return slab * 2


def reused(device: Late, *, wait: bool) -> torch.Tensor:
    """The host writes into its buffer again while a copy from it is under way."""
    stream, host, slab = device.stream(), device.pinned(8).fill_(3), device.memory(8)
    stream.copy(slab, host)
    ready = stream.record()
    if wait:
        ready.synchronize()
    host.fill_(9)
    device.compute.wait(ready)
    return slab * 2


def overwritten(device: Late, *, wait: bool) -> torch.Tensor:
    """Memory that the maths still uses is copied over."""
    stream, host, slab = device.stream(), device.pinned(8).fill_(9), device.memory(8).fill_(3)
    made = slab * 2
    used = device.compute.record(slab)
    if wait:
        stream.wait(used)
    stream.copy(slab, host)
    stream.record().synchronize()
    return made


def chained(device: Late, *, wait: bool) -> torch.Tensor:
    """Out on one stream, back on another."""
    out, back = device.stream(), device.stream()
    values, host, landing = device.memory(8).fill_(3), device.pinned(8), device.memory(8)
    out.wait(device.compute.record(values))
    out.copy(host, values)
    if wait:
        back.wait(out.record())
    back.copy(landing, host)
    device.compute.wait(back.record())
    return landing * 2


@pytest.mark.parametrize("part", [one_way, reused, overwritten, chained])
def test_only_what_is_ordered_is_right(part: Callable[..., torch.Tensor]) -> None:
    def right(seed: int, *, wait: bool) -> bool:
        device = Late(seed)
        try:
            made = part(device, wait=wait)
            device.finish()
        except Race:
            return False
        return bool((made == 6).all())

    assert all(right(seed, wait=True) for seed in SEEDS)
    assert not all(right(seed, wait=False) for seed in SEEDS)
