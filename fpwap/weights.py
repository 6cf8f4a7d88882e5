"""The weights of one stage at a time, read from the shards.

`Weights` reads stages in the order of the schedule, the next ones on a thread while this one computes. A field whose
bytes need no change (same dtype, on the CPU, aligned, its pieces side by side) is a map of the file, never a copy; any
other is read into a buffer that the ring of resident stages reuses, decoded and cast once. The experts of a layer
are read with it, or, where the plan says that they do not fit, one at a time when the maths asks for them.

The maths is not known here, nor how a folder is laid out: only which bytes each field takes.
"""

import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archs.contract import Resident

from .checkpoint import FP8_SCALES, MXFP4, STORED, Checkpoint, Entry, Layout, Parcel, Piece, Slot, aligned
from .errors import ModelError
from .formats import Quantisation, fp8_blocks, mxfp4
from .schedule import Stage

CHUNK = 1 << 28
"""Bytes of one read call: far below the 2 GiB at which one call stops short."""
STRIP = 1 << 24
"""Elements that are read and cast at once."""


class Weights:
    """Hands out the weights of stages in a fixed order, reading ahead.

    stages: the order in which `acquire` will be called. resident: how many stages are held at once; one more is read
    ahead. stream_experts: read experts when they are asked for, two at a time in memory. What `acquire` returned is
    good until its `release`, no longer: buffers are reused. Failures of the reader thread come out of `acquire`.
    ``moved(bytes, seconds)`` is told of everything read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        stages: Sequence[Stage],
        *,
        resident: int,
        stream_experts: bool,
        dtype: torch.dtype,
        device: torch.device,
        moved: Callable[[int, float], None],
    ) -> None:
        self._layout, self._stream, self._moved = layout, stream_experts, moved
        self._files = _Files(checkpoint.folder, dtype, device)
        self._waiting = deque(stages)
        self._reading: deque[tuple[Stage, Future[Any]]] = deque()
        self._buffers: deque[_Buffer] = deque(_Buffer() for _ in range(resident + 1))
        self._held: list[tuple[Stage, _Buffer]] = []
        shards = {
            entry.shard for s in set(stages) for slot in layout[s].slots for p in slot.pieces for entry in p.stored
        }
        for shard in sorted(shards):
            self._files.open(shard)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fpwap-weights")
        self._experts = ThreadPoolExecutor(1, thread_name_prefix="fpwap-experts")
        self._turns = (_Buffer(), _Buffer())
        self._read_ahead()

    def acquire(self, stage: Stage) -> Any:
        """The stage's weights, an instance of its weights class; waits until they are read."""
        expected, future = self._reading.popleft()
        assert stage == expected, f"stages are acquired in order: {expected}, not {stage}"
        return future.result()

    def release(self, stage: Stage) -> None:
        """The stage is done with: its buffer goes to the next stage to be read."""
        held = next(index for index, (name, _) in enumerate(self._held) if name == stage)
        self._buffers.append(self._held.pop(held)[1])
        self._read_ahead()

    def close(self) -> None:
        """Ends the threads and closes the files; maps that are still referenced stay valid."""
        for pool in (self._pool, self._experts):
            pool.shutdown(wait=True, cancel_futures=True)
        self._files.close()
        self._buffers.clear()
        self._held.clear()

    def _read_ahead(self) -> None:
        while self._waiting and self._buffers:
            stage, buffer = self._waiting.popleft(), self._buffers.popleft()
            self._held.append((stage, buffer))
            self._reading.append((stage, self._pool.submit(self._stage, stage, buffer)))

    def _stage(self, stage: Stage, buffer: "_Buffer") -> Any:
        started, parcel = time.perf_counter(), self._layout[stage]
        streamed = self._stream and bool(parcel.experts)
        with torch.no_grad():
            weights = self._files.read(parcel, buffer, self._handles if streamed else None)
        self._moved(parcel.own_size if streamed else parcel.size, time.perf_counter() - started)
        return weights

    def _handles(self, parcels: Sequence[Parcel]) -> "Streamed":
        return Streamed(parcels, self._files, self._experts, self._turns, self._moved)


class Streamed:
    """A layer's experts, each read when its turn comes, the next one meanwhile (`archs.contract.Experts`).

    buffers: of all layers, as one layer is iterated at a time.
    """

    def __init__(
        self,
        parcels: Sequence[Parcel],
        files: "_Files",
        pool: ThreadPoolExecutor,
        buffers: "tuple[_Buffer, _Buffer]",
        moved: Callable[[int, float], None],
    ) -> None:
        self._parcels, self._files, self._pool, self._moved = parcels, files, pool, moved
        self._buffers = buffers

    def __len__(self) -> int:
        return len(self._parcels)

    def each(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        ahead: deque[Future[Any]] = deque()
        try:
            for turn in range(len(wanted) + 1):
                if turn < len(wanted):
                    ahead.append(self._pool.submit(self._read, wanted[turn], self._buffers[turn % 2]))
                if turn:
                    yield wanted[turn - 1], ahead.popleft().result()
                if turn > 1:  # the last one is still in the caller's hands
                    self._files.forget(self._parcels[wanted[turn - 2]])
        finally:  # nobody may write into a buffer that is given out again
            wait(ahead)

    def _read(self, index: int, buffer: "_Buffer") -> Any:
        started, parcel = time.perf_counter(), self._parcels[index]
        with torch.no_grad():
            weights = self._files.read(parcel, buffer)
        self._moved(parcel.size, time.perf_counter() - started)
        return weights


class _Files:
    """The open shards of a checkpoint, and how a weights class is filled from them."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._folder, self._dtype, self._device = folder, dtype, device
        self._open: dict[str, int] = {}

    def open(self, shard: str) -> None:
        path = self._folder / shard
        try:
            if shard not in self._open:
                self._open[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(f"{path} cannot be opened: {error.strerror}") from error

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def forget(self, parcel: Parcel) -> None:
        """The page cache need not keep what this parcel was read from."""
        for slot in parcel.slots:
            for piece in slot.pieces:
                for entry in piece.stored:
                    begin, size = entry.row(piece.row, piece.rows)
                    os.posix_fadvise(self._open[entry.shard], begin, size, os.POSIX_FADV_DONTNEED)

    def read(self, parcel: Parcel, buffer: "_Buffer", handle: Callable[[Sequence[Parcel]], Any] | None = None) -> Any:
        """An instance of the parcel's class. handle: makes the handle to experts that are not read now."""
        buffer.reserve(parcel.copied(self._dtype, self._device, experts=handle is None))
        slots = parcel.slots if handle is None else parcel.fields.values()
        maps = _Maps([slot for slot in slots if slot.maps(self._dtype, self._device)], self._open)
        return self._fill(parcel, buffer, maps, handle)

    def _fill(
        self, parcel: Parcel, buffer: "_Buffer", maps: "_Maps", handle: Callable[[Sequence[Parcel]], Any] | None = None
    ) -> Any:
        values: dict[str, Any] = {field: self._tensor(slot, buffer, maps) for field, slot in parcel.fields.items()}
        for field, parcels in parcel.experts.items():
            if handle is None:
                values[field] = Resident([self._fill(expert, buffer, maps) for expert in parcels])
            else:
                values[field] = handle(parcels)
        return parcel.weights(**{field.name: values.get(field.name) for field in fields(parcel.weights)})

    def _tensor(self, slot: Slot, buffer: "_Buffer", maps: "_Maps") -> Tensor:
        dtype = slot.dtype or self._dtype
        for piece in slot.pieces:
            for entry in piece.stored:
                if os.fstat(self._open[entry.shard]).st_size < entry.start + entry.size:
                    raise ModelError(
                        f"{self._folder / entry.shard} was truncated while it was read: {entry.name} is cut off"
                    )
        if slot.maps(self._dtype, self._device):
            return maps.tensor(slot, dtype)
        out = buffer.take(aligned(slot, self._dtype), dtype, slot.shape)
        for piece, part in zip(slot.pieces, out.chunk(len(slot.pieces)), strict=True):
            if piece.format == "plain":
                self._cast(piece, part.view(-1))
            else:
                _decode(piece, [self.raw(entry, piece) for entry in piece.stored], part)
        return out.to(self._device)

    def _cast(self, piece: Piece, out: Tensor) -> None:
        """Plain values into ``out [elements]``, a strip at a time."""
        entry = piece.values
        begin, _ = entry.row(piece.row, piece.rows)
        stored = STORED[entry.dtype]
        for first in range(0, len(out), STRIP):
            part = out[first : first + STRIP]
            raw = torch.empty(len(part) * stored.itemsize, dtype=torch.uint8)
            start = begin + first * stored.itemsize
            _read_exactly(self._open[entry.shard], start, raw.numpy().data, self._folder / entry.shard)
            part.copy_(raw.view(stored))

    def raw(self, entry: Entry, piece: Piece) -> Tensor:
        """The stored values of one piece."""
        begin, size = entry.row(piece.row, piece.rows)
        raw = torch.empty(size, dtype=torch.uint8)
        _read_exactly(self._open[entry.shard], begin, raw.numpy().data, self._folder / entry.shard)
        shape = entry.shape if piece.rows == 1 else entry.shape[1:]
        return raw.view(STORED[entry.dtype]).view(shape)


def _decode(piece: Piece, stored: Sequence[Tensor], out: Tensor) -> None:
    """Writes a piece's values as they are computed with; one rounding, to the dtype of ``out``."""
    match piece.format:
        case "fp8":
            assert piece.quantised is not None and piece.quantised.block is not None
            fp8_blocks(stored[0], stored[1], piece.quantised.block, out)
        case "mxfp4":
            mxfp4(stored[0], stored[1], out.t())
        case other:
            raise AssertionError(other)


class _Buffer:
    """The bytes of one stage's copied tensors, carved up as they come; grows to the largest stage it held."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def reserve(self, size: int) -> None:
        self._used = 0
        if self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)

    def take(self, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        start, self._used = self._used, self._used + size
        count = torch.Size(shape).numel()
        return self._bytes[start : start + count * dtype.itemsize].view(dtype).view(shape)


class _Maps:
    """One private map of each shard's part that holds a stage's uncopied tensors, however many those are.

    Nobody writes, so the pages are the page cache's own; a tensor keeps its map alive.
    """

    def __init__(self, slots: Sequence[Slot], files: Mapping[str, int]) -> None:
        self._files = files
        self._parts: dict[str, tuple[int, int]] = {}
        self._maps: dict[str, mmap.mmap] = {}
        for slot in slots:
            shard, begin, size = slot.stretch
            first, last = self._parts.get(shard, (begin, begin + size))
            self._parts[shard] = min(first, begin), max(last, begin + size)

    def tensor(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        shard, begin, size = slot.stretch
        first, last = self._parts[shard]
        first -= first % mmap.ALLOCATIONGRANULARITY
        fd = self._files[shard]
        if shard not in self._maps:
            self._maps[shard] = mmap.mmap(fd, last - first, mmap.MAP_PRIVATE, offset=first)
        os.posix_fadvise(fd, begin, size, os.POSIX_FADV_WILLNEED)
        flat = torch.frombuffer(self._maps[shard], dtype=dtype, count=size // dtype.itemsize, offset=begin - first)
        flat.view(torch.uint8)[:: mmap.PAGESIZE].max()  # the pages are read here, not in the maths
        return flat.view(slot.shape)


def _read_exactly(fd: int, start: int, out: memoryview, path: Path) -> None:
    """Fill ``out`` from byte ``start``, however short the single reads are."""
    done = 0
    while done < len(out):
        try:
            got = os.preadv(fd, [out[done : done + CHUNK]], start + done)
        except OSError as error:
            raise ModelError(f"{path} cannot be read at byte {start + done}: {error.strerror}") from error
        if got == 0:
            raise ModelError(f"{path} ends at byte {start + done}: it was truncated while it was read")
        done += got


class Decoded(Mapping[str, Tensor]):
    """The tensors of a quantised checkpoint by the names that they would have unquantised, decoded when asked for.

    dtype: of what is decoded; tensors that are stored plainly keep their own.
    """

    def __init__(self, checkpoint: Checkpoint, quantised: Quantisation, dtype: torch.dtype) -> None:
        self._checkpoint, self._quantised, self._dtype = checkpoint, quantised, dtype
        values, scales = MXFP4
        companions = [name for name in checkpoint.entries if name.endswith((FP8_SCALES, scales))]
        self._names = [name.removesuffix(values) for name in checkpoint.entries if name not in companions]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        values, scales = self._checkpoint.look_up(name)
        if values is None:
            raise KeyError(name)
        files = _Files(self._checkpoint.folder, self._dtype, torch.device("cpu"))
        piece = Piece(values, values.shape, scales, quantised=self._quantised)
        try:
            for entry in piece.stored:
                files.open(entry.shard)
            stored = [files.raw(entry, piece) for entry in piece.stored]
        finally:
            files.close()
        if piece.format == "plain":
            return stored[0]
        if piece.format == "fp8":
            out = torch.empty(values.shape, dtype=self._dtype)
            _decode(piece, stored, out)
            return out
        experts, height, groups, _ = values.shape
        out = torch.empty(experts, 2 * 16 * groups, height, dtype=self._dtype)
        for blocks, exponents, own in zip(*stored, out, strict=True):
            _decode(piece, [blocks, exponents], own)
        return out
