"""The weights of one stage at a time, read from the shards into a ring of slots.

A thread reads stages in the order of the schedule while the caller computes; a slot that is released takes the stage
whose turn it is. On the CPU a field whose bytes need no change is never copied: it is a view of a map of the file
(resident), or of the slot into which the file was read (stream). On an accelerator slots are slabs of its memory,
filled from pinned staging buffers on a stream of its own. What does not fit is read in turns, when the maths asks for
it: the experts of a layer one at a time, the head a piece of the vocabulary at a time.

The maths is not known here, nor how a folder is laid out: only which bytes each field takes (`fpwap.recipes`).
"""

import contextlib
import ctypes
import math
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archs.contract import Resident

from .checkpoint import FP8_SCALES, MXFP4, STORED, Checkpoint, Entry
from .device import Cpu, Device, Event
from .errors import ModelError
from .formats import Quantisation
from .interrupt import Check, at_work, patiently
from .parcels import Layout, Parcel, Piece, Slot
from .reading import CHUNK, Closed, Gathered, Reader, Reading, Shards
from .recipes import (
    CPU_STAGINGS,
    STAGINGS,
    Batch,
    Recipe,
    Way,
    kinds,
    recipe,
    slices,
    slot_size,
    without_experts,
)
from .schedule import Loading, Stage

Moved = Callable[[int, float], None]
Span = Callable[[str], contextlib.AbstractContextManager[object]]

PIECE, PIECE_ROWS = 96 << 20, 4096
"""Bytes of a piece of the head, about; and what its rows are a multiple of."""


class Weights:
    """Hands out the weights of stages in a fixed order, reading ahead.

    stages: the order in which `acquire` will be called. ring: how many stages are in memory at once, held ones and
    those being read; a resident model on an accelerator is there whole and read once. streamed: stages whose experts,
    or whose vocabulary, are read in turns, two in memory. rows: ascending ids of the vocabulary that the embedding is
    to hold, None for all. What `acquire` returned is good until its `release`, no longer. Failures of the reader come
    out of `acquire`, or of the iterator. ``moved(bytes, seconds)`` is told of everything read, by the thread that read
    it. check: raises if the run is to stop; asked before each stage and piece, and twice a second while one is waited
    for; after that only `close` is left. span: of a profile, "load" around the waits for what is read in turns, which
    come amid the maths. Raises `ModelError`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        stages: Sequence[Stage],
        *,
        loading: Loading,
        ring: int,
        streamed: frozenset[Stage],
        rows: NDArray[np.int64] | None,
        dtype: torch.dtype,
        device: Device,
        moved: Moved,
        check: Check = lambda: None,
        span: Span = contextlib.nullcontext,
    ) -> None:
        self._device, self._layout, self._dtype, self._moved, self._check = device, layout, dtype, moved, check
        self._way: Way = "stage" if device.asynchronous else "map" if loading == "resident" else "slot"
        self._kept = device.asynchronous and loading == "resident"
        self._order = list(dict.fromkeys(stages)) if self._kept else list(stages)
        self._read = 0
        self._reading: deque[tuple[Stage, Future[_Loaded]]] = deque()
        self._held: deque[tuple[Stage, _Slab]] = deque()
        self._everything: dict[Stage, Future[_Loaded]] = {}
        self._turns: _Turns | None = None
        self._streamed = streamed

        self._recipes = {stage: self._recipe(layout[stage], stage, rows) for stage in dict.fromkeys(stages)}
        turns = [parcel for stage in self._recipes for parcel in self._in_turns(layout[stage], stage)]
        shards = {e.shard for s in self._recipes for slot in layout[s].slots for p in slot.pieces for e in p.stored}
        count = len(self._order) if self._kept else ring
        sizes = [max((self._recipes[s].size for s in self._order[k::count]), default=0) for k in range(count)]
        room = max((found.room for found in self._recipes.values()), default=0)
        with contextlib.ExitStack() as opened:
            self._shards = Shards(checkpoint.folder, sorted(shards))
            opened.callback(self._shards.close)
            self._slabs = [_Slab(device, size) for size in sizes]
            self._loader = _Loader(self._shards, device, direct=loading == "stream", room=room)
            opened.callback(self._loader.close)
            if turns:
                self._turns = _Turns(self._shards, device, dtype, turns, moved, check, span)
                opened.callback(self._turns.close)
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="fpwap-weights", initializer=_threads(device))
            opened.callback(self._pool.shutdown, wait=True, cancel_futures=True)
            opened.callback(self._shards.closing.set)
            for _ in range(count):
                self._read_ahead()
            self._opened = opened.pop_all()

    def acquire(self, stage: Stage) -> Any:
        """The stage's weights, an instance of its weights class, or a `Head`; waits until they are read.

        On an accelerator the maths waits for them, not the caller.
        """
        if self._kept:
            loaded = patiently(self._everything[stage], self._check)
        else:
            expected, future = self._reading.popleft()
            assert stage == expected, f"stages are acquired in order: {expected}, not {stage}"
            loaded = patiently(future, self._check)
        self._device.compute.wait(loaded.ready)
        return loaded.weights

    def release(self, stage: Stage) -> None:
        """The stage is done with, in the order of `acquire`; another one may take its slot."""
        if self._kept:
            return
        held, slab = self._held.popleft()
        assert stage == held, f"stages are released in order: {held}, not {stage}"
        slab.used(self._device)
        self._read_ahead()

    def check_files(self) -> None:
        """After the last stage: maps were read amid the maths. Raises `ModelError` if a shard is another by now."""
        self._shards.check_all()

    def close(self) -> None:
        """Ends the threads, whatever they are at, and closes the files; maps that are still referenced stay valid."""
        self._opened.close()
        self._turns, self._slabs = None, []
        for held in (self._reading, self._held, self._everything):
            held.clear()

    def _read_ahead(self) -> None:
        if self._read == len(self._order):
            return
        stage, slab = self._order[self._read], self._slabs[self._read % len(self._slabs)]
        self._read += 1
        future = self._pool.submit(self._stage, stage, slab, slab.free)
        if self._kept:
            self._everything[stage] = future
        else:
            self._reading.append((stage, future))
            self._held.append((stage, slab))

    def _recipe(self, parcel: Parcel, stage: Stage, rows: NDArray[np.int64] | None) -> Recipe:
        if stage in self._streamed:
            parcel = Parcel(parcel.weights, {}, {}) if stage.kind == "head" else without_experts(parcel)
        return recipe(parcel, self._dtype, self._way, rows if stage.kind == "embed" else None)

    def _in_turns(self, parcel: Parcel, stage: Stage) -> Sequence[Parcel]:
        if stage not in self._streamed:
            return ()
        if stage.kind == "head":
            return slices(parcel, self._dtype, PIECE, PIECE_ROWS)
        return [expert for parcels in parcel.experts.values() for expert in parcels]

    def _stage(self, stage: Stage, slab: "_Slab", free: Event) -> "_Loaded":
        found = self._recipes[stage]
        with at_work(lambda: f"the weights of stage {stage.label} were read"):
            loaded = self._loader.load(found, slab.memory, free)
        whole, turns = self._layout[stage], self._turns
        weights: Any = loaded.weights
        if stage.kind == "head":
            weights = Head(weights, self._in_turns(whole, stage), turns)
        elif turns is not None and stage in self._streamed:
            handles = {field: Streamed(parcels, turns) for field, parcels in whole.experts.items()}
            weights = replace(weights, **handles)
        self._moved(found.read, loaded.seconds)
        return replace(loaded, weights=weights)


class Head:
    """The head's weights, whole or in pieces of the vocabulary."""

    def __init__(self, whole: Any, pieces: Sequence[Parcel], turns: "_Turns | None") -> None:
        self._whole, self._pieces, self._turns = whole, pieces, turns

    def pieces(self) -> Iterator[Any]:
        """In the order of the vocabulary; each is good until the next is asked for."""
        return iter((self._whole,)) if not self._pieces or self._turns is None else self._turns.each(self._pieces)


class Streamed:
    """A layer's experts, each read when its turn comes, the next one meanwhile (`archs.contract.Experts`)."""

    def __init__(self, parcels: Sequence[Parcel], turns: "_Turns") -> None:
        self._parcels, self._turns = parcels, turns

    def __len__(self) -> int:
        return len(self._parcels)

    def each(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        with contextlib.closing(self._turns.each([self._parcels[index] for index in wanted])) as weights:
            yield from zip(wanted, weights, strict=True)


class _Slab:
    """Memory of one slot. free: when what was last in it is done with; before that, whoever had the memory before."""

    def __init__(self, device: Device, size: int) -> None:
        self.memory = device.memory(size)
        self.used(device)

    def used(self, device: Device) -> None:
        """The maths has been given all that it does with the slot."""
        self.free = device.compute.record(self.memory)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An instance of a weights class. ready: when its tensors hold what they should. seconds: of reading and making."""

    weights: Any
    ready: Event
    seconds: float


class _Turns:
    """Parcels that are read one after the other into two slots, the next one while the caller computes with this one.

    One caller at a time, and one of its iterations at a time.
    """

    def __init__(
        self,
        shards: Shards,
        device: Device,
        dtype: torch.dtype,
        parcels: Sequence[Parcel],
        moved: Moved,
        check: Check,
        span: Span,
    ) -> None:
        self._device, self._dtype, self._moved, self._check, self._span = device, dtype, moved, check, span
        self._way: Way = "stage" if device.asynchronous else "slot"
        each = kinds(parcels, dtype, self._way)
        size = max(slot_size(parcel, dtype, self._way) for parcel in each)
        room = max(recipe(parcel, dtype, self._way).room for parcel in each)
        self._slabs = (_Slab(device, size), _Slab(device, size))
        self._loader = _Loader(shards, device, direct=True, room=room)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fpwap-turns", initializer=_threads(device))

    def each(self, parcels: Sequence[Parcel]) -> Generator[Any]:
        """Their weights, each good until the next is asked for."""
        ahead: deque[Future[_Loaded]] = deque()
        for turn in range(len(parcels) + 1):
            if turn < len(parcels):
                slab = self._slabs[turn % 2]
                ahead.append(self._pool.submit(self._read, parcels[turn], slab.memory, slab.free))
            if turn:
                with self._span("load"):
                    loaded = patiently(ahead.popleft(), self._check)
                    self._device.compute.wait(loaded.ready)
                try:
                    yield loaded.weights
                finally:
                    self._slabs[(turn - 1) % 2].used(self._device)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._loader.close()

    def _read(self, parcel: Parcel, memory: Tensor, free: Event) -> _Loaded:
        with at_work(lambda: f"{next(iter(parcel.slots)).pieces[0].values.name}, and what goes with it, was read"):
            found = recipe(parcel, self._dtype, self._way)
            loaded = self._loader.load(found, memory, free)
        self._moved(found.read, loaded.seconds)
        return loaded


class _Loader:
    """One thread's way from the shards into slots, on a stream of its own. room: bytes of a staging buffer."""

    def __init__(self, shards: Shards, device: Device, *, direct: bool, room: int) -> None:
        self._shards, self._device, self._waited = shards, device, 0.0
        self._reader, self._stream = Reader(shards, direct=direct), device.stream()
        count = STAGINGS if device.asynchronous else CPU_STAGINGS
        self._staging = deque(_Staging(device, room) for _ in range(count if room else 0))

    def load(self, found: Recipe, memory: Tensor, free: Event) -> _Loaded:
        """Fills a slot, once it is ``free``, and makes the weights that lie there. Raises `ModelError`, `Closed`."""
        started, self._waited = time.perf_counter(), 0.0
        wanted = [entry for slot in found.parcel.slots for p in slot.pieces for entry in p.stored]
        self._shards.check(wanted)
        self._stream.wait(free)
        straight = self._reader.begin(found.extents, memory)
        try:
            self._batches(found.batches, memory)
        finally:
            straight.wait()
        self._shards.check(wanted)
        maps = _Maps(found, self._shards)
        places = zip(found.parcel.slots, found.places, strict=True)
        tensors = (maps.tensor(slot) if place is None else place.of(memory) for slot, place in places)
        weights = _instance(found.parcel, tensors)
        return _Loaded(weights, self._stream.record(), time.perf_counter() - started - self._waited)

    def close(self) -> None:
        """Whatever is on its way arrives."""
        self._reader.close()
        self._stream.record().synchronize()
        self._staging.clear()

    def _batches(self, batches: Sequence[Batch], memory: Tensor) -> None:
        """One is read while what the one before becomes is made."""
        under_way: deque[tuple[Batch, Gathered, _Staging, Reading]] = deque()
        try:
            for batch in batches:
                staging, gathered = self._next(), batch.gathered()
                under_way.append((batch, gathered, staging, self._reader.begin(gathered.extents, staging.memory)))
                if len(under_way) == 2:
                    self._make(*under_way.popleft(), memory)
            while under_way:
                self._make(*under_way.popleft(), memory)
        finally:  # nobody may write into a buffer that is given out again
            for *_, reading in under_way:
                with contextlib.suppress(ModelError, Closed):
                    reading.wait()

    def _make(self, batch: Batch, gathered: Gathered, read: "_Staging", reading: Reading, memory: Tensor) -> None:
        reading.wait()
        made = self._next() if self._device.asynchronous and any(strip.make for strip in batch.strips) else None
        starts, used = iter(gathered.starts), 0
        for strip in batch.strips:
            out = memory[strip.start : strip.start + strip.size]
            raw = [read.memory[start : start + span.size] for span, start in zip(strip.spans, starts, strict=False)]
            if strip.make is None:
                self._stream.copy(out, raw[0])
            elif made is None:
                strip.make(raw, out)
            else:
                part = made.memory[used : used + strip.size]
                strip.make(raw, part)
                self._stream.copy(out, part)
                used += strip.made
        read.free = self._stream.record()
        if made is not None:
            made.free = read.free

    def _next(self) -> "_Staging":
        """A staging buffer from which all copies have been done; they wait for their slot, and so for the maths."""
        started = time.perf_counter()
        self._staging.rotate(-1)
        self._staging[0].free.synchronize()
        self._waited += time.perf_counter() - started
        return self._staging[0]


class _Staging:
    """RAM from which a device copies. free: when it has."""

    def __init__(self, device: Device, size: int) -> None:
        self.memory = device.pinned(size)
        self.free = device.compute.record()


class _Maps:
    """One private map of each shard's part that holds a stage's uncopied tensors, however many those are.

    Nobody writes, so the pages are the page cache's own; a tensor keeps its map alive.
    """

    def __init__(self, found: Recipe, shards: Shards) -> None:
        self._shards = shards
        self._parts: dict[str, tuple[int, int]] = {}
        self._maps: dict[str, mmap.mmap] = {}
        for slot, place in zip(found.parcel.slots, found.places, strict=True):
            if place is None:
                shard, begin, size = slot.stretch
                first, last = self._parts.get(shard, (begin, begin + size))
                self._parts[shard] = min(first, begin), max(last, begin + size)

    def tensor(self, slot: Slot) -> Tensor:
        dtype = STORED[slot.pieces[0].values.dtype]
        shard, begin, size = slot.stretch
        first, last = self._parts[shard]
        first -= first % mmap.ALLOCATIONGRANULARITY
        descriptor = self._shards.descriptor(shard)
        try:
            if shard not in self._maps:
                self._maps[shard] = mmap.mmap(descriptor, last - first, mmap.MAP_PRIVATE, offset=first)
            os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            raise ModelError(
                f"{self._shards.folder / shard} cannot be mapped: {error.strerror or error}; "
                "loading='stream' reads it without a map"
            ) from error
        raw = np.frombuffer(self._maps[shard], dtype=np.uint8, count=size, offset=begin - first)
        for start in range(0, size, CHUNK):  # the pages are read here, not in the maths
            if self._shards.closing.is_set():
                raise Closed
            raw[start : start + CHUNK : mmap.PAGESIZE].max()
        flat = torch.frombuffer(self._maps[shard], dtype=dtype, count=size // dtype.itemsize, offset=begin - first)
        return flat.view(slot.shape)


def _threads(device: Device) -> Callable[[], None]:
    """What a reader's thread begins with: only an accelerator leaves it the cores."""
    return (lambda: None) if device.asynchronous else _on_one_core


def _on_one_core() -> None:
    """Of this thread: what it decodes is done by itself.

    A second team of threads beside that of the maths takes turns with it on the same cores, and both wait spinning.
    """
    torch.get_num_threads()  # a thread's first question sets all cores
    with contextlib.suppress(AttributeError):  # another OpenMP than torch's own builds have
        ctypes.CDLL(None).omp_set_num_threads(1)


def _instance(parcel: Parcel, tensors: Iterator[Tensor]) -> Any:
    """Of the parcel's weights class, its experts resident; tensors: of all its slots, in their order."""
    values: dict[str, Any] = {field: next(tensors) for field in parcel.fields}
    for field, parcels in parcel.experts.items():
        values[field] = Resident([_instance(expert, tensors) for expert in parcels])
    return parcel.weights(**{field.name: values.get(field.name) for field in fields(parcel.weights)})


class Decoded(Mapping[str, Tensor]):
    """The tensors of a quantised checkpoint by the names that they would have unquantised, decoded when asked for.

    dtype: of what is decoded; tensors that are stored plainly keep their own.
    """

    def __init__(self, checkpoint: Checkpoint, quantised: Quantisation, dtype: torch.dtype) -> None:
        self._checkpoint, self._quantised, self._dtype = checkpoint, quantised, dtype
        values, scales = MXFP4
        companions = (FP8_SCALES, scales)
        self._names = [name.removesuffix(values) for name in checkpoint.entries if not name.endswith(companions)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        values, scales = self._checkpoint.look_up(name)
        if values is None:
            raise KeyError(name)
        slot, shape = self._slot(values, scales)
        found = recipe(Parcel(_One, {"tensor": slot}, {}), slot.dtype or self._dtype, "stage")
        device, memory = Cpu(), torch.empty(found.size, dtype=torch.uint8)
        with contextlib.ExitStack() as opened:
            shards = Shards(self._checkpoint.folder, {entry.shard for entry in slot.pieces[0].stored})
            opened.callback(shards.close)
            loader = _Loader(shards, device, direct=False, room=found.room)
            opened.callback(loader.close)
            tensor: Tensor = loader.load(found, memory, device.compute.record()).weights.tensor
        return tensor.view(shape)

    def _slot(self, values: Entry, scales: Entry | None) -> tuple[Slot, tuple[int, ...]]:
        """The tensor as a field, and its shape; of a stack of mxfp4 matrices each is a piece."""
        if scales is None:
            return Slot((Piece(values, values.shape),), STORED[values.dtype]), values.shape
        if values.dtype != "U8":
            return Slot((Piece(values, values.shape, scales, quantised=self._quantised),)), values.shape
        *stack, height, groups, _ = values.shape
        shape, rows = (2 * 16 * groups, height), math.prod(stack)
        pieces = (Piece(values, shape, scales, row, rows, self._quantised) for row in range(rows))
        return Slot(tuple(pieces)), (*stack, *shape)


@dataclass(frozen=True)
class _One:
    """A weights class of one tensor."""

    tensor: Tensor
