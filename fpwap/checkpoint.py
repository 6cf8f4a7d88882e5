"""What lies in a model folder: where every tensor is, by its shard's header, before a byte of a tensor is read.

In ``model.safetensors``, else in the files that ``model.safetensors.index.json`` names, nothing else; shards that a run
does not reach need not be there. Which tensors are whose is not known here (`fpwap.parcels`).
"""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from xxhash import xxh3_128

from .errors import ModelError
from .foreign import MOST_JSON, is_plain, opened, parse, read_json, read_part, shown

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Stored dtypes that weights may have; others may lie in a file but cannot be claimed."""
STORED: Mapping[str, torch.dtype] = DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}
"""Those, and what quantised weights are made of."""
FP8_SCALES, MXFP4 = "_scale_inv", ("_blocks", "_scales")
"""What follows a quantised tensor's name in the names of its companions."""

BITS: Mapping[str, int] = {
    "F4": 4,
    **dict.fromkeys("F6_E2M3 F6_E3M2".split(), 6),
    **dict.fromkeys("BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E5M2FNUZ F8_E4M3FNUZ".split(), 8),
    **dict.fromkeys("I16 U16 F16 BF16".split(), 16),
    **dict.fromkeys("I32 U32 F32".split(), 32),
    **dict.fromkeys("I64 U64 F64 C64".split(), 64),
}
"""Of an element, for every dtype that safetensors knows."""
MOST_DIMENSIONS, LARGEST = 64, 2**63 - 1
"""Of a stored tensor: what torch can view, and what fits an offset."""
MARK = "__metadata__"

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"[^/\\*?\[\]{}]+\.safetensors")
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

    def row(self, index: int, of: int) -> tuple[int, int]:
        """First byte and size of one of ``of`` equal rows."""
        return self.start + index * (self.size // of), self.size // of


Stamp = tuple[int, int, int]
"""Device, inode and size of a file; times say nothing."""
Header = Callable[[str], "list[Entry]"]
"""Reads the entries of a shard that is not in the folder."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder by name.

    needed: the shards that a run reads. absent: tensor -> shard, of those that are not there and need not be.
    stamps: of the files whose headers were read.
    """

    folder: Path
    entries: Mapping[str, Entry]
    needed: tuple[str, ...]
    absent: Mapping[str, str] = field(default_factory=dict)
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: Path,
        needed: "Callable[[Mapping[str, str]], set[str] | None] | None" = None,
        elsewhere: Header | None = None,
    ) -> "Checkpoint":
        """Reads the headers. Raises `ModelError` for missing, foreign or damaged files, and if the index is wrong.

        needed: told the shard of every tensor, says which tensors are needed; without it, or if it says None, all are.
        A shard that holds none of them may be missing. elsewhere: reads the header of a needed shard that is not in the
        folder.
        """
        shards, claimed = shard_names(folder, present=False, single=elsewhere is not None)
        wanted = None if claimed is None or needed is None else needed(claimed)
        must = shards if claimed is None or wanted is None else sorted({claimed[name] for name in wanted})
        entries: dict[str, Entry] = {}
        missing: set[str] = set()
        problems: list[str] = []
        stamps: dict[str, Stamp] = {}
        for shard in shards:
            if not os.path.exists(folder / shard) and shard not in must:
                missing.add(shard)
                continue
            found, stamp = _header(folder, shard, elsewhere)
            stamps |= {shard: stamp} if stamp else {}
            for entry in found:
                home = (claimed or {}).get(entry.name, shard)
                if home == shard and entry.name not in entries:
                    entries[entry.name] = entry
                else:
                    other = home if home != shard else entries[entry.name].shard
                    problems.append(f"{entry.name} lies in {shard} where it is said to lie in {other}")
        absent = {name: shard for name, shard in (claimed or {}).items() if shard in missing}
        lost = sorted(set(claimed or ()) - set(entries) - set(absent))
        if lost:
            problems.insert(0, f"it names tensors that its shards do not hold: {some(lost)}")
        if problems:
            said = f"{'; '.join(problems[:12])}{more(problems, 12)}"
            raise ModelError(f"{folder / INDEX} does not fit its shards: {said}")
        return cls(folder, entries, tuple(must), absent, stamps)

    @property
    def names(self) -> set[str]:
        """Of all tensors, there or not."""
        return {*self.entries, *self.absent}

    def again(self, folder: Path) -> "Checkpoint":
        """The same in ``folder``, where the needed shards must have the headers that they had.

        Raises `ModelError` that names a shard which is missing, damaged or another one by now.
        """
        held = self._by_shard()
        for shard in self.needed:
            entries, stamp = _header(folder, shard, None)
            found = {entry.name: entry for entry in entries}
            other = folder == self.folder and self.stamps.get(shard, stamp) != stamp
            if other or any(found.get(entry.name) != entry for entry in held[shard]):
                raise ModelError(
                    f"{folder / shard} is not the file whose header the plan was made of: it was replaced; run it again"
                )
        return replace(self, folder=folder)

    def _by_shard(self) -> dict[str, list[Entry]]:
        """The entries of each needed shard."""
        held: dict[str, list[Entry]] = {shard: [] for shard in self.needed}
        for entry in self.entries.values():
            if entry.shard in held:
                held[entry.shard].append(entry)
        return held

    def look_up(self, name: str) -> tuple[Entry | None, Entry | None]:
        """The stored values of a tensor, and their scales if it is quantised."""
        if name in self.entries:
            return self.entries[name], self.entries.get(name + FP8_SCALES)
        blocks, scales = (self.entries.get(name + end) for end in MXFP4)
        return (blocks, scales) if scales is not None else (None, None)

    def content(self, shards: Collection[str]) -> dict[str, str]:
        """shard -> what tells its content from another's, of some of those that are needed.

        A hub cache's blob is named by its digest. Of any other file the size, the header
        and a sample of every tensor are hashed: a shard of many gigabytes is not read for this. Raises `ModelError`.
        """
        return {
            shard: _content(self.folder / shard, entries)
            for shard, entries in self._by_shard().items()
            if shard in shards
        }

    def first_floating(self) -> torch.dtype | None:
        """The dtype of the first floating tensor, HF's rule for a config that names none."""
        return next((DTYPES[entry.dtype] for entry in self.entries.values() if entry.dtype in DTYPES), None)


def shard_names(folder: Path, *, present: bool = True, single: bool = False) -> tuple[list[str], dict[str, str] | None]:
    """The shard files of a folder and, if there is an index, tensor name -> shard.

    present: they must be there. single: without an index it is ``model.safetensors``, there or not. Raises
    `ModelError`.
    """
    index = folder / INDEX
    if os.path.lexists(folder / SINGLE) or (single and not os.path.lexists(index)):
        return [SINGLE], None
    if not os.path.lexists(index):
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
        advice = f"; {pickles[0]} is a pickle and is never opened: convert it to safetensors first" if pickles else ""
        raise ModelError(f"{folder} holds neither {SINGLE} nor {INDEX}{advice}")
    found = read_json(index, unique=True)
    claimed = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(claimed, dict) or not claimed:
        raise ModelError(f"{index} is not an index of safetensors shards: it has no 'weight_map' of tensors to files")
    for name, shard in claimed.items():
        if not is_plain(name):
            raise ModelError(f"{index} names the tensor {shown(name)}: names are a line of printable characters")
        if not _is_file_name(shard):
            raise ModelError(
                f"{index} names the shard {shown(shard)} for {name}: shards are plain file names in the model folder, "
                "and end in .safetensors; convert others first"
            )
    names = sorted(set(claimed.values()))
    for name in names:
        if present and not os.path.exists(folder / name):
            raise _missing(folder, name)
    return names, claimed


def _is_file_name(name: object) -> bool:
    """Of a shard; one that is a pattern would have the hub fetch other files."""
    return is_plain(name) and SHARD.fullmatch(name) is not None and len(os.fsencode(name)) < 256


def _missing(folder: Path, shard: str) -> ModelError:
    return ModelError(f"{folder / shard} is missing; {INDEX} names it: download the model again")


def _content(path: Path, entries: Sequence[Entry]) -> str:
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs":
        return f"blob {blob.name}"
    try:
        digest = xxh3_128(str(path.stat().st_size).encode())
        with opened(path) as file:
            for entry in entries:
                digest.update(repr(entry).encode())
                for part in range(SAMPLES):
                    begin = entry.start + max(0, entry.size - SAMPLE) * part // (SAMPLES - 1)
                    digest.update(read_part(file, begin, begin + min(SAMPLE, entry.size)))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    return f"sampled {digest.hexdigest()}"


def _header(folder: Path, shard: str, elsewhere: Header | None) -> tuple[list[Entry], Stamp | None]:
    if os.path.exists(folder / shard):
        return _read_header(folder, shard)
    if elsewhere is None:
        raise _missing(folder, shard)
    return elsewhere(shard), None


def _read_header(folder: Path, shard: str) -> tuple[list[Entry], Stamp]:
    path = folder / shard
    with opened(path) as file:
        status = os.fstat(file)
        head = read_part(file, 0, 8)
        head += read_part(file, 8, 8 + header_length(head))
    return entries_of(str(path), shard, head, status.st_size), (status.st_dev, status.st_ino, status.st_size)


def header_length(head: bytes) -> int:
    """Bytes of the header of a file that begins so; 0 if it has none."""
    length = int.from_bytes(head[:8], "little") if len(head) >= 8 else 0
    return length if length <= MOST_JSON else 0


def entries_of(path: str, shard: str, head: bytes, size: int | None) -> list[Entry]:
    """The entries of a safetensors file, in its order.

    path: for errors. head: the file's first eight bytes and its header. size: of the whole file; None if that is not
    known, then its end is not checked. Refuses all that the safetensors library refuses, and besides: keys that come
    twice or that no tensor has, names of more than a line, more than 64 dimensions, headers of more than 32 MiB. Raises
    `ModelError`.
    """
    try:
        length = header_length(head)
        if not length:
            raise ValueError("its header has no length")
        if len(head) < 8 + length:
            raise ValueError(f"it ends within its header of {length} bytes")
        if not head.startswith(b"{", 8):
            raise ValueError("its header is no JSON object")
        entries = _entries(shard, parse(head[8 : 8 + length], unique=True, numbers=_natural), 8 + length)
        end = entries[-1].start + entries[-1].size if entries else 8 + length
        if size is not None and end != size:
            which = "is cut off" if end > size else "goes on behind its tensors"
            raise ValueError(f"it {which}: {size} bytes, where its header says {end}")
        if size is not None:
            _second_opinion(head[: 8 + length], size)
    except ValueError as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    return entries


def _entries(shard: str, header: Any, start: int) -> list[Entry]:
    about = header.pop(MARK, {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError(f"{MARK} is no table of strings")
    spans = []
    for name, info in header.items():
        if not is_plain(name):
            raise ValueError(f"a tensor is named {shown(name)}: names are a line of printable characters")
        if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name} is not described by 'dtype', 'shape' and 'data_offsets'")
        spans.append(_span(name, **info))
    entries, at = [], 0
    for begin, end, name, dtype, shape in sorted(spans):
        if begin != at:
            raise ValueError(f"{name} {'overlaps what is before it' if begin < at else 'has a hole before it'}")
        entries.append(Entry(name, shard, dtype, shape, start + begin, end - begin))
        at = end
    return entries


def _span(name: str, dtype: Any, shape: Any, data_offsets: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """First byte, end, name, dtype and shape of a tensor that has exactly the bytes it needs."""
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name} has dtype {shown(dtype)}, which safetensors does not know")
    for what, numbers in (("shape", shape), ("data_offsets", data_offsets)):
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ValueError(f"the {what} of {name} is no list of integers, but {shown(numbers)}")
    if len(data_offsets) != 2:
        raise ValueError(f"the data_offsets of {name} are {len(data_offsets)} numbers where 2 are needed")
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape)} dimensions; more than {MOST_DIMENSIONS} are refused")
    (begin, end), elements = data_offsets, 1
    for side in shape:
        elements *= side
        if elements > LARGEST:
            raise ValueError(f"{name} of shape {shown(shape)} is larger than any file")
    bits = elements * BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise ValueError(f"{name} lies in {end - begin} bytes, where {dtype} of shape {shown(shape)} has {bits / 8:g}")
    return begin, end, name, dtype, tuple(shape)


def _natural(digits: str) -> int:
    """The only numbers that a header holds."""
    if not digits.isdecimal() or len(digits) > len(str(LARGEST)) or int(digits) > LARGEST:
        raise ValueError(f"its header holds {shown(digits)} where sizes and offsets are natural numbers")
    return int(digits)


def _second_opinion(head: bytes, size: int) -> None:
    """What the safetensors library says of a file of this size that begins so. Raises `ValueError`.

    It maps files, and a map of one that is truncated meanwhile would end the interpreter: so it is shown another of
    the same size, which is empty behind its header and takes no memory.
    """
    try:
        file = os.memfd_create("fpwap-header")
    except OSError:
        return  # a system without: what was checked before has to do
    try:
        try:
            with open(file, "wb", closefd=False) as writing:
                writing.write(head)
            os.truncate(file, size)
        except OSError:
            return  # so is one that has files of this size only on disk
        with safe_open(f"/proc/self/fd/{file}", framework="np"):  # for torch it maps what memory must have room for
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from error
    finally:
        os.close(file)


def more(items: Sequence[str], shown: int) -> str:
    return f"; and {len(items) - shown} more" if len(items) > shown else ""


def some(names: Sequence[str], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
