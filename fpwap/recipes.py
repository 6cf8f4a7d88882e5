"""How a stage's fields are made from stored bytes, and where in its slot each lies: planned, before anything is read.

A field whose bytes serve as they lie is a *view*: of a map of the file, or of the slot into which its extents are read.
Any other is made from *strips*, stored bytes small enough for a staging buffer that become part of the field: copied,
cast, decoded, or some of their rows only. Strips go in *batches*, one staging buffer full.

Nothing is read here, no memory is taken, and no thread is known.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archs.contract import Source

from .checkpoint import STORED, Entry
from .device import PAGE
from .errors import ModelError
from .formats import fp8_blocks, mxfp4
from .parcels import Parcel, Piece, Slot
from .reading import Gathered, Span, gather, whole_pages

Way = Literal["map", "slot", "stage"]
"""Where views come from. map: the page cache. slot: read straight into the slot. stage: there are none, every byte goes
through a staging buffer, because slots are not in RAM."""
Make = Callable[[Sequence[Tensor], Tensor], None]
"""``make(stored bytes of each span, out)``: uint8, ``out`` aligned for its dtype."""

STAGE = 1 << 24
"""Bytes of a staging buffer, unless a single strip needs more."""
STAGINGS, CPU_STAGINGS = 4, 2
"""Staging buffers of an accelerator's reader: two are read into while others are on their way. In RAM two will do."""
STRIP = STAGE // 4
"""Bytes of a strip, read or made, unless one row of blocks has more."""
APART = 1 << 17
"""Bytes between two wanted rows that are read along: a disk reads them in the time that a read of its own costs."""
ROOM, DEVICE_ROOM = 64, 512
"""Tensors that are made begin at a multiple of this, as the allocators of RAM and of accelerators have it."""
VOCAB = "vocab"
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Place:
    """A field in its slot: its first byte, dtype and shape."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        return memory[self.start : self.start + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Strip:
    """``size`` bytes of the slot from ``start``, and what they are made of. make: None if they are a span's own."""

    spans: tuple[Span, ...]
    start: int
    size: int
    make: Make | None = None

    @property
    def room(self) -> int:
        """Of its spans in memory at most, wherever they begin."""
        return sum(whole_pages(span.size) + PAGE for span in self.spans)

    @property
    def made(self) -> int:
        """Of what it becomes, if that is not its own bytes."""
        return -(-self.size // ROOM) * ROOM if self.make else 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Strips that are read at once."""

    strips: tuple[Strip, ...]

    def gathered(self) -> Gathered:
        return gather([span for strip in self.strips for span in strip.spans])


@dataclass(frozen=True)
class Recipe:
    """How a parcel gets into its slot.

    places: of all its slots in their order; None for a map of the file. extents: read straight into the slot, each with
    its first byte there. batches: all else. size: bytes of the slot. read: bytes of tensors that are read.
    """

    parcel: Parcel
    places: tuple[Place | None, ...]
    extents: tuple[tuple[Span, int], ...]
    batches: tuple[Batch, ...]
    size: int
    read: int

    @property
    def room(self) -> int:
        """Bytes of a staging buffer that serves every batch, in whichever order strips lie in their files."""
        strips = [strip for batch in self.batches for strip in batch.strips]
        rooms = [[strip.room for strip in strips], [strip.made for strip in strips]]
        return whole_pages(max(min(sum(room), max(STAGE, *room)) if room else 0 for room in rooms))


def recipe(parcel: Parcel, dtype: torch.dtype, way: Way, rows: NDArray[np.int64] | None = None) -> Recipe:
    """For all of a parcel's slots. rows: of the vocabulary, ascending, None for all of it. Raises `ModelError`."""
    parts = _parts(parcel, rows)
    lies = [chosen is None and _serves(slot, dtype, way) for slot, chosen in parts]
    views = [slot for (slot, _), serves in zip(parts, lies, strict=True) if serves]
    laid = gather([Span(*slot.stretch) for slot in views] if way == "slot" else [])

    starts, size = iter(laid.starts), laid.size
    places: list[Place | None] = []
    strips: list[Strip] = []
    for (slot, chosen), serves in zip(parts, lies, strict=True):
        own = slot.dtype or dtype
        if serves:
            places.append(Place(next(starts), own, slot.shape) if way == "slot" else None)
        else:
            shape = slot.shape if chosen is None else (len(chosen), *slot.shape[1:])
            strips += _strips(slot, own, size) if chosen is None else _chosen(slot, own, chosen, size)
            places.append(Place(size, own, shape))
            size += _up(math.prod(shape) * own.itemsize, way)
    read = sum(span.size for strip in strips for span in strip.spans) + sum(slot.stretch[2] for slot in views)
    return Recipe(parcel, tuple(places), laid.extents, tuple(_batches(strips)), size, read)


def slot_size(parcel: Parcel, dtype: torch.dtype, way: Way, rows: int | None = None) -> int:
    """Bytes of its `recipe`'s slot at most, wherever tensors lie in their files. rows: how many of the vocabulary."""
    size = 0
    for slot, chosen in _parts(parcel, rows):
        shape = slot.shape if chosen is None else (chosen, *slot.shape[1:])
        own = math.prod(shape) * (slot.dtype or dtype).itemsize
        if way == "slot":  # as if it served
            size += whole_pages(own) + PAGE
        elif chosen is not None or not _serves(slot, dtype, way):
            size += _up(own, way)
    return size


def kind(parcel: Parcel, dtype: torch.dtype, way: Way) -> frozenset[Any]:
    """Equal for parcels that take as much memory, staging buffers included: which slots serve as they lie, what is
    stored of each and what is taken of that, and how many are so.
    """
    found = (
        (_serves(slot, dtype, way), *((p.values.dtype, p.values.shape, p.shape, p.rows) for p in slot.pieces))
        for slot in parcel.slots
    )
    return frozenset(Counter(found).items())


def kinds(parcels: Iterable[Parcel], dtype: torch.dtype, way: Way) -> list[Parcel]:
    """One of each kind. There may be thousands of experts."""
    found: dict[frozenset[Any], Parcel] = {}
    for parcel in parcels:
        found.setdefault(kind(parcel, dtype, way), parcel)
    return list(found.values())


def _parts(parcel: Parcel, rows: R | None) -> list[tuple[Slot, R | None]]:
    """A parcel's slots in their order; with those of the vocabulary the rows, if not all are wanted."""
    some = vocabulary(parcel) if rows is not None else frozenset()
    own = [(slot, rows if field in some else None) for field, slot in parcel.fields.items()]
    return [*own, *((slot, None) for slot in itertools.islice(parcel.slots, len(own), None))]


def _up(size: int, way: Way) -> int:
    """Bytes up to where the next tensor may begin."""
    multiple = DEVICE_ROOM if way == "stage" else ROOM
    return -(-size // multiple) * multiple


def vocabulary(parcel: Parcel) -> frozenset[str]:
    """The fields whose rows are the vocabulary's."""
    sources: dict[str, Source] = {
        f.name: f.metadata["source"] for f in fields(parcel.weights) if "source" in f.metadata
    }
    return frozenset(name for name in parcel.fields if name in sources and sources[name].dims[0] == VOCAB)


def without_experts(parcel: Parcel) -> Parcel:
    """Only what is read with the stage."""
    return Parcel(parcel.weights, parcel.fields, {})


def slices(parcel: Parcel, dtype: torch.dtype, size: int, multiple: int) -> list[Parcel]:
    """A head cut along the vocabulary: pieces of about ``size`` bytes, each but the last a multiple of so many rows."""
    cut = vocabulary(parcel)
    per_row = sum(math.prod(parcel.fields[name].shape[1:]) * dtype.itemsize for name in cut)
    multiple = math.lcm(multiple, *(_block(piece) for name in cut for piece in parcel.fields[name].pieces))
    rows = max(1, size // per_row // multiple) * multiple
    (whole,) = {parcel.fields[name].shape[0] for name in cut}
    return [
        Parcel(
            parcel.weights,
            {
                name: _sliced(slot, first, min(first + rows, whole)) if name in cut else slot
                for name, slot in parcel.fields.items()
            },
            {},
        )
        for first in range(0, whole, rows)
    ]


def _sliced(slot: Slot, first: int, stop: int) -> Slot:
    (piece,) = slot.pieces
    return Slot((_rows(piece, first, stop),), slot.dtype, slot.gathered)


def _rows(piece: Piece, first: int, stop: int) -> Piece:
    """Some rows as if they were a tensor; quantised ones from a whole row of blocks on."""
    if piece.format not in ("plain", "fp8") or piece.rows != 1:
        raise ModelError(f"{piece.values.name} is stored as {piece.values.dtype}, which cannot be read row by row")
    block = _block(piece)
    scales = None if piece.scales is None else _part(piece.scales, first // block, -(-stop // block))
    shape = (stop - first, *piece.shape[1:])
    return Piece(_part(piece.values, first, stop), shape, scales, quantised=piece.quantised)


def _part(entry: Entry, first: int, stop: int) -> Entry:
    row = entry.size // entry.shape[0]
    shape = (stop - first, *entry.shape[1:])
    return Entry(entry.name, entry.shard, entry.dtype, shape, entry.start + first * row, (stop - first) * row)


def _block(piece: Piece) -> int:
    """Rows that have scales in common."""
    return piece.quantised.block[0] if piece.format == "fp8" and piece.quantised and piece.quantised.block else 1


def _serves(slot: Slot, dtype: torch.dtype, way: Way) -> bool:
    return way != "stage" and slot.maps(dtype, torch.device("cpu"))


# --- strips ---------------------------------------------------------------------------------------------------------


def _strips(slot: Slot, dtype: torch.dtype, start: int) -> Iterator[Strip]:
    """All of a field, which begins at ``start``."""
    for piece in slot.pieces:
        match piece.format:
            case "plain":
                yield from _plain(piece, dtype, start)
            case "fp8":
                per = _rows_per_strip(piece, dtype)
                for first in range(0, piece.shape[0], per):
                    some = _rows(piece, first, min(first + per, piece.shape[0]))
                    row = math.prod(piece.shape[1:]) * dtype.itemsize
                    yield Strip(_spans(some), start + first * row, some.shape[0] * row, _making(some, dtype))
            case _:  # transposed as it is decoded: there are no parts that are bytes in a row on both sides
                yield Strip(_spans(piece), start, math.prod(piece.shape) * dtype.itemsize, _making(piece, dtype))
        start += math.prod(piece.shape) * dtype.itemsize


def _plain(piece: Piece, dtype: torch.dtype, start: int) -> Iterator[Strip]:
    (span,), stored = _spans(piece), STORED[piece.values.dtype]
    per, count = STRIP // max(stored.itemsize, dtype.itemsize), span.size // stored.itemsize
    for first in range(0, count, per):
        some = min(per, count - first)
        part = Span(span.shard, span.begin + first * stored.itemsize, some * stored.itemsize)
        yield Strip((part,), start + first * dtype.itemsize, some * dtype.itemsize, _making(piece, dtype))


def _chosen(slot: Slot, dtype: torch.dtype, rows: NDArray[np.int64], start: int) -> Iterator[Strip]:
    """Some rows of a field; rows that lie near each other in one read, in the order of the file."""
    (piece,) = slot.pieces
    per, row = _rows_per_strip(piece, dtype), piece.values.size // piece.values.shape[0]
    apart = (np.diff(rows) * row > APART) | (np.diff(rows // per) != 0)
    bounds = [0, *(np.flatnonzero(apart) + 1).tolist(), len(rows)]
    made = math.prod(piece.shape[1:]) * dtype.itemsize
    for begin, end in itertools.pairwise(bounds):
        first = int(rows[begin]) // _block(piece) * _block(piece)
        some = _rows(piece, first, int(rows[end - 1]) + 1)
        wanted = torch.from_numpy(rows[begin:end] - first)
        make = partial(_choose, _making(some, dtype), dtype, some.shape, wanted)
        yield Strip(_spans(some), start + begin * made, (end - begin) * made, make)


def _rows_per_strip(piece: Piece, dtype: torch.dtype) -> int:
    row = max(piece.values.size // piece.values.shape[0], math.prod(piece.shape[1:]) * dtype.itemsize)
    return max(1, STRIP // row // _block(piece)) * _block(piece)


def _spans(piece: Piece) -> tuple[Span, ...]:
    return tuple(Span(entry.shard, *entry.row(piece.row, piece.rows)) for entry in piece.stored)


def _batches(strips: Sequence[Strip]) -> Iterator[Batch]:
    """In the order of the files, as many strips at once as a staging buffer holds."""
    batch: list[Strip] = []
    read = made = 0
    for strip in sorted(strips, key=lambda strip: (strip.spans[0].shard, strip.spans[0].begin)):
        if batch and max(read + strip.room, made + strip.made) > STAGE:
            yield Batch(tuple(batch))
            batch, read, made = [], 0, 0
        batch.append(strip)
        read, made = read + strip.room, made + strip.made
    if batch:
        yield Batch(tuple(batch))


# --- what strips become ---------------------------------------------------------------------------------------------


def _making(piece: Piece, dtype: torch.dtype) -> Make | None:
    """How a piece's stored bytes become values of ``dtype``, rounded once; None if they are."""
    stored = STORED[piece.values.dtype]
    match piece.format:
        case "plain":
            return None if stored == dtype else partial(_cast, stored, dtype)
        case "fp8":
            assert piece.quantised is not None and piece.quantised.block is not None and piece.scales is not None
            return partial(
                _fp8, piece.shape, piece.scales.shape, STORED[piece.scales.dtype], piece.quantised.block, dtype
            )
        case "mxfp4":
            return partial(_mxfp4, piece.shape, dtype)
        case other:
            raise AssertionError(other)


def _cast(stored: torch.dtype, dtype: torch.dtype, raw: Sequence[Tensor], out: Tensor) -> None:
    out.view(dtype).copy_(_as(raw[0], stored))


def _fp8(
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    scale_dtype: torch.dtype,
    block: tuple[int, int],
    dtype: torch.dtype,
    raw: Sequence[Tensor],
    out: Tensor,
) -> None:
    values = _as(raw[0], torch.float8_e4m3fn).view(shape)
    fp8_blocks(values, _as(raw[1], scale_dtype).view(scale_shape), block, out.view(dtype).view(shape))


def _mxfp4(shape: tuple[int, ...], dtype: torch.dtype, raw: Sequence[Tensor], out: Tensor) -> None:
    width, height = shape
    blocks, exponents = raw[0].view(height, width // 32, 16), raw[1].view(height, width // 32)
    mxfp4(blocks, exponents, out.view(dtype).view(shape).t())


def _choose(
    make: Make | None, dtype: torch.dtype, shape: tuple[int, ...], wanted: Tensor, raw: Sequence[Tensor], out: Tensor
) -> None:
    """Makes all rows that were read, and keeps the wanted ones."""
    made = raw[0]
    if make is not None:
        made = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        make(raw, made)
    chosen = _as(made, dtype).view(shape)[wanted]
    out.view(dtype).view(chosen.shape).copy_(chosen)


def _as(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as values, which may have lain at any offset in their file."""
    return (raw if raw.storage_offset() % dtype.itemsize == 0 else raw.clone()).view(dtype)
