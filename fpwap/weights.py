"""From safetensors shards to the weights of one stage at a time.

`Checkpoint` knows which tensor lies where: ``model.safetensors``, else the files that ``model.safetensors.index.json``
names, nothing else. `Layout` says which of them each stage of a family takes, after names and shapes were checked
against the headers, before a byte of a tensor is read. `Weights` reads stages in the order of the schedule, the next
ones on a thread while this one computes.

A tensor whose bits need no change (same dtype, on the CPU, aligned) is a map of the file and is never copied; any other
is read into a buffer that the ring of resident stages reuses, and cast once. The maths is not known here, only names.
"""

import json
import mmap
import os
import re
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from xxhash import xxh3_128

from archs.contract import Family, stored

from .errors import ModelError
from .schedule import Stage

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Stored dtypes that weights may have; others may lie in a file but cannot be claimed."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK = 1 << 28
"""Bytes of one read call: far below the 2 GiB at which one call stops short."""

SAMPLE, SAMPLES = 4096, 5
"""Bytes and number of the samples of each tensor by which a shard is told from another."""

# --- where tensors lie ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor: its shard, first byte and size in bytes."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder by name."""

    folder: Path
    entries: Mapping[str, Entry]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Reads the headers. Raises `ModelError` for missing, foreign or damaged files."""
        entries: dict[str, Entry] = {}
        shards, claimed = shard_names(folder)
        for shard in shards:
            for entry in _read_header(folder, shard):
                if claimed is None or claimed.get(entry.name) == shard:
                    entries[entry.name] = entry
        lost = sorted(set(claimed or ()) - set(entries))
        if lost:
            raise ModelError(f"{folder / INDEX} names tensors that its shards do not hold: {_some(lost)}")
        return cls(folder, entries)

    @property
    def shards(self) -> list[str]:
        return sorted({entry.shard for entry in self.entries.values()})

    def content(self) -> dict[str, str]:
        """shard -> what tells its content from another's.

        A hub cache's blob is named by its digest. Of any other file the size, the header and a sample of every tensor
        are hashed: a shard of many gigabytes is not read for this.
        """
        return {shard: self._content(self.folder / shard) for shard in self.shards}

    def _content(self, path: Path) -> str:
        blob = path.resolve()
        if path.is_symlink() and blob.parent.name == "blobs":
            return f"blob {blob.name}"
        digest = xxh3_128(str(path.stat().st_size).encode())
        with open(path, "rb") as file:
            for entry in self.entries.values():
                if entry.shard == path.name:
                    digest.update(repr(entry).encode())
                    for part in range(SAMPLES):
                        file.seek(entry.start + max(0, entry.size - SAMPLE) * part // (SAMPLES - 1))
                        digest.update(file.read(min(SAMPLE, entry.size)))
        return f"sampled {digest.hexdigest()}"

    def first_floating(self) -> torch.dtype | None:
        """The dtype of the first floating tensor, HF's rule for a config that names none."""
        return next((DTYPES[entry.dtype] for entry in self.entries.values() if entry.dtype in DTYPES), None)


def shard_names(folder: Path, *, present: bool = True) -> tuple[list[str], dict[str, str] | None]:
    """The shard files of a folder and, if there is an index, tensor name -> shard.

    present: they must be there. Raises `ModelError`.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE], None
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
        advice = f"; {pickles[0]} is a pickle and is never opened: convert it to safetensors first" if pickles else ""
        raise ModelError(f"{folder} holds neither {SINGLE} nor {INDEX}{advice}")
    try:
        claimed = json.loads((folder / INDEX).read_text())["weight_map"]
        names = sorted(set(claimed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / INDEX} is not an index of safetensors shards: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise ModelError(
                f"{folder / INDEX} names the shard {name!r}: shards are plain file names in the model folder"
            )
        if present and not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing; {INDEX} names it: download the model again")
    return names, claimed


def _read_header(folder: Path, shard: str) -> list[Entry]:
    path = folder / shard
    try:
        with safe_open(path, framework="pt"):  # checks sizes, offsets, overlaps and dtypes
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    header.pop("__metadata__", None)
    entries = [
        Entry(name, shard, info["dtype"], tuple(info["shape"]), 8 + length + begin, end - begin)
        for name, info in header.items()
        for begin, end in [info["data_offsets"]]
    ]
    return sorted(entries, key=lambda entry: entry.start)


# --- what each stage takes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Which stored tensor each field of each stage's weights class comes from."""

    classes: Mapping[Stage, type]
    sources: Mapping[Stage, Mapping[str, Entry]]

    def elements(self, stage: Stage) -> int:
        return sum(_count(entry.shape) for entry in self.sources[stage].values())

    def size(self, stage: Stage) -> int:
        """Bytes on disk."""
        return sum(entry.size for entry in self.sources[stage].values())


def lay_out(checkpoint: Checkpoint, family: Family, config: Any) -> Layout:
    """Claims every tensor of the checkpoint for a stage, or knows it as ignorable.

    A model without a head (a base-model checkpoint) has no "head" stage. Raises one `ModelError` with all that is
    missing, unclaimed or of another shape.
    """
    names = checkpoint.entries
    marks = [family.embedding, family.layer_prefix.format(i=0)]
    prefix = next((p for p in family.prefixes if any(n.startswith(p + mark) for n in names for mark in marks)), None)
    if prefix is None:
        raise ModelError(f"{checkpoint.folder} holds no {family.name} tensors, but {_some(sorted(names))}")

    tables = {Stage("embed"): (prefix, family.embed_weights), Stage("norm"): (prefix, family.norm_weights)}
    for layer in range(config.layers):
        below = prefix + family.layer_prefix.format(i=layer)
        tables[Stage("layer", layer)] = (below, family.layer_weights(config, layer))
    tables[Stage("head")] = ("", family.head_weights)

    embedding, head = prefix + family.embedding, family.head
    alias: dict[str, str] = {}
    if config.tied:  # a stored head wins over the tie, as in transformers 5; either name may be absent
        alias = {head: embedding} if head not in names else {embedding: head} if embedding not in names else {}
    elif head not in names:
        del tables[Stage("head")]

    problems: list[str] = []
    sources: dict[Stage, dict[str, Entry]] = {}
    for stage, (below, weights) in tables.items():
        sources[stage] = {}
        for field, src in stored(weights, config).items():
            name = alias.get(below + src.name, below + src.name)
            entry, shape = names.get(name), src.shape(config)
            words = " x ".join(f"{dim} {size}" for dim, size in zip(src.dims, shape, strict=True))
            if entry is None:
                problems.append(f"{name} is missing (expected {words})")
            elif entry.shape != shape:
                problems.append(f"{name} has shape {list(entry.shape)} where the config says {words}")
            elif entry.dtype not in DTYPES:
                problems.append(f"{name} is stored as {entry.dtype}, which is not supported")
            else:
                sources[stage][field] = entry
    claimed = {entry.name for table in sources.values() for entry in table.values()}
    ignored = re.compile(rf"(?:{'|'.join(map(re.escape, family.prefixes))})(?:{'|'.join(family.ignored) or '(?!)'})")
    unclaimed = sorted(n for n in set(names) - claimed if not ignored.fullmatch(n))
    if not problems and unclaimed:
        problems.append(f"tensors that {family.name} with this config does not have: {_some(unclaimed)}")
    if problems:
        raise ModelError(
            f"{checkpoint.folder} does not fit its config: {'; '.join(problems[:12])}{_more(problems, 12)}"
        )
    return Layout({stage: weights for stage, (_, weights) in tables.items()}, sources)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _more(items: Sequence[str], shown: int) -> str:
    return f"; and {len(items) - shown} more" if len(items) > shown else ""


def _some(names: Sequence[str], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


# --- reading --------------------------------------------------------------------------------------------------------


class Weights:
    """Hands out the weights of stages in a fixed order, reading ahead.

    stages: the order in which `acquire` will be called. resident: how many stages are held at once; one more is read
    ahead. What `acquire` returned is good until its `release`, no longer: buffers are reused. Failures of the reader
    thread come out of `acquire`. ``moved(bytes, seconds)`` is told of every stage read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        stages: Sequence[Stage],
        *,
        resident: int,
        dtype: torch.dtype,
        device: torch.device,
        moved: Callable[[int, float], None],
    ) -> None:
        self._folder, self._layout, self._dtype, self._device, self._moved = (
            checkpoint.folder,
            layout,
            dtype,
            device,
            moved,
        )
        self._files: dict[str, int] = {}
        self._waiting = deque(stages)
        self._reading: deque[tuple[Stage, Future[Any]]] = deque()
        self._buffers: deque[_Buffer] = deque(_Buffer() for _ in range(resident + 1))
        self._held: list[tuple[Stage, _Buffer]] = []
        for shard in {entry.shard for stage in stages for entry in layout.sources[stage].values()}:
            self._files[shard] = _open(checkpoint.folder / shard)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fpwap-weights")
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
        """Ends the thread and closes the files; maps that are still referenced stay valid."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        self._buffers.clear()
        self._held.clear()

    def _read_ahead(self) -> None:
        while self._waiting and self._buffers:
            stage, buffer = self._waiting.popleft(), self._buffers.popleft()
            self._held.append((stage, buffer))
            self._reading.append((stage, self._pool.submit(self._read, stage, buffer)))

    def _read(self, stage: Stage, buffer: "_Buffer") -> Any:
        started = time.perf_counter()
        entries = self._layout.sources[stage]
        copied = sum(_aligned(_count(e.shape)) for e in entries.values() if not self._maps(e))
        buffer.reserve(copied, self._dtype)
        with torch.no_grad():
            tensors = {field: self._tensor(entry, buffer) for field, entry in entries.items()}
        self._moved(self._layout.size(stage), time.perf_counter() - started)
        weights = self._layout.classes[stage]
        return weights(**{field.name: tensors.get(field.name) for field in fields(weights)})

    def _maps(self, entry: Entry) -> bool:
        same = DTYPES[entry.dtype] == self._dtype and self._device.type == "cpu"
        return same and entry.start % self._dtype.itemsize == 0

    def _tensor(self, entry: Entry, buffer: "_Buffer") -> Tensor:
        fd = self._files[entry.shard]
        if os.fstat(fd).st_size < entry.start + entry.size:
            raise ModelError(f"{self._folder / entry.shard} was truncated while it was read: {entry.name} is cut off")
        if self._maps(entry):
            os.posix_fadvise(fd, entry.start, entry.size, os.POSIX_FADV_WILLNEED)
            tensor = _map(fd, entry)
            tensor.view(torch.uint8).flatten()[:: mmap.PAGESIZE].max()  # the pages are read here, not in the maths
            return tensor
        out = buffer.take(entry.shape)
        raw = torch.empty(entry.size, dtype=torch.uint8)
        _read_exactly(fd, entry.start, raw.numpy().data, self._folder / entry.shard)
        out.copy_(raw.view(DTYPES[entry.dtype]).view(entry.shape))
        return out.to(self._device)


def _aligned(count: int) -> int:
    """Elements rounded up so that the next tensor begins at a multiple of 64 bytes: fp32 bits depend on it."""
    return -(-count // 64) * 64


class _Buffer:
    """One stage's worth of elements in the model's dtype, carved into tensors; grows to the largest stage it held."""

    def __init__(self) -> None:
        self._elements: Tensor | None = None
        self._used = 0

    def reserve(self, count: int, dtype: torch.dtype) -> None:
        self._used = 0
        if count and (self._elements is None or self._elements.numel() < count):
            self._elements = torch.empty(count, dtype=dtype)

    def take(self, shape: tuple[int, ...]) -> Tensor:
        assert self._elements is not None
        start, count = self._used, _count(shape)
        self._used += _aligned(count)
        return self._elements[start : start + count].view(shape)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"{path} cannot be opened: {error.strerror}") from error


def _map(fd: int, entry: Entry) -> Tensor:
    """The tensor as a private map of its part of the file; nobody writes, so its pages are the page cache's own."""
    skipped = entry.start % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(fd, skipped + entry.size, mmap.MAP_PRIVATE, offset=entry.start - skipped)
    flat = torch.frombuffer(pages, dtype=DTYPES[entry.dtype], count=_count(entry.shape), offset=skipped)
    return flat.view(entry.shape)


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
