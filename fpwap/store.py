"""The outputs of a run on disk: plain safetensors files in input order, complete or not there.

`Store.open`, then for every output `declare`, `write` (any order of prompts), `commit`; artifacts in between; `finish`
writes the manifest, without which a folder is no result. A file is made as ``*.partial`` with its header first and its
full size reserved, rows go in place by ``pwrite`` (never through a memory map, which kills the interpreter on a full
disk), and the file gets its name when all of it has reached the disk.

`state` says what a run that goes on later needs of the outputs that are open, `save` takes them to the disk as they
are, and `restore` opens them again.

The digest of an output is xxh3_128 over the 16-byte xxh3_128 digests of its prompts in input order, so rows are hashed
as they come and never read again; that of any other file is xxh3_128 of its bytes.

What is committed reaches the disk on a thread: a file is synced and named while the next layer is computed, since the
disk may be busy reading weights. `settle` waits for it, and `finish` does before the manifest.

The module does not know where values come from, in which order prompts are computed, or what a run's identity is.
"""

import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128, xxh3_128_digest, xxh3_128_hexdigest

from .errors import CallbackError, StoreError, reported
from .files import PARTIAL, File, as_json, bytes_of, sealed, sync_folder
from .folder import FORMAT, FORMAT_VERSION, MANIFEST, PROMPTS, REQUEST
from .interrupt import Check, patiently

if TYPE_CHECKING:
    from .callbacks.base import LayerArtifact, Site

GRACE = 2.0
"""Seconds that a store which is closed waits for the disk."""
WAITING = 32
"""Files that wait for the disk at most: each holds a descriptor."""
Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> dtype and shape, of one safetensors file."""

_WORDS = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.complex64: "C64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""torch's dtype -> safetensors' word for it."""

# --- layout: what lies where, known before the first value ----------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A safetensors file: its first bytes, the byte at which each tensor begins, in file order, and its size."""

    header: bytes
    starts: dict[str, int]
    size: int


def layout(tensors: Tensors, where: str) -> Layout:
    """The file that holds these tensors; widest elements first, so that each tensor is aligned. where: for errors."""
    words: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        if dtype not in _WORDS:
            raise CallbackError(f"{where}: safetensors files cannot hold {dtype} ({name!r}); use another dtype")
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        words[name] = {"dtype": _WORDS[dtype], "shape": shape, "data_offsets": (starts[name], end)}
    text = json.dumps(words, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, {name: len(header) + start for name, start in starts.items()}, len(header) + end)


def prompt_tensors(prompts: int, tokens: int) -> Tensors:
    """What ``prompts.safetensors`` holds: the token ids of all prompts in input order, and where each begins."""
    return {"ids": (torch.int32, (tokens,)), "offsets": (torch.int64, (prompts + 1,))}


@dataclass(frozen=True)
class Record:
    """One output. rest: shape behind ``[prompts]`` (per "prompt") or ``[tokens]`` (per "token")."""

    layer: int | None
    hook: str
    name: str | None
    per: Literal["prompt", "token"]
    rest: tuple[int, ...]
    dtype: torch.dtype

    @property
    def site(self) -> "Site":
        return self.layer, self.hook

    @property
    def file(self) -> str:
        return _file("activations", self.layer, self.hook, self.name)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Record":
        """From what `about` said of it."""
        dtype = getattr(torch, entry["dtype"])
        return cls(entry["layer"], entry["hook"], entry["name"], entry["per"], tuple(entry["rest"]), dtype)

    @property
    def about(self) -> dict[str, Any]:
        """In the words of the manifest."""
        where = {"variant": None, "layer": self.layer, "hook": self.hook, "name": self.name}
        return where | {"per": self.per, "rest": self.rest, "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def row_bytes(self) -> int:
        return math.prod(self.rest) * self.dtype.itemsize

    def tensors(self, prompts: int, tokens: int) -> Tensors:
        """``values [prompts, *rest]``, or ``values [tokens, *rest]`` with ``offsets [prompts + 1]``."""
        if self.per == "prompt":
            return {"values": (self.dtype, (prompts, *self.rest))}
        return {"values": (self.dtype, (tokens, *self.rest)), "offsets": (torch.int64, (prompts + 1,))}

    def __str__(self) -> str:
        return _where(self.layer, self.hook, self.name)


def _where(layer: int | None, hook: str, name: str | None) -> str:
    return ("" if layer is None else f"layer {layer}, ") + f"hook {hook}" + (f", name {name}" if name else "")


def _file(folder: str, layer: int | None, hook: str, name: str | None) -> str:
    """The file of an output or artifact; never parsed."""
    if name is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
        raise CallbackError(
            f"{_where(layer, hook, None)}: an output's name is part of a file name, so {name!r} will not do; "
            "use letters, digits, _ and -"
        )
    words = (*(() if layer is None else (f"layer_{layer:03d}",)), hook, *(() if name is None else (name,)))
    return f"{folder}/{'.'.join(words)}.safetensors"


# --- the store ------------------------------------------------------------------------------------------------------


@dataclass
class _Output:
    """A declared output. start: the byte of "values"; times: how often each prompt came; digests: one per prompt.

    assembled: ``[prompts, row_bytes]`` of an output kept in RAM until its commit, else None.
    """

    file: File
    start: int
    times: np.ndarray
    digests: np.ndarray
    assembled: np.ndarray | None

    def assemble(self) -> None:
        """What was put together in RAM goes into the file; rows that have not come yet are anything."""
        assembled = self.assembled  # another thread may be done with it
        if assembled is not None:
            self.file.write(assembled.reshape(-1).data, self.start)


class Store:
    """One run folder while it is written, by one run only. Raises `StoreError` for whatever the disk refuses."""

    def __init__(self, folder: Path, lengths: np.ndarray, ram: int, check: Check) -> None:
        self._folder, self._ram, self._check = folder, ram, check
        self._first_row = {  # of each prompt in a file's values, and one past the last
            "prompt": np.arange(len(lengths) + 1),
            "token": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        }
        self._outputs: dict[Record, _Output] = {}
        self._listed: dict[str, dict[str, Any]] = {}
        self._done: list[dict[str, Any]] = []
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="fpwap-commit")
        self._publishing: deque[tuple[Sequence[File], Future[None]]] = deque()
        self._failed: BaseException | None = None

    @classmethod
    def open(cls, folder: Path, lengths: np.ndarray, *, ram: int = 2**30, check: Check = lambda: None) -> "Store":
        """``folder`` is the run's alone, and holds nothing but what the journal keeps in it.

        lengths: int64 ``[N]``, tokens of each prompt in input order. ram: bytes for per-prompt outputs that are
        assembled in memory and written in one pass; what is beyond goes to disk row by row. check: raises if the run is
        to stop, while the disk is waited for.
        """
        store = cls(folder, lengths, ram, check)
        with reported(folder):
            for name in ("activations", "artifacts"):
                (folder / name).mkdir(exist_ok=True)
            sync_folder(folder)
        return store

    @property
    def _counts(self) -> tuple[int, int]:
        return len(self._first_row["token"]) - 1, int(self._first_row["token"][-1])

    def declare(self, record: Record) -> None:
        """Make the record's file, once per (layer, hook, name)."""
        if record.file in self._listed or any(record.file == other.file for other in self._outputs):
            raise CallbackError(f"{record}: there are two outputs of this name; give one another name")
        plan = layout(record.tensors(*self._counts), str(record))
        prompts = self._counts[0]
        file = File.made(self._partial(record.file), plan.size)
        times, digests = np.zeros(prompts, np.uint8), np.empty((prompts, 16), np.uint8)
        self._outputs[record] = _Output(file, plan.starts["values"], times, digests, self._room(record, plan))
        file.write(memoryview(plan.header), 0)
        file.reserve()
        if record.per == "token":
            file.write(self._first_row["token"].data.cast("B"), plan.starts["offsets"])

    def _partial(self, name: str) -> Path:
        return self._folder / f"{name}{PARTIAL}"

    def _room(self, record: Record, plan: Layout) -> np.ndarray | None:
        """Where an output is put together, if there is room."""
        values = plan.size - plan.starts["values"]
        if record.per != "prompt" or values > self._ram:
            return None
        self._ram -= values
        return np.empty((self._counts[0], record.row_bytes), np.uint8)

    def write(self, record: Record, values: Tensor, sample_ids: Tensor) -> None:
        """Take some prompts' values; the caller may reuse them at once.

        values: ``[b, *rest]``, or ``[b, s, *rest]`` of b prompts of s tokens, on the CPU, in the record's dtype.
        sample_ids: int64 ``[b]``. Raises `StoreError` where a prompt comes a second time.
        """
        output, ids, first = self._outputs[record], sample_ids.numpy(), self._first_row[record.per]
        shape = values.shape[1:] if record.per == "prompt" else values.shape[2:]
        assert (shape, values.dtype, values.device.type) == (record.rest, record.dtype, "cpu"), record
        size = values.nbytes // len(ids)
        assert ids.min() >= 0
        assert ((first[ids + 1] - first[ids]) * record.row_bytes == size).all(), record
        np.add.at(output.times, ids, 1)
        if (output.times[ids] > 1).any():
            again = ids[output.times[ids] > 1][0]
            raise StoreError(f"{self._folder / record.file}: {record}: sample {again} was written twice")
        rows = np.asarray(bytes_of(values)).reshape(len(ids), size)
        output.digests[ids] = np.frombuffer(b"".join(xxh3_128_digest(row.data) for row in rows), np.uint8).reshape(
            -1, 16
        )
        if output.assembled is not None:
            output.assembled[ids] = rows
            return
        for row, at in zip(rows, (output.start + first[ids] * record.row_bytes).tolist(), strict=True):
            output.file.write(row.data, at)

    def artifact(self, layer: int | None, hook: str, artifact: "LayerArtifact") -> None:
        """Write one artifact, of tensors on any device, which may change afterwards; named by the next `settle`."""
        where, file = _where(layer, hook, artifact.name), _file("artifacts", layer, hook, artifact.name)
        if file in self._listed:
            raise CallbackError(f"{where}: there are two artifacts of this name; give one another name")
        try:
            meta = json.loads(json.dumps(artifact.meta))
        except (TypeError, ValueError) as error:
            raise CallbackError(f"{where}: an artifact's meta must be JSON: {error}") from error
        tensors = {name: tensor.detach().cpu() for name, tensor in artifact.tensors.items()}
        plan = layout({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, where)
        parts = memoryview(plan.header), *(bytes_of(tensors[name]) for name in plan.starts)
        entry = self._put(file, *parts, later=True)
        self._done.append({"layer": layer, "hook": hook, "name": artifact.name, **entry, "meta": meta})

    def put_json(self, name: str, value: object) -> None:
        """Write one of the run's own records, such as ``profile.json``."""
        self._put(name, as_json(value))

    def _put(self, name: str, *parts: memoryview, later: bool = False) -> dict[str, Any]:
        """Write a whole file; returns its name, size and digest as the manifest holds them.

        later: it gets its name by the next `settle`.
        """
        digest, at = xxh3_128(), 0
        file = File.made(self._partial(name), sum(part.nbytes for part in parts))
        try:
            for part in parts:
                file.write(part, at)
                digest.update(part)
                at += part.nbytes
        except BaseException:
            file.close()
            raise
        self._publish_later([file])
        if not later:
            self.settle()
        self._listed[name] = {"file": name, "bytes": at, "digest": digest.hexdigest()}
        return self._listed[name]

    def commit(self, sites: "Collection[Site]") -> None:
        """All outputs of these sites are complete: their names are given to them, durably, by the next `settle`.

        Raises `StoreError` where a prompt is missing, and then nothing is committed; or what an earlier commit failed
        with.
        """
        self._settle_some()
        done = {record: output for record, output in self._outputs.items() if record.site in sites}
        for record, output in done.items():
            missing = np.flatnonzero(output.times == 0)
            if len(missing):
                path, first = self._folder / record.file, missing[0]
                raise StoreError(f"{path}: {record}: {len(missing)} prompts were never written, first sample {first}")
        for record, output in done.items():
            output.assemble()
            self._ram += 0 if output.assembled is None else output.assembled.nbytes
            output.assembled = None
            del self._outputs[record]
            size, digest = output.file.needed, xxh3_128_hexdigest(output.digests.data)
            rows = int(self._first_row[record.per][-1])
            self._done.append({**record.about, "rows": rows, "file": record.file, "bytes": size, "digest": digest})
            self._listed[record.file] = _listing(self._done[-1])
        if done:
            self._publish_later([output.file for output in done.values()])

    def _publish_later(self, files: Sequence[File]) -> None:
        self._later(files, partial(self._publish, files))

    def _later(self, files: Sequence[File], job: Callable[[], None]) -> "Future[None]":
        """Behind all that came before, and only if all of that went well: what failed is not on the disk."""

        def in_order() -> None:
            if self._failed is not None:
                raise self._failed
            try:
                job()
            except BaseException as error:
                self._failed = error
                raise

        self._publishing.append((files, self._publisher.submit(in_order)))
        return self._publishing[-1][1]

    def _publish(self, files: Sequence[File]) -> None:
        for file in files:
            file.sync()
            file.close()
            if self._failed is not None:  # the store was closed meanwhile: the folder may be another run's by now
                raise self._failed
            with reported(file.path):
                os.rename(file.path, file.path.with_suffix(""))
        for folder in {file.path.parent for file in files}:
            sync_folder(folder)

    def settle(self) -> None:
        """What was committed is on disk under its name. Raises `StoreError`."""
        while self._publishing:
            self._settle_first()

    def _settle_some(self) -> None:
        """So that files do not pile up where the disk is slow, and what failed is heard. Nobody waits for what `save`
        has to do, which may be much.
        """
        while self._publishing and (
            self._publishing[0][1].done() or sum(len(files) for files, _ in self._publishing) > WAITING
        ):
            self._settle_first()

    def _settle_first(self) -> None:
        patiently(self._publishing[0][1], self._check)
        self._publishing.popleft()

    # --- for a run that goes on later ---

    def state(self, keep: Callable[[Tensor], Any]) -> list[dict[str, Any]]:
        """The open outputs, JSON, as they are now. keep: is given a tensor, which may change afterwards, and gives what
        stands for it.
        """
        found = []
        for record, output in self._outputs.items():
            written = {"times": keep(torch.from_numpy(output.times)), "digests": keep(torch.from_numpy(output.digests))}
            file = {"file": f"{record.file}{PARTIAL}", "bytes": output.file.needed}
            found.append({**record.about, **file, **written})
        return found

    def done(self, since: int) -> list[dict[str, Any]]:
        """What was committed, outputs and artifacts, behind the first ``since``: JSON with "file" and "bytes"."""
        return self._done[since:]

    def restore(
        self, done: Iterable[Mapping[str, Any]], state: Sequence[Mapping[str, Any]], fetch: Callable[[Any], Tensor]
    ) -> dict[str, Record]:
        """Goes on from where `done` and `state` said these things. Returns the records that are open, by their files.

        fetch: from what stands for a tensor to the tensor.
        """
        self._done = [dict(entry) for entry in done]
        self._listed = {entry["file"]: _listing(entry) for entry in self._done}
        found = {}
        for entry in state:
            record = Record.of(entry)
            plan = layout(record.tensors(*self._counts), str(record))
            file = File.found(self._partial(record.file), plan.size)
            times, digests = fetch(entry["times"]).numpy(), fetch(entry["digests"]).numpy()
            room = self._room(record, plan)
            self._outputs[record] = _Output(file, plan.starts["values"], times, digests, room)
            if room is not None:
                file.read(room.reshape(-1).data, plan.starts["values"])
            found[record.file] = record
        return found

    def save(self, afterwards: Callable[[], None], file: File) -> "Future[None]":
        """Later all that was written up to now is on the disk, and then ``afterwards`` is called.

        On the thread on which files get their names, behind those that were committed before. What it raises comes out
        of the next `settle` too. file: is closed at the latest when the store is.
        """
        outputs = list(self._outputs.values())

        def save() -> None:
            for output in outputs:
                output.assemble()
                output.file.sync()
            sync_folder(self._folder / "activations")
            afterwards()

        return self._later((file,), save)

    def finish(self, manifest: Mapping[str, Any], ids: np.ndarray) -> None:
        """Write the prompts and, last, the manifest: from now on the folder is a result.

        manifest: what the run says about itself, with "layers", the model's number of layers; the files are added here.
        ids: int32 ``[T]``, the tokens of all prompts in input order.
        """
        self.settle()
        prompts, tokens = self._counts
        assert not self._outputs
        assert "layers" in manifest
        assert ids.dtype == np.int32
        assert len(ids) == tokens
        plan = layout(prompt_tensors(prompts, tokens), PROMPTS)
        parts = {"ids": ids, "offsets": self._first_row["token"]}
        entry = self._put(PROMPTS, memoryview(plan.header), *(parts[name].data.cast("B") for name in plan.starts))
        request = self._folder / REQUEST  # the journal's
        with reported(request):
            if request.exists():
                raw = request.read_bytes()
                self._listed[REQUEST] = {"file": REQUEST, "bytes": len(raw), "digest": xxh3_128_hexdigest(raw)}
        written = {
            "prompts": {"count": prompts, "tokens": tokens, **entry},
            "records": sorted((entry for entry in self._done if "meta" not in entry), key=_order),
            "artifacts": sorted((entry for entry in self._done if "meta" in entry), key=_order),
            "files": [self._listed[name] for name in sorted(self._listed) if "/" not in name and name != PROMPTS],
        }
        own = {"format": FORMAT, "format_version": FORMAT_VERSION}
        self._put(MANIFEST, sealed({**own, **manifest, **written}))

    def close(self) -> None:
        """Let go of all files, finished or not; may be called again. What was committed yet gets its name, in time.

        If it is interrupted, what is under way for the disk still ends, but changes no name any more.
        """
        try:
            wait([future for _, future in self._publishing], GRACE)
            self._publisher.shutdown(wait=True, cancel_futures=True)
        finally:
            self._failed = self._failed or StoreError(f"{self._folder}: the run was interrupted while it was closed")
            for files, _ in self._publishing:
                for file in files:
                    file.close()
            self._publishing.clear()
            for output in self._outputs.values():
                output.file.close()
            self._outputs.clear()


def _listing(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is said of a file, its name, size and digest."""
    return {name: entry[name] for name in ("file", "bytes", "digest")}


def _order(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """Manifest order: by layer, those of the model last; the same whatever the order of commits was."""
    return entry["layer"] is None, entry["layer"] or 0, entry["hook"], entry["name"] or ""
