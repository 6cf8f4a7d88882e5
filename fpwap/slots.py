"""The files that a run goes on from: the residual stream of a moment, in blocks of rows that were hashed as they came.

Two slots per tensor, by turns. A residual store on disk reads and writes them itself (`fpwap.residual.OnDisk`);
`Copies` fills them from memory by a thread while the maths goes on. `read_back` compares what it reads with what was
saved.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import thread_time
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128, xxh3_128_digest, xxh3_128_hexdigest

from .device import Device, Event, Room
from .errors import StoreError
from .files import File, bytes_of, sync_folder
from .folder import BEGIN_AGAIN
from .interrupt import Check, patiently

PIECE = 1 << 24
"""Bytes, about, that are copied and hashed at once of what lies in memory."""
WHAT = "the residual stream's file "
Saved = Mapping[str, Any]
"""JSON. reading: the side, 0 or 1, that is read next. files: of each its tensor, side, name, bytes, the row at which
each block ends, and the xxh3_128 over their 16-byte xxh3_128 digests."""

Blocks = dict[int, tuple[int, bytes]]
"""Of the rows from one on: where the block ends, and its digest."""


@dataclass(frozen=True)
class Slot:
    """A file that holds one tensor's rows."""

    file: File
    tensor: str
    side: int

    def words(self, blocks: Blocks) -> dict[str, Any]:
        """What `Saved` says of it."""
        digest = xxh3_128_hexdigest(b"".join(blocks[start][1] for start in sorted(blocks)))
        ends = [blocks[start][0] for start in sorted(blocks)]
        assert sorted(blocks) == [0, *ends[:-1]], "blocks follow each other"
        file = {"file": f"{self.file.path.parent.name}/{self.file.path.name}", "bytes": self.file.needed}
        return {"tensor": self.tensor, "side": self.side, **file, "ends": ends, "digest": digest}


def read_back(
    file: File, words: Mapping[str, Any], row: int, check: Check
) -> Iterator[tuple[slice, memoryview, bytes]]:
    """A saved file's blocks: rows, bytes, digest; in the end compared with what was saved. row: bytes."""
    digest, start = xxh3_128(), 0
    for stop in words["ends"]:
        check()
        block = memoryview(bytearray((stop - start) * row))
        file.read(block, start * row)
        own = xxh3_128_digest(block)
        digest.update(own)
        yield slice(start, stop), block, own
        start = stop
    if digest.hexdigest() != words["digest"]:
        raise StoreError(f"{WHAT}{file.path} is not what the run wrote: its digest differs; {BEGIN_AGAIN}")


class Copies:
    """Tensors in memory, copied to two files each by turns. near: the thread reaches their bytes as they lie."""

    def __init__(
        self, tensors: Mapping[str, Tensor], device: Device, folder: Path, check: Check, *, near: bool
    ) -> None:
        self._tensors, self._folder, self._check = tensors, folder, check
        self._stream, self._room = device.stream(), None if near else Room(device.pinned)
        self._thread: ThreadPoolExecutor | None = None
        self._files: dict[tuple[str, int], File] = {}
        self._side = 1
        self._coming: deque[tuple[slice, Future[tuple[bytes, float]]]] = deque()

    def begin(self, first: int, ready: Event) -> Callable[[], tuple[Saved, float]]:
        """Copies all rows, those from ``first`` on before the others. ready: when what is to be copied is there."""
        assert all(job.done() for _, job in self._coming)
        self._coming.clear()
        side, names, blocks = 1 - self._side, list(self._tensors), []
        for name, tensor in self._tensors.items():
            count = max(1, PIECE // max(1, tensor[:1].nbytes))
            starts = range(0, len(tensor), count)
            ahead = first // count
            for start in (*starts[ahead:], *starts[:ahead]):
                rows = slice(start, min(start + count, len(tensor)))
                job = self._pool().submit(self._copy, name, side, rows, ready)
                self._coming.append((rows, job))
                blocks.append((name, rows, job))

        def finish() -> tuple[Saved, float]:
            files = []
            for name in names:
                found = {rows.start: (rows.stop, job.result()[0]) for of, rows, job in blocks if of == name}
                self._files[name, side].sync()
                files.append(Slot(self._files[name, side], name, side).words(found))
            sync_folder(self._folder)
            self._side = side
            return {"reading": side, "files": files}, sum(job.result()[1] for *_, job in blocks)

        return finish

    def before(self, rows: slice) -> None:
        """Waits until these rows have been copied."""
        while self._coming and self._coming[0][1].done():
            self._coming.popleft()[1].result()
        for of, job in self._coming:
            if of.start < rows.stop and rows.start < of.stop:
                patiently(job, self._check)

    def restore(self, saved: Saved) -> None:
        self._side = saved["reading"]
        for words in saved["files"]:
            tensor = self._tensors[words["tensor"]]
            row = tensor[:1].nbytes
            file = self._file(words["tensor"], words["side"])
            for rows, block, _ in read_back(file, words, row, self._check):
                tensor[rows].copy_(torch.frombuffer(block, dtype=tensor.dtype).view(-1, *tensor.shape[1:]))

    def give_up(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        self.give_up()
        for file in self._files.values():
            file.close()
        self._coming.clear()
        self._files.clear()

    def _pool(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="fpwap-residual-save")
        return self._thread

    def _file(self, name: str, side: int) -> File:
        if (name, side) not in self._files:
            self._files[name, side] = File.kept(path_of(self._folder, name, side), self._tensors[name].nbytes, WHAT)
            self._files[name, side].reserve()
        return self._files[name, side]

    def _copy(self, name: str, side: int, rows: slice, ready: Event) -> tuple[bytes, float]:
        """On the thread: the rows' digest, and how long it was busy."""
        began = thread_time()
        values = self._tensors[name][rows]
        if self._room is None:
            ready.synchronize()
        else:
            values, source = self._room.take(values.shape, values.dtype), values
            self._stream.wait(ready)
            self._stream.copy(values, source)
            self._stream.record(values, source).synchronize()
        view = bytes_of(values)
        self._file(name, side).write(view, rows.start * self._tensors[name][:1].nbytes)
        return xxh3_128_digest(view), thread_time() - began


def path_of(folder: Path, name: str, side: int) -> Path:
    return folder / f"{name}.{'ab'[side]}"
