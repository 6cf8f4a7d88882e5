"""Taps beside an accelerator: values are judged later, by the same rules, and nobody waits for them in between."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from deaf import fails, waits
from hypothesis import given, settings
from hypothesis import strategies as st
from late import Late
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from archs.batch import Group
from fpwap.callbacks.base import Callback, Emit, Site, WriteBack
from fpwap.device import Cpu, Device, Event, Stream
from fpwap.errors import NonFiniteError
from fpwap.prompts import Microbatch, View
from fpwap.schedule import Stage
from fpwap.store import Record
from fpwap.taps import Taps

WIDTH = 3


def taps(
    device: Device, *callbacks: Callback, sites: Sequence[Sequence[Site]] = (), write: Callable[..., None] | None = None
) -> Taps:
    return Taps(
        callbacks,
        sites,
        prompts=100,
        last=(9, "residual_post"),
        declare=lambda record: None,
        write=write or (lambda record, values, ids: None),
        span=lambda phase: contextlib.nullcontext(),
        check=lambda: None,
        device=device,
    )


def packed(shares: Sequence[tuple[int, int]], first: int = 0) -> Microbatch:
    """shares: (prompts, length). Sample ids count from ``first``."""
    groups, views, row = [], [], 0
    for prompts, length in shares:
        groups.append(Group(row, prompts, length, longest=length))
        views.append(View(torch.arange(first, first + prompts), length, groups[-1].rows))
        row, first = row + prompts * length, first + prompts
    return Microbatch(0, slice(0, row), tuple(groups), tuple(views))


def padded(lengths: Sequence[int], first: int = 0) -> Microbatch:
    """Prompts of these lengths, padded on the right to the longest, all in one group."""
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    views = []
    for length in dict.fromkeys(lengths):
        places = torch.tensor([place for place, other in enumerate(lengths) if other == length])
        views.append(View(first + places, length, places[:, None] * width + torch.arange(length)))
    group = Group(0, len(lengths), width, longest=width, mask=mask)
    return Microbatch(0, slice(0, len(lengths) * width), (group,), tuple(views))


def judged(device: Device, visits: Sequence[tuple[int, Microbatch, Tensor]]) -> str | None:
    """What is said of visits of layers: values are the maths' own again after each."""
    judge = taps(device)
    try:
        for layer, microbatch, value in visits:
            own = value.clone()
            judge.at(Stage("layer", layer), microbatch)("residual_post", own)
            device.compute.record(own)
            own.fill_(0)
            judge.settle(all=False)
        judge.settle()
    except NonFiniteError as error:
        return str(error)
    return None


# --- which rows are finite ------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_the_same_is_said_later(seed: int, data: st.DataObject) -> None:
    """Fill rows and pads may be anything; a sum that overflows is no fault."""
    visits, first = [], 0
    for layer in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            shares = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3))
            microbatch = packed(shares, first)
        else:
            microbatch = padded(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)), first)
        first += 10
        rows = microbatch.rows.stop + data.draw(st.integers(0, 2))
        dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
        value = torch.full((rows, WIDTH), torch.finfo(dtype).max * data.draw(st.sampled_from([0.0, 1.0])), dtype=dtype)
        for row in data.draw(st.sets(st.integers(0, rows - 1), max_size=2)):
            value[row, row % WIDTH] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
        visits.append((layer, microbatch, value))
    assert judged(Late(seed), visits) == judged(Cpu(), visits)


BAD = torch.ones(6, WIDTH)
BAD[4, 1] = torch.nan
SAID = "sample 2 is infinite or NaN at layer 1, hook 'residual_post': check the weights"


def test_every_wait_is_needed() -> None:
    visits = [(layer, packed([(3, 2)]), BAD if layer == 1 else torch.ones(6, WIDTH)) for layer in range(4)]

    def judging(device: Late) -> None:
        assert judged(device, visits) == SAID

    places = waits(judging)
    assert len(places) == 2
    for place in places:
        assert fails(judging, place), f"{place}: nothing notices that this wait is missing"


def test_a_visit_is_judged_when_the_next_one_is_launched() -> None:
    judge = taps(Late(0, eager=0.0))
    for layer in (1, 2):
        judge.at(Stage("layer", layer), packed([(3, 2)]))("residual_post", BAD)
        if layer == 1:
            judge.settle(all=False)
    with pytest.raises(NonFiniteError, match="layer 1"):
        judge.settle(all=False)
    with pytest.raises(NonFiniteError, match="layer 2"):
        judge.settle()
    judge.settle()


def test_nothing_is_committed_that_was_not_judged() -> None:
    judge = taps(Late(0))
    judge.start_layer(1)
    judge.at(Stage("layer", 1), packed([(3, 2)]))("residual_post", torch.ones(6, WIDTH))
    judge.settle(all=False)
    with pytest.raises(AssertionError, match="known to be finite"):
        judge.end_layer(1)
    judge.settle()
    judge.end_layer(1)


def test_logits_are_judged_by_the_prompts_whose_rows_they_are() -> None:
    class Reads(Callback):
        positions = "last"

        def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
            pass

    devices: list[Device] = [Cpu(), *(Late(seed) for seed in range(10))]
    for device in devices:
        judge = taps(device, Reads(), sites=[[(None, "logits")]])
        (chunk,) = judge.head_chunks(packed([(3, 2)]), 8)
        assert chunk.rows is not None
        assert chunk.rows.tolist() == [1, 3, 5]

        def show(value: Tensor) -> None:
            judge.show_logits(value, chunk)  # noqa: B023 - called at once
            judge.settle()  # noqa: B023

        value = torch.ones(8, 5)
        value[5:] = torch.nan  # fill
        show(value)
        value[1, 2] = torch.inf
        with pytest.raises(NonFiniteError, match=r"sample 1 is infinite or NaN at hook 'logits'"):
            show(value)


# --- nobody waits ---------------------------------------------------------------------------------------------------


class Nowhere:
    """A device whose values cannot be looked at, and whose work never ends."""

    torch = torch.device("meta")
    asynchronous = True

    def __init__(self) -> None:
        self.compute: Stream = self

    def stream(self) -> Stream:
        return self

    def memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="meta")

    def pinned(self, size: int) -> Tensor:
        return torch.ones(size, dtype=torch.uint8)

    def copy(self, out: Tensor, source: Tensor) -> None:
        pass

    def record(self, *used: Tensor) -> Event:
        return self

    def wait(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        raise AssertionError("somebody waits")

    def seconds_since(self, earlier: Event) -> float:
        raise AssertionError("somebody waits")


class Apart(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """No operation looks at a value of the device, and none mixes the device's tensors with the host's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = {tensor.device.type for tensor in tensors([args, kwargs or {}]) if tensor.dim()}
        aim = (kwargs or {}).get("device")
        if aim is not None and func is not torch.ops.aten.empty_like.default:
            places |= {torch.device(aim).type}
        assert len(places) <= 1, f"{func} mixes {places}"
        assert places != {"meta"} or func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


class Does(Callback):
    def __init__(self, phase: Any, positions: Any, borrows: bool) -> None:
        self.phase, self.positions, self.borrows = phase, positions, borrows

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> Emit | WriteBack:
        return WriteBack(acts * 2) if self.phase == "write" else Emit(acts[:, 0], dtype=torch.bfloat16)


@pytest.mark.parametrize("positions", ["all", "last", (0, 1), (1, 0), (-1,)])
@pytest.mark.parametrize("microbatch", [packed([(2, 3), (3, 2)]), padded([3, 2, 3])], ids=["packed", "padded"])
@pytest.mark.parametrize("phase", ["read", "write"])
@pytest.mark.parametrize("borrows", [False, True])
def test_nobody_waits_inside_a_visit(phase: str, positions: Any, microbatch: Microbatch, borrows: bool) -> None:
    site, written = (1, "residual_post"), []

    def write(record: Record, values: Tensor, ids: Tensor) -> None:
        written.append(record)

    judge = taps(Nowhere(), Does(phase, positions, borrows), sites=[[site]], write=write)
    value = torch.empty(16, WIDTH, device="meta")
    with Apart():  # type: ignore[no-untyped-call]
        judge.at(Stage("layer", 1), microbatch)("residual_post", value)
        judge.at(Stage("norm"), microbatch)("final_norm", value)
        judge.settle(all=False)
    assert len(written) == (2 if phase == "read" else 0)  # one for each length


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("positions", ["all", "last", (0, 1), (1, 0)])
def test_nobody_waits_at_the_head(positions: Any, limit: int | None) -> None:
    judge = taps(Nowhere(), Does("read", positions, True), sites=[[(None, "logits")]])
    x = torch.empty(16, WIDTH, device="meta")
    with Apart():  # type: ignore[no-untyped-call]
        for chunk in judge.head_chunks(packed([(2, 3), (3, 2)]), limit):
            judge.show_logits(x if chunk.rows is None else x[chunk.rows], chunk)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("microbatch", [packed([(2, 3), (3, 2)]), padded([3, 2, 3])], ids=["packed", "padded"])
@pytest.mark.parametrize("positions", ["all", "last", (0, 1), (1, 0), (-1,)])
def test_what_is_shown_and_written_back_is_the_same_everywhere(
    positions: Any, microbatch: Microbatch, seed: int
) -> None:
    x = torch.randn(16, WIDTH)

    def shown(device: Device) -> tuple[Tensor, list[Tensor]]:
        seen: list[Tensor] = []
        does = [Does("read", positions, False), Does("write", positions, True), Does("read_after_write", "last", True)]
        judge = taps(device, *does, sites=[[(1, "residual_post")]] * 3, write=lambda r, v, ids: seen.append(v.clone()))
        return judge.at(Stage("layer", 1), microbatch)("residual_post", x), seen

    there, here = shown(Late(seed)), shown(Cpu())
    assert torch.equal(there[0], here[0])
    assert not torch.equal(here[0], x)
    assert all(torch.equal(one, other) for one, other in zip(there[1], here[1], strict=True))
