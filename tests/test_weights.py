"""Weights against safetensors' own reader: whatever lies where in a file, however it is read, into whichever memory."""

import contextlib
import ctypes
import errno
import fcntl
import gc
import itertools
import json
import mmap
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from deaf import fails, waits
from hypothesis import given, settings
from hypothesis import strategies as st
from late import Late
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from archs.contract import Family, experts, source
from fpwap import interrupt, reading, recipes, weights
from fpwap.checkpoint import Checkpoint
from fpwap.device import PAGE, Cpu, Device, Event
from fpwap.errors import ModelError, RequestError
from fpwap.formats import Quantisation, mxfp4
from fpwap.parcels import Layout, lay_out
from fpwap.reading import Shards, Span, gather
from fpwap.recipes import Way, recipe, slot_size
from fpwap.schedule import Loading, Stage
from fpwap.weights import Decoded, Weights

VOCAB, HIDDEN, PLACES, LAYERS, EXPERTS, WIDTH = 150, 32, 9, 3, 4, 64
BLOCK = (16, 24)
CONFIG = SimpleNamespace(
    vocab=VOCAB, hidden=HIDDEN, places=PLACES, layers=LAYERS, experts=EXPERTS, width=WIDTH, tied=False
)
QUANTISED = {"fp8": Quantisation("fp8", BLOCK), "mxfp4": Quantisation("mxfp4")}
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in PLAIN.items()} | {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}


@dataclass(frozen=True)
class Embedding:
    tokens: Tensor = source("tokens", "vocab", "hidden")
    places: Tensor = source("places", "places", "hidden")


@dataclass(frozen=True)
class Expert:
    up: Tensor = source("{e}.up", "width", "hidden")
    down: Tensor = source("{e}.down", "hidden", "width")


@dataclass(frozen=True)
class Stacked:
    both: Tensor = source("both", "width", "hidden")


@dataclass(frozen=True)
class Dense:
    first: Tensor = source("first", "width", "hidden")
    pair: Tensor = source(("left", "right"), "hidden", "width")
    scale: Tensor = source("scale", "hidden", dtype=torch.float32)


@dataclass(frozen=True)
class Sparse:
    router: Tensor = source("router", "experts", "hidden")
    own: Any = experts("experts.", Expert, "experts")
    shared: Any = experts("stack.", Stacked, "experts")


@dataclass(frozen=True)
class Norm:
    weight: Tensor = source("norm", "hidden")


@dataclass(frozen=True)
class Head:
    unembed: Tensor = source("head", "vocab", "hidden")
    bias: Tensor = source("bias", "vocab")
    common: Tensor = source("common", "hidden")


def unused(*values: Any) -> Any:
    raise AssertionError("no maths here")


FAMILY = Family(
    name="paper",
    model_types=("paper",),
    config=unused,
    embed_weights=Embedding,
    layer_weights=lambda config, layer: Sparse if layer == 1 else Dense,
    norm_weights=Norm,
    head_weights=Head,
    embed=unused,
    block=unused,
    final_norm=unused,
    unembed=unused,
    hooks=unused,
    prefixes=(("", ""),),
    layer_prefix="layers.{i}.",
    embedding="tokens",
    head="head",
    ignored=(r"spare\..*",),
)
STAGES = [Stage("embed"), *(Stage("layer", layer) for layer in range(LAYERS)), Stage("norm"), Stage("head")]
IN_TURNS = frozenset({Stage("layer", 1), Stage("head")})
SHAPES: dict[str, tuple[int, ...]] = {
    "tokens": (VOCAB, HIDDEN),
    "places": (PLACES, HIDDEN),
    **{
        f"layers.{layer}.{name}": shape
        for layer in (0, 2)
        for name, shape in {
            "first": (WIDTH, HIDDEN),
            "left": (HIDDEN, WIDTH),
            "right": (HIDDEN, WIDTH),
            "scale": (HIDDEN,),
        }.items()
    },
    "layers.1.router": (EXPERTS, HIDDEN),
    **{f"layers.1.experts.{e}.up": (WIDTH, HIDDEN) for e in range(EXPERTS)},
    **{f"layers.1.experts.{e}.down": (HIDDEN, WIDTH) for e in range(EXPERTS)},
    "layers.1.stack.both": (EXPERTS, WIDTH, HIDDEN),
    "norm": (HIDDEN,),
    "head": (VOCAB, HIDDEN),
    "bias": (VOCAB,),
    "common": (HIDDEN,),
}


def save(tensors: dict[str, Tensor], path: Path, spaces: int = 0) -> None:
    """A safetensors file with tensors in this order; ``spaces`` end its header, so they may begin anywhere."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode() + b" " * spaces
    raw = (tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(raw))


def shard(tensors: dict[str, Tensor], folder: Path, place: Callable[[str], int], spaces: Callable[[int], int]) -> None:
    """Tensors by the number of their shard."""
    files: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        files.setdefault(place(name), {})[name] = tensor
    for number, held in files.items():
        save(held, folder / f"part-{number}.safetensors", spaces(number))
    index = {name: f"part-{place(name)}.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def values(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def model(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {name: values(shape, seed, dtype) for seed, (name, shape) in enumerate(SHAPES.items())}


def open_layout(folder: Path, quantised: Quantisation | None = None) -> tuple[Checkpoint, Layout]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint, lay_out(checkpoint, FAMILY, CONFIG, quantised)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All bf16, in one file."""
    save(model(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Strips, staging buffers, chunks and pieces so small that tiny tensors need several."""
    patch.setattr(recipes, "STRIP", 2048)
    patch.setattr(recipes, "STAGE", 4 * PAGE)
    patch.setattr(recipes, "APART", 3 * HIDDEN)
    patch.setattr(reading, "CHUNK", PAGE)
    patch.setattr(weights, "PIECE", 3000)
    patch.setattr(weights, "PIECE_ROWS", 16)


def opened(folder: Path, device: Device, quantised: Quantisation | None = None, **changed: Any) -> Weights:
    return start(open_layout(folder, quantised), device, **changed)


def start(found: tuple[Checkpoint, Layout], device: Device, **changed: Any) -> Weights:
    checkpoint, layout = found
    options: dict[str, Any] = {
        "stages": STAGES,
        "loading": "stream",
        "ring": 2,
        "streamed": frozenset(),
        "rows": None,
        "dtype": torch.bfloat16,
        "moved": lambda size, seconds: None,
    }
    options |= changed
    return Weights(checkpoint, layout, options.pop("stages"), device=device, **options)


# --- what is expected -----------------------------------------------------------------------------------------------


def expected(stored: dict[str, Tensor], dtype: torch.dtype, rows: NDArray[np.int64] | None = None) -> dict[str, Tensor]:
    """Every field by stage, name and expert, from the tensors as they are stored and decoded."""
    found = {}
    for name, tensor in stored.items():
        made = tensor if name.endswith("scale") and tensor.dtype == torch.float32 else tensor.to(dtype)
        if name.endswith(".scale"):
            made = tensor.to(torch.float32)
        found[name] = made[torch.from_numpy(rows)] if name == "tokens" and rows is not None else made
    for layer in (0, 2):
        left, right = (found.pop(f"layers.{layer}.{side}") for side in ("left", "right"))
        found[f"layers.{layer}.pair"] = torch.cat((left, right))
    return {name: tensor for name, tensor in found.items() if not name.startswith("spare.")}


Look = Callable[[Tensor], Tensor]
"""Copies a tensor, as the maths would read it."""


def shown(stage: Stage, w: Any, order: Sequence[int], look: Look = Tensor.clone) -> Iterator[tuple[str, Tensor]]:
    """Copies of a stage's tensors under the names of `expected`; experts in this order."""
    if stage.kind == "head":
        pieces = [{f.name: look(getattr(piece, f.name)) for f in fields(piece)} for piece in w.pieces()]
        yield "head", torch.cat([piece["unembed"] for piece in pieces])
        yield "bias", torch.cat([piece["bias"] for piece in pieces])
        yield from (("common", piece["common"]) for piece in pieces)
        return
    below = "" if stage.layer is None else f"layers.{stage.layer}."
    for part in fields(w):
        held = getattr(w, part.name)
        if isinstance(held, Tensor):
            yield {"weight": "norm"}.get(below + part.name, below + part.name), look(held)
        elif part.name == "own":
            assert len(held) == EXPERTS
            for e, expert in held.each(order):
                yield f"{below}experts.{e}.up", look(expert.up)
                yield f"{below}experts.{e}.down", look(expert.down)
        else:
            stack = {e: look(expert.both) for e, expert in held.each(order)}
            yield f"{below}stack.both", torch.stack([stack[e] for e in sorted(stack)])


def same(got: Tensor, wanted: Tensor) -> bool:
    """In every bit."""
    as_bytes = (t.contiguous().view(-1).view(torch.uint8) for t in (got, wanted))
    return (got.dtype, got.shape) == (wanted.dtype, wanted.shape) and torch.equal(*as_bytes)


def sweep(
    held: Weights, wanted: dict[str, Tensor], stages: Sequence[Stage] = STAGES, visits: int = 1, ahead: int = 1
) -> None:
    """Acquires and releases in order, ``ahead`` stages held at once, and looks at everything at each visit."""
    order = list(range(EXPERTS))[::-1]
    seen: set[str] = set()
    for first in range(0, len(stages), ahead):
        group = stages[first : first + ahead]
        acquired = [(stage, held.acquire(stage)) for stage in group]
        for stage, w in acquired * visits:
            for name, tensor in shown(stage, w, order):
                assert same(tensor, wanted[name]), f"{name} differs"
                seen.add(name)
        for stage in group:
            held.release(stage)
    assert seen == set(wanted) or len(stages) < len(STAGES)


# --- everything at once, anywhere -----------------------------------------------------------------------------------


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """Any dtypes, any order, any split into shards, spare tensors between them, headers of any length."""
    dtypes = (
        st.sampled_from(list(PLAIN.values()))
        if draw(st.booleans())
        else st.just(draw(st.sampled_from(list(PLAIN.values()))))
    )
    names = list(draw(st.permutations(list(SHAPES))) if draw(st.booleans()) else SHAPES)
    spares = draw(st.lists(st.tuples(st.integers(0, len(names)), st.integers(0, 9000)), max_size=4))
    tensors = {name: values(SHAPES[name], seed, draw(dtypes)) for seed, name in enumerate(names)}
    placed = list(tensors.items())
    for number, (place, size) in enumerate(spares):
        placed.insert(place, (f"spare.{number}", torch.zeros(size, dtype=torch.uint8)))
    shards = draw(st.integers(1, 3))
    return {
        "tensors": dict(placed),
        "places": {name: draw(st.integers(1, shards)) for name, _ in placed},
        "spaces": draw(st.lists(st.integers(0, 40), min_size=3, max_size=3)),
    }


@st.composite
def ways(draw: st.DrawFn) -> dict[str, Any]:
    ids = draw(st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1))
    return {
        "loading": draw(st.sampled_from(["resident", "stream"])),
        "ring": draw(st.integers(1, 8)),
        "streamed": frozenset(draw(st.sets(st.sampled_from(sorted(IN_TURNS, key=str))))),
        "rows": None if ids is None else np.array(sorted(ids), dtype=np.int64),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    }


def short_reads(seed: int) -> Callable[[int, list[memoryview], int], int]:
    """`os.preadv` that returns what it likes; behind that lie other bytes."""
    chance, whole = random.Random(seed), os.preadv

    def preadv(descriptor: int, parts: list[memoryview], start: int) -> int:
        got = whole(descriptor, parts, start)
        told = chance.choice([got, got, max(1, got // 2), chance.randint(1, got)]) if got else 0
        parts[0][told:] = b"\x55" * (len(parts[0]) - told)
        return told

    return preadv


@settings(max_examples=80, deadline=None)
@given(
    made=files(),
    way=ways(),
    seed=st.none() | st.integers(0, 1000),
    short=st.none() | st.integers(0, 1000),
    data=st.data(),
)
def test_every_field_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory,
    made: dict[str, Any],
    way: dict[str, Any],
    seed: int | None,
    short: int | None,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    shard(made["tensors"], folder, made["places"].__getitem__, lambda number: made["spaces"][number - 1])
    stored = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    device = Cpu() if seed is None else Late(seed)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans(), label="small"):
            shrink(patch)
        if short is not None:
            patch.setattr(os, "preadv", short_reads(short))
        held = opened(folder, device, **way)
        try:
            ahead = data.draw(st.integers(1, way["ring"]), label="held at once")
            wanted = expected(stored, way["dtype"], way["rows"])
            sweep(held, wanted, visits=data.draw(st.integers(1, 2)), ahead=ahead)
        finally:
            held.close()


def test_one_expert_that_does_not_lie_as_the_others_do(tmp_path: Path) -> None:
    """Alike in dtypes and shapes, it alone begins where its bytes cannot serve as they lie, and is staged."""
    tensors: dict[str, Tensor] = {}
    for seed, name in enumerate(SHAPES):
        odd = "experts.0." in name
        tensors |= {f"spare.before.{seed}": torch.zeros(4, dtype=torch.uint8)} if odd else {}
        tensors[name] = values(SHAPES[name], seed, torch.float32)
        tensors |= {f"spare.behind.{seed}": torch.zeros(12, dtype=torch.uint8)} if odd else {}
    shard(tensors, tmp_path, lambda name: 1, lambda number: 0)
    (length,) = struct.unpack("<Q", (tmp_path / "part-1.safetensors").read_bytes()[:8])
    shard(tensors, tmp_path, lambda name: 1, lambda number: -(8 + length) % 16)
    held = opened(tmp_path, Cpu(), streamed=frozenset({Stage("layer", 1)}), dtype=torch.float32)
    try:
        sweep(held, expected(tensors, torch.float32))
    finally:
        held.close()


@settings(max_examples=60, deadline=None)
@given(made=files(), way=ways(), asynchronous=st.booleans())
def test_the_plan_knows_how_large_a_slot_is(
    tmp_path_factory: pytest.TempPathFactory, made: dict[str, Any], way: dict[str, Any], asynchronous: bool
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    shard(made["tensors"], folder, made["places"].__getitem__, lambda number: made["spaces"][number - 1])
    _, layout = open_layout(folder)
    how: Way = "stage" if asynchronous else "map" if way["loading"] == "resident" else "slot"
    for stage in STAGES:
        rows = way["rows"] if stage.kind == "embed" else None
        found = recipe(layout[stage], way["dtype"], how, rows)
        bound = slot_size(layout[stage], way["dtype"], how, None if rows is None else len(rows))
        assert found.size <= bound
        assert all(place is None or place.of(torch.empty(bound, dtype=torch.uint8)).numel() for place in found.places)
        assert how == "stage" or found.size == bound or how == "slot"
        if rows is None:
            assert found.read == layout[stage].size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["plain", "fp8"])
def test_staging_buffers_stay_small(method: str, dtype: torch.dtype, tmp_path: Path, small: None) -> None:
    """No strip is larger than it may be, though rows that lie near each other are read at once."""
    save(model() if method == "plain" else quantised(method)[0], tmp_path / "model.safetensors")
    _, layout = open_layout(tmp_path, QUANTISED.get(method))
    for stage, rows in ((Stage("embed"), np.arange(0, VOCAB, 2)), (Stage("embed"), None), (Stage("layer", 0), None)):
        found = recipe(layout[stage], dtype, "stage", rows)
        strips = [strip for batch in found.batches for strip in batch.strips]
        assert len(strips) > len(found.places)
        most = max(recipes.STRIP, BLOCK[0] * WIDTH * dtype.itemsize)  # a row of blocks is not split
        assert all(max(strip.size, *(span.size for span in strip.spans)) <= most for strip in strips)
        assert found.room <= recipes.STAGE


@settings(max_examples=200, deadline=None)
@given(spans=st.lists(st.builds(Span, st.sampled_from("ab"), st.integers(0, 30 * PAGE), st.integers(1, 3 * PAGE))))
def test_spans_are_gathered_page_by_page(spans: list[Span]) -> None:
    found = gather(spans)
    pages = {(s.shard, page) for s in spans for page in range(s.begin // PAGE, (s.end - 1) // PAGE + 1)}
    read = [(e.shard, page) for e, _ in found.extents for page in range(e.begin // PAGE, -(-e.end // PAGE))]
    assert len(read) == len(set(read)) and set(read) == pages, "every page that is needed, once"
    assert found.size == len(read) * PAGE
    memory = {page: place for place, page in enumerate(read)}
    for span, start in zip(spans, found.starts, strict=True):
        assert start == memory[span.shard, span.begin // PAGE] * PAGE + span.begin % PAGE


# --- stored formats -------------------------------------------------------------------------------------------------


def quantised(method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint whose matrices are quantised where the format knows that, and the values that they stand for."""
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        plain = values(shape, seed)
        if method == "fp8" and len(shape) == 2:
            numbers, scales = plain.to(torch.float8_e4m3fn), values((-(-shape[0] // 16), -(-shape[1] // 24)), seed + 99)
            stored |= {name: numbers, f"{name}_scale_inv": scales.float()}
            wide = scales.float().repeat_interleave(16, 0)[: shape[0]].repeat_interleave(24, 1)[:, : shape[1]]
            meant[name] = numbers.float() * wide
        elif method == "mxfp4" and name.endswith(("both", "up")):
            *stack, width, height = shape
            draw = torch.Generator().manual_seed(seed)
            blocks = torch.randint(256, (*stack, height, width // 32, 16), dtype=torch.uint8, generator=draw)
            scales = torch.randint(120, 134, (*stack, height, width // 32), dtype=torch.uint8, generator=draw)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            meant[name] = torch.empty(shape)
            for one, exponents, out in zip(
                *(t.view(-1, height, *t.shape[-1 - (t is blocks) :]) for t in (blocks, scales)),
                meant[name].view(-1, width, height),
                strict=True,
            ):
                mxfp4(one, exponents, out.t())
        else:
            stored[name] = meant[name] = plain
    return stored, meant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loading", ["resident", "stream"])
@pytest.mark.parametrize("device", [Cpu(), Late(7)], ids=["cpu", "late"])
@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_quantised_weights_are_decoded_on_their_way(
    method: str, device: Device, loading: Loading, dtype: torch.dtype, tmp_path: Path, small: None
) -> None:
    stored, meant = quantised(method)
    save(stored, tmp_path / "model.safetensors", spaces=3)
    for rows in (None, np.array([0, 1, 17, 90, 149]), np.arange(10, 60, 2)):
        held = opened(tmp_path, device, QUANTISED[method], loading=loading, streamed=IN_TURNS, dtype=dtype, rows=rows)
        sweep(held, expected(meant, dtype, rows))
        held.close()


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_quantised_checkpoint_is_decoded_by_name(method: str, tmp_path: Path, small: None) -> None:
    stored, meant = quantised(method)
    save(stored, tmp_path / "model.safetensors", spaces=5)
    decoded = Decoded(Checkpoint.open(tmp_path), QUANTISED[method], torch.float32)
    assert set(decoded) == set(meant) and len(decoded) == len(meant)
    for name, tensor in meant.items():
        assert same(
            decoded[name],
            tensor.to(torch.bfloat16 if name in stored and f"{name}_scale_inv" not in stored else torch.float32),
        )
    with pytest.raises(KeyError):
        decoded["nothing"]


def test_a_vocabulary_that_lies_across_is_refused_by_rows(tmp_path: Path) -> None:
    """Of mxfp4 a row is not bytes in a row."""
    wide = 160
    stored = model() | {"head": values((wide, HIDDEN), 1), "bias": values((wide,), 2)}
    del stored["tokens"]
    blocks = torch.zeros(HIDDEN, wide // 32, 16, dtype=torch.uint8)
    save(stored | {"tokens_blocks": blocks, "tokens_scales": blocks[..., 0]}, tmp_path / "model.safetensors")
    checkpoint, config = Checkpoint.open(tmp_path), SimpleNamespace(**vars(CONFIG) | {"vocab": wide})
    layout = lay_out(checkpoint, FAMILY, config, QUANTISED["mxfp4"])
    with pytest.raises(ModelError, match="tokens_blocks is stored as U8, which cannot be read row by row"):
        recipe(layout[Stage("embed")], torch.float32, "slot", np.array([3]))


# --- how it is read -------------------------------------------------------------------------------------------------


class Counted(Cpu):
    """Remembers what memory was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: list[Tensor] = []
        self.staging: list[Tensor] = []

    def memory(self, size: int) -> Tensor:
        self.slots.append(super().memory(size))
        return self.slots[-1]

    def pinned(self, size: int) -> Tensor:
        self.staging.append(super().pinned(size))
        return self.staging[-1]


def inside(tensor: Tensor, memory: Sequence[Tensor]) -> bool:
    return any(0 <= tensor.data_ptr() - m.data_ptr() < m.nbytes for m in memory)


def test_streamed_fields_are_views_of_slots_that_are_taken_once(folder: Path) -> None:
    device = Counted()
    held = opened(folder, device, stages=STAGES * 3, ring=2)
    slots = list(device.slots)
    assert len(slots) == 2 and all(slot.data_ptr() % PAGE == 0 for slot in slots)
    start = {entry.name: entry.start for entry in Checkpoint.open(folder).entries.values()}
    for stage in STAGES * 3:
        w = held.acquire(stage)
        if stage.kind == "embed":
            assert inside(w.tokens, slots), "never copied"
            assert w.tokens.data_ptr() % PAGE == start["tokens"] % PAGE, "as in a map"
        held.release(stage)
    held.close()
    assert len(device.slots) == 2
    scale = HIDDEN * 2  # bf16, computed with in fp32: the only field that is made
    assert [buffer.nbytes for buffer in device.staging] == [-(-scale // PAGE) * PAGE + PAGE] * 2


def test_resident_fields_are_maps_of_the_file(folder: Path) -> None:
    device = Counted()
    held = opened(folder, device, loading="resident", ring=len(STAGES))
    for stage in STAGES:
        w = held.acquire(stage)
        if stage.kind == "embed":
            assert not inside(w.tokens, device.slots + device.staging)
    held.close()
    assert sum(slot.nbytes for slot in device.slots) == 2 * HIDDEN * 4, "two scales in fp32"


@pytest.mark.parametrize("loading", ["resident", "stream"])
def test_all_that_is_read_is_counted(loading: Loading, folder: Path) -> None:
    _, layout = open_layout(folder)
    whole = sum(layout[stage].size for stage in STAGES)
    own = whole - layout[Stage("layer", 1)].size + layout[Stage("layer", 1)].own_size
    for streamed, size in ((frozenset[Stage](), whole), (frozenset({Stage("layer", 1)}), own)):
        read: list[int] = []
        held = opened(
            folder, Cpu(), loading=loading, streamed=streamed, moved=lambda size, _, read=read: read.append(size)
        )
        for stage in STAGES:
            held.acquire(stage)
            held.release(stage)
        held.close()
        assert sum(read) == size


def test_a_resident_model_on_an_accelerator_is_read_once(folder: Path) -> None:
    read: list[int] = []
    _, layout = open_layout(folder)
    device = Late(3)
    held = opened(
        folder, device, stages=STAGES * 3, loading="resident", ring=2, moved=lambda size, _: read.append(size)
    )
    sweep(held, expected(model(), torch.bfloat16), STAGES * 3, ahead=4)
    held.close()
    assert sum(read) == sum(layout[stage].size for stage in STAGES)


def test_few_rows_are_read_by_themselves_and_many_in_a_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "APART", 3 * HIDDEN * 2)
    row = HIDDEN * 2
    for rows, size in (([3, 4, 100], 3), ([3, 6, 100], 5), ([3, 7, 100], 3), (range(0, VOCAB, 3), 148)):
        read: list[int] = []
        held = opened(
            folder, Cpu(), stages=STAGES[:1], rows=np.array(rows), moved=lambda size, _, read=read: read.append(size)
        )
        assert same(held.acquire(STAGES[0]).tokens, model()["tokens"][list(rows)])
        held.close()
        assert read == [size * row + PLACES * row]


def test_pieces_of_the_head_are_whole_multiples(folder: Path, small: None) -> None:
    held = opened(folder, Cpu(), streamed=IN_TURNS, stages=[Stage("head")])
    head = held.acquire(Stage("head"))
    for _ in range(2):
        sizes = [(len(piece.unembed), len(piece.bias), len(piece.common)) for piece in head.pieces()]
        assert sizes == [(32, 32, HIDDEN)] * 4 + [(22, 22, HIDDEN)]
    held.close()


def test_pieces_that_nobody_asks_for_any_more_do_no_harm(folder: Path, small: None) -> None:
    for device in (Cpu(), Late(5)):
        held = opened(folder, device, streamed=IN_TURNS)
        for stage in STAGES:
            w = held.acquire(stage)
            for _ in range(3):
                some = w.pieces() if stage.kind == "head" else w.own.each([0, 1, 2]) if stage.layer == 1 else iter(())
                next(some, None)
                if hasattr(some, "close"):
                    some.close()
            for name, tensor in shown(stage, w, [2, 0, 3, 1]):
                assert same(tensor, expected(model(), torch.bfloat16)[name])
            held.release(stage)
        held.close()


@pytest.mark.parametrize("device", [Cpu(), Late(4)], ids=["cpu", "late"])
@pytest.mark.parametrize("turns", ["experts", "pieces"])
def test_waits_amid_the_maths_are_loading(
    turns: str, device: Device, folder: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No piece is read before somebody is seen waiting for it, and the maths with it is not waiting any more."""
    stage, waiting = Stage("layer", 1) if turns == "experts" else Stage("head"), threading.Event()
    spans, read = list[str](), list[int]()

    @contextlib.contextmanager
    def span(phase: str) -> Iterator[None]:
        spans.append(phase)
        waiting.set()
        yield
        waiting.clear()
        assert len(read) >= len(spans), "nobody has waited"

    held = opened(folder, device, stages=[stage], streamed=IN_TURNS, span=span, moved=lambda size, _: read.append(size))
    w = held.acquire(stage)
    assert spans == [], "of the one who acquires"
    read.clear()
    plain, compute_waits = Shards.check, device.compute.wait

    def seen(self: Shards, entries: Any) -> None:
        assert waiting.wait(20)
        plain(self, entries)

    def wait(event: Event) -> None:
        assert waiting.is_set(), "the device waits as well"
        compute_waits(event)

    monkeypatch.setattr(Shards, "check", seen)
    monkeypatch.setattr(device.compute, "wait", wait)
    count = 0
    for _ in w.own.each(range(EXPERTS)) if turns == "experts" else w.pieces():
        assert not waiting.is_set()
        count += 1
    assert spans == ["load"] * count and count > 1
    held.close()


def cached(path: Path) -> int:
    """Pages of a file in the page cache."""
    with open(path, "rb") as file:
        room = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
    flags = (ctypes.c_ubyte * -(-len(room) // PAGE))()
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(room)), flags) == 0
    return sum(flag & 1 for flag in flags)


def forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def refuse_at_open(patch: pytest.MonkeyPatch, tries: list[int]) -> None:
    plain = os.open

    def refusing(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            tries.append(0)
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(path, flags, *rest)

    patch.setattr(os, "open", refusing)


def refuse_reads_after(count: int, patch: pytest.MonkeyPatch, tries: list[int]) -> None:
    plain, turn = os.preadv, itertools.count()

    def refusing(descriptor: int, parts: Any, start: int) -> int:
        if is_direct(descriptor) and next(turn) >= count:
            tries.append(start)
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(descriptor, parts, start)

    patch.setattr(os, "preadv", refusing)


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("device", [Cpu(), Late(9)], ids=["cpu", "late"])
def test_nothing_that_is_streamed_enters_the_page_cache(device: Device, folder: Path) -> None:
    found, path = open_layout(folder), folder / "model.safetensors"
    forget(path)
    before = cached(path)
    held = start(found, device, streamed=IN_TURNS)
    sweep(held, expected(model(), torch.bfloat16))
    held.close()
    assert cached(path) <= before < path.stat().st_size // PAGE // 2


@pytest.mark.parametrize("device", [Cpu(), Late(9)], ids=["cpu", "late"])
@pytest.mark.parametrize(
    "refuse",
    [refuse_at_open, partial(refuse_reads_after, 0), partial(refuse_reads_after, 3)],
    ids=["open", "read", "later"],
)
def test_what_is_not_read_past_the_page_cache_is_given_back(
    refuse: Callable[[pytest.MonkeyPatch, list[int]], None],
    device: Device,
    folder: Path,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[int] = []
    refuse(monkeypatch, tries)
    read, given_back = list[tuple[int, int]](), list[tuple[int, int]]()
    reads, advise = os.preadv, os.posix_fadvise

    def preadv(descriptor: int, parts: Any, start: int) -> int:
        got = reads(descriptor, parts, start)
        if not is_direct(descriptor):
            read.append((start, got))
        return got

    def fadvise(descriptor: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        given_back.append((start, size))
        advise(descriptor, start, size, advice)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    held = opened(folder, device, streamed=IN_TURNS)
    sweep(held, expected(model(), torch.bfloat16))
    held.close()
    assert read and sorted(read) == sorted(given_back)
    assert 1 <= len(tries) <= 2 * reading.READS, "each of two readers is refused once, in all that it is at"


def test_the_reader_leaves_the_cores_to_the_maths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the maths is on the same cores, and only in the reader's own threads."""
    before, counted = torch.get_num_threads(), list[int]()
    check = Shards.check

    def counting(self: Shards, entries: Any) -> None:
        counted.append(torch.get_num_threads())
        check(self, entries)

    monkeypatch.setattr(Shards, "check", counting)
    for device in (Cpu(), Late(0)):
        counted.clear()
        held = opened(folder, device, streamed=IN_TURNS)
        sweep(held, expected(model(), torch.bfloat16))
        held.close()
        assert set(counted) == {before if device.asynchronous else 1}
        assert torch.get_num_threads() == before


# --- on an accelerator ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loading", ["resident", "stream"])
def test_copies_that_come_late_change_nothing(loading: Loading, folder: Path, small: None) -> None:
    wanted = expected(model(), torch.float32)
    for seed in range(20):
        device = Late(seed)
        held = opened(
            folder,
            device,
            loading=loading,
            ring=1 + seed % 4,
            streamed=IN_TURNS if seed % 2 else frozenset(),
            dtype=torch.float32,
        )
        sweep(held, wanted)
        held.close()
        device.finish()


class Foreign(Tensor):
    """Memory that only the device can write."""

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert device memory to numpy")

    def copy_(self, *values: Any, **options: Any) -> Any:
        raise TypeError("copied by the caller")


class Apart(Late):
    """Its memory lies apart from RAM."""

    def memory(self, size: int) -> Tensor:
        return super().memory(size).as_subclass(Foreign)

    def copied(self, out: Tensor, source: Tensor) -> bool:
        assert isinstance(out, Foreign) and not isinstance(source, Foreign)
        return super().copied(out.as_subclass(Tensor), source)


@pytest.mark.parametrize("loading", ["resident", "stream"])
@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_only_copies_touch_the_memory_of_a_device(method: str, loading: Loading, tmp_path: Path, small: None) -> None:
    stored, meant = quantised(method)
    save(stored, tmp_path / "model.safetensors")
    rows = np.array([3, 50, 51])
    held = opened(tmp_path, Apart(11), QUANTISED[method], loading=loading, streamed=IN_TURNS, rows=rows)
    sweep(held, expected(meant, torch.bfloat16, rows))
    held.close()


def scenario(folder: Path, dtype: torch.dtype, streamed: frozenset[Stage]) -> Callable[[Late], None]:
    """A sweep in which the maths is under way whenever it can be; afterwards nothing is on its way."""
    wanted = expected(model(), dtype)

    def run(device: Late) -> None:
        def look(tensor: Tensor) -> Tensor:
            seen = tensor.clone()
            device.compute.record(tensor)  # and is not done with it yet
            return seen

        held = opened(folder, device, stages=STAGES * 2, streamed=streamed, dtype=dtype)
        try:
            for stage in STAGES * 2:
                w = held.acquire(stage)
                for name, tensor in shown(stage, w, [3, 0, 1, 2], look):
                    assert same(tensor, wanted[name])
                held.release(stage)
        finally:
            held.close()
        left = [stream for stream in device._streams if stream is not device.compute and stream.entries]
        assert not left, "copies are under way out of memory that was given back"
        device.finish()

    return run


@pytest.mark.parametrize("streamed", [frozenset(), IN_TURNS], ids=["whole", "turns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_wait_is_needed(dtype: torch.dtype, streamed: frozenset[Stage], folder: Path, small: None) -> None:
    run = scenario(folder, dtype, streamed)
    for seed in range(30):
        run(Late(seed))
    places = waits(run)
    assert {name for name, _ in places} == {
        "acquire",
        "load",
        "_next",
        "close",
        *(["each"] if streamed else []),
    }
    assert [place for place in sorted(places) if not fails(run, place)] == []


# --- what goes wrong ------------------------------------------------------------------------------------------------


def cut(path: Path, entry: str) -> None:
    """Shortens a file by the last byte of a tensor."""
    found = Checkpoint.open(path.parent).entries[entry]
    os.truncate(path, found.start + found.size - 1)


def alive() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("fpwap")}


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def clean() -> Iterator[None]:
    """Neither thread nor descriptor is left by the test."""
    before = descriptors()
    yield
    assert not alive()
    gc.collect()  # a map has a descriptor of its own for as long as somebody knows it
    assert len(descriptors()) <= len(before)


@pytest.mark.parametrize("loading", ["resident", "stream"])
@pytest.mark.parametrize("device", [Cpu(), Late(2)], ids=["cpu", "late"])
@pytest.mark.parametrize("streamed", [frozenset(), IN_TURNS], ids=["whole", "turns"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_truncated_file_is_named(
    layer: int, streamed: frozenset[Stage], device: Device, loading: Loading, folder: Path, clean: None
) -> None:
    """Between two stages, by the tensor that is cut off if the next one has it; what was read before is still good."""
    held = opened(folder, device, loading=loading, ring=1, streamed=streamed)
    w = held.acquire(STAGES[0])
    assert same(w.places, model()["places"])
    if device.asynchronous and loading == "resident":  # all of it is read at once
        held.close()
        return
    name = next(name for name in Checkpoint.open(folder).entries if name.startswith(f"layers.{layer}."))
    cut(folder / "model.safetensors", name)
    held.release(STAGES[0])
    named = f"{name} is cut off; " if layer == 0 else ""
    with pytest.raises(ModelError, match=f"model.safetensors was truncated while it was read: {named}download it"):
        held.acquire(STAGES[1])
    held.close()


@pytest.mark.parametrize("device", [Cpu(), Late(2)], ids=["cpu", "late"])
@pytest.mark.parametrize("stage", sorted(IN_TURNS, key=str))
def test_a_file_that_is_truncated_between_turns_is_named(
    stage: Stage, device: Device, folder: Path, clean: None
) -> None:
    held = opened(folder, device, stages=[stage], streamed=IN_TURNS)
    w = held.acquire(stage)
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(ModelError, match="was truncated while it was read"):
        for _ in w.pieces() if stage.kind == "head" else w.own.each([0, 1]):
            pass
    held.close()


def test_pages_of_a_map_are_read_no_longer_than_somebody_waits(folder: Path, clean: None) -> None:
    held = opened(folder, Cpu(), loading="resident")
    held.acquire(STAGES[0])
    found = held._recipes[STAGES[0]]
    maps, slot = weights._Maps(found, held._shards), found.parcel.fields["places"]
    assert maps.tensor(slot).shape == SHAPES["places"]
    held._shards.closing.set()
    with pytest.raises(reading.Closed):
        maps.tensor(slot)
    del maps
    held.close()


def test_a_file_that_ends_while_it_is_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, clean: None) -> None:
    monkeypatch.setattr(os, "preadv", lambda descriptor, parts, start: 0)
    held = opened(folder, Cpu())
    with pytest.raises(ModelError, match=r"model.safetensors ends at byte \d+: it was truncated while it was read"):
        held.acquire(STAGES[0])
    held.close()


def test_a_disk_error_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, clean: None) -> None:
    def broken(descriptor: int, parts: Any, start: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    held = opened(folder, Cpu())
    with pytest.raises(ModelError, match=r"model.safetensors cannot be read at byte \d+: Input/output error"):
        held.acquire(STAGES[0])
    held.close()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("call", ["fstat", "stat"])
def test_a_file_out_of_reach_is_named(
    call: str, number: int, folder: Path, monkeypatch: pytest.MonkeyPatch, clean: None
) -> None:
    """As on a network's disk that was taken away, or in a folder that was closed to us."""
    held = opened(folder, Cpu(), ring=1)
    held.acquire(STAGES[0])
    plain, path = getattr(os, call), folder / "model.safetensors"

    def broken(which: Any, **options: Any) -> os.stat_result:
        found: os.stat_result = plain(which, **options)
        if which == path or (isinstance(which, int) and os.path.samestat(found, path.lstat())):
            raise OSError(number, os.strerror(number))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        held.release(STAGES[0])
        with pytest.raises(ModelError, match=rf"model.safetensors can no longer be looked at: {os.strerror(number)};"):
            held.acquire(STAGES[1])
    held.close()


def test_a_file_that_cannot_be_mapped_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, clean: None) -> None:
    plain = mmap.mmap

    def full(descriptor: int, *rest: Any, **options: Any) -> mmap.mmap:
        if descriptor >= 0:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return plain(descriptor, *rest, **options)

    monkeypatch.setattr(mmap, "mmap", full)
    held = opened(folder, Cpu(), loading="resident")
    with pytest.raises(
        ModelError, match=r"model.safetensors cannot be mapped: Cannot allocate memory; loading='stream'"
    ):
        held.acquire(STAGES[0])
    held.close()


def test_a_disk_error_while_one_tensor_is_decoded_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: None
) -> None:
    def broken(descriptor: int, parts: Any, start: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    save(quantised("fp8")[0], tmp_path / "model.safetensors")
    decoded = Decoded(Checkpoint.open(tmp_path), QUANTISED["fp8"], torch.float32)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ModelError, match=r"model.safetensors cannot be read at byte \d+") as caught:
        decoded["head"]
    assert not alive(), f"{caught.value} keeps the reader alive, and the reader its threads"


@pytest.mark.parametrize("loading", ["resident", "stream"])
def test_a_replaced_file_is_named(loading: Loading, folder: Path, clean: None) -> None:
    held = opened(folder, Cpu(), loading=loading, ring=1)
    held.acquire(STAGES[0])
    save(model(), folder / "another")
    os.replace(folder / "another", folder / "model.safetensors")
    held.release(STAGES[0])
    with pytest.raises(ModelError, match=r"model.safetensors was replaced while it was read"):
        held.acquire(STAGES[1])
    held.close()


def test_a_removed_file_is_read_to_its_end(folder: Path, clean: None) -> None:
    held = opened(folder, Cpu(), ring=1)
    (folder / "model.safetensors").unlink()
    sweep(held, expected(model(), torch.bfloat16))
    held.close()


def test_a_shard_that_is_missing_is_named(folder: Path, clean: None) -> None:
    found = open_layout(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model.safetensors cannot be opened: No such file"):
        start(found, Cpu())


@pytest.mark.parametrize("device", [Cpu(), Late(2)], ids=["cpu", "late"])
@pytest.mark.parametrize("streamed", [frozenset(), IN_TURNS], ids=["whole", "turns"])
def test_closing_ends_a_read_under_way(
    streamed: frozenset[Stage], device: Device, folder: Path, monkeypatch: pytest.MonkeyPatch, clean: None
) -> None:
    """The reader is stuck in one read until `close` has begun, and then reads no more."""
    plain, begun, reads = os.preadv, threading.Event(), list[int]()

    def stuck(descriptor: int, parts: Any, start: int) -> int:
        reads.append(start)
        begun.set()
        assert held._shards.closing.wait(20)
        return plain(descriptor, parts, start)

    monkeypatch.setattr(reading, "CHUNK", PAGE)
    monkeypatch.setattr(os, "preadv", stuck)
    gate = threading.Event()
    check = Shards.check

    def waiting(self: Shards, entries: Any) -> None:
        assert gate.wait(20)
        check(self, entries)

    monkeypatch.setattr(Shards, "check", waiting)
    held = opened(folder, device, streamed=streamed)
    gate.set()
    assert begun.wait(20)
    held.close()
    held.close()
    assert 1 <= len(reads) <= reading.READS


class Stop(Exception):
    """The run is to stop."""


@pytest.mark.parametrize("device", [Cpu(), Late(2)], ids=["cpu", "late"])
@pytest.mark.parametrize("waited", ["stage", "expert", "piece"])
def test_one_who_waits_is_interrupted(
    waited: str, device: Device, folder: Path, monkeypatch: pytest.MonkeyPatch, clean: None
) -> None:
    """The disk answers no more before the weights are closed."""
    assert interrupt.PATIENCE <= 0.5
    monkeypatch.setattr(interrupt, "PATIENCE", 0.01)
    plain, asked, hangs = os.preadv, list[bool](), threading.Event()

    def hanging(descriptor: int, parts: Any, start: int) -> int:
        if hangs.is_set():
            assert held._shards.closing.wait(20)
        return plain(descriptor, parts, start)

    def check() -> None:
        asked.append(hangs.is_set())
        if asked.count(True) == 3:
            raise Stop

    if waited == "stage":
        hangs.set()
    monkeypatch.setattr(os, "preadv", hanging)
    opening = threading.Lock()  # until there is something to be closed
    shards_check = Shards.check

    def opened_first(self: Shards, entries: Any) -> None:
        with opening:
            shards_check(self, entries)

    monkeypatch.setattr(Shards, "check", opened_first)
    stage = {"stage": Stage("layer", 0), "expert": Stage("layer", 1), "piece": Stage("head")}[waited]
    with opening:
        held = opened(folder, device, stages=[stage], streamed=IN_TURNS, check=check)
    if waited == "stage":
        with pytest.raises(Stop):
            held.acquire(stage)
    else:
        w = held.acquire(stage)
        hangs.set()
        with pytest.raises(Stop):
            list(w.own.each([0]) if waited == "expert" else w.pieces())
    held.close()


@pytest.mark.parametrize("turns", ["experts", "pieces"])
def test_one_who_never_waits_is_interrupted(turns: str, folder: Path, small: None, clean: None) -> None:
    """Before each expert or piece, though all of them are there in time."""
    stage, to_stop = Stage("layer", 1) if turns == "experts" else Stage("head"), threading.Event()

    def check() -> None:
        if to_stop.is_set():
            raise Stop

    held = opened(folder, Cpu(), stages=[stage, stage], streamed=IN_TURNS, check=check)
    w = held.acquire(stage)
    some = w.own.each(range(EXPERTS)) if turns == "experts" else w.pieces()
    next(some)
    next(some)
    to_stop.set()
    with pytest.raises(Stop):
        next(some)
    held.release(stage)
    with pytest.raises(Stop):
        held.acquire(stage)
    held.close()


def test_a_timeout_of_the_disk_is_not_waited_for_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, clean: None
) -> None:
    def timed_out(self: Shards, entries: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(Shards, "check", timed_out)
    asked = itertools.count()

    def check() -> None:
        assert next(asked) < 100, "waits for what has failed"

    held = opened(folder, Cpu(), check=check)
    with pytest.raises(TimeoutError):
        held.acquire(STAGES[0])
    held.close()


def test_memory_that_cannot_be_had_is_counted_in_bytes() -> None:
    words = r"^1,152,921,504,606,846,976 bytes of memory cannot be had: Cannot allocate memory; give a smaller memory="
    for take in (Cpu().memory, Cpu().pinned):
        with pytest.raises(RequestError, match=words):
            take(1 << 60)


def test_a_kernel_without_large_pages_has_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(mmap, "mmap", Small)
    assert len(Cpu().memory(1 << 24)) == 1 << 24


def test_a_part_that_cannot_be_opened_leaves_nothing(folder: Path, clean: None) -> None:
    class Full(Cpu):
        def memory(self, size: int) -> Tensor:
            raise MemoryError

    with pytest.raises(MemoryError):
        opened(folder, Full())


def test_the_order_is_kept(folder: Path) -> None:
    held = opened(folder, Cpu())
    with pytest.raises(AssertionError, match="stages are acquired in order"):
        held.acquire(STAGES[1])
    held.close()


def test_bytes_beyond_two_gibibytes_are_found(tmp_path: Path) -> None:
    """In a file that is mostly a hole."""
    stored = model()
    path, hole = tmp_path / "model.safetensors", (1 << 32) + 40
    header, at = {"spare.0": {"dtype": "U8", "shape": [hole], "data_offsets": [0, hole]}}, hole
    for name, tensor in stored.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(hole, os.SEEK_CUR)
        for tensor in stored.values():
            file.write(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    for loading in ("stream", "resident"):
        held = opened(tmp_path, Cpu(), loading=loading)
        sweep(held, expected(stored, torch.bfloat16))
        held.close()
