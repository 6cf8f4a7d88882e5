"""Which stored tensors each stage of a family takes: names, shapes and formats checked against a checkpoint's headers.

`lay_out` claims every tensor for a stage, or knows it as ignorable; what is missing, foreign or of another shape is
said at once, before a byte of a tensor is read. Knows no maths, and opens no file.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from archs.contract import ExpertSource, Family, Source, routed, stored

from .checkpoint import DTYPES, FP8_SCALES, MXFP4, Checkpoint, Entry, more, some
from .errors import ModelError
from .formats import Quantisation
from .schedule import Stage

SCALES = {*DTYPES, "U8"}
"""Of fp8, and of mxfp4."""

Format = Literal["plain", "fp8", "mxfp4"]
"""How a tensor's values are stored; see `fpwap.formats`."""
QUANTISED: Mapping[str, Format] = {"F8_E4M3": "fp8", "U8": "mxfp4"}
"""Stored dtype -> format, where scales lie beside the values."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a field: a stored tensor, or one row of a stored stack of them.

    values: how it is stored. scales: of a quantised one. shape: once decoded. row, rows: its place in the stack.
    quantised: what the config says of that.
    """

    values: Entry
    shape: tuple[int, ...]
    scales: Entry | None = None
    row: int = 0
    rows: int = 1
    quantised: Quantisation | None = None

    @property
    def stored(self) -> list[Entry]:
        return [self.values] if self.scales is None else [self.values, self.scales]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(entry.size // self.rows for entry in self.stored)

    @property
    def format(self) -> Format | None:
        """How the values are stored; None if that is not known here."""
        if self.scales is None:
            return "plain" if self.values.dtype in DTYPES else None
        found = QUANTISED.get(self.values.dtype)
        if self.scales.dtype not in SCALES or (self.scales.dtype == "U8") != (found == "mxfp4"):
            return None
        return found if self.quantised is not None and self.quantised.method == found else None


@dataclass(frozen=True, slots=True)
class Slot:
    """One field of a weights class: its pieces, stacked along the first dimension. dtype: None for the model's.

    gathered: Hugging Face copies it into a stack of all experts, where each begins at a multiple of 16 bytes: products
    with a single row have other bits in fp32 where that is not so.
    """

    pieces: tuple[Piece, ...]
    dtype: torch.dtype | None = None
    gathered: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.pieces[0].shape
        return (len(self.pieces) * first[0], *first[1:])

    @property
    def stretch(self) -> tuple[str, int, int]:
        """Shard, first byte and size in bytes of a field whose pieces lie side by side."""
        first = self.pieces[0]
        begin, size = first.values.row(first.row, first.rows)
        return first.values.shard, begin, size * len(self.pieces)

    def maps(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the file's own bytes serve: no decoding, no cast, aligned, on the CPU, pieces in one row."""
        dtype = self.dtype or dtype
        shard, begin, whole = self.stretch
        size = whole // len(self.pieces)
        plain = all(piece.format == "plain" and DTYPES[piece.values.dtype] == dtype for piece in self.pieces)
        joined = all(
            (piece.values.shard, piece.values.row(piece.row, piece.rows)) == (shard, (begin + turn * size, size))
            for turn, piece in enumerate(self.pieces)
        )
        return plain and joined and device.type == "cpu" and begin % (16 if self.gathered else dtype.itemsize) == 0


Fields = Mapping[str, Slot]


@dataclass(frozen=True)
class Parcel:
    """What one instance of a weights class takes: its fields, and for each handle to experts a parcel each."""

    weights: type
    fields: Fields
    experts: Mapping[str, "tuple[Parcel, ...]"]

    @property
    def slots(self) -> Iterator[Slot]:
        """All, the experts' included."""
        yield from self.fields.values()
        for parcels in self.experts.values():
            for parcel in parcels:
                yield from parcel.slots

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return _size(self.slots)

    @property
    def own_size(self) -> int:
        """The same without the experts."""
        return _size(self.fields.values())

    @property
    def elements(self) -> int:
        return sum(math.prod(slot.shape) for slot in self.slots)

    def mapped(self, dtype: torch.dtype, device: torch.device, *, but: frozenset[str]) -> int:
        """Bytes of the file that serve as they lie. but: fields that are left out."""
        left_out = {id(slot) for field, slot in self.fields.items() if field in but}
        return sum(slot.stretch[2] for slot in self.slots if slot.maps(dtype, device) and id(slot) not in left_out)


@dataclass(frozen=True)
class Layout:
    """Which stored tensors each stage takes."""

    parcels: Mapping[Stage, Parcel]

    def __contains__(self, stage: Stage) -> bool:
        return stage in self.parcels

    def __getitem__(self, stage: Stage) -> Parcel:
        return self.parcels[stage]

    def shards(self, stages: Iterable[Stage]) -> set[str]:
        """The shards that hold these stages."""
        pieces = (piece for stage in stages for slot in self[stage].slots for piece in slot.pieces)
        return {entry.shard for piece in pieces for entry in piece.stored}


@dataclass(frozen=True)
class _Tables:
    """stage -> (what its names start with, its weights class); alias: a tied tensor's name -> the stored one's."""

    stages: Mapping[Stage, tuple[str, type]]
    alias: Mapping[str, str]


def _tables(names: Collection[str], family: Family, config: Any, where: str) -> _Tables:
    """Raises `ModelError` if no prefix of the family fits. where: the checkpoint, for that."""
    marks = [family.embedding, family.layer_prefix.format(i=0)]
    pairs = (pair for pair in family.prefixes if any(n.startswith(pair[0] + mark) for n in names for mark in marks))
    prefix, head_prefix = next(pairs, (None, ""))
    if prefix is None:
        raise ModelError(f"{where} holds no {family.name} tensors, but {some(sorted(names))}")

    if config.layers > len(names):
        raise ModelError(f"{where} holds {len(names)} tensors, too few for the {config.layers} layers of its config")
    stages = {Stage("embed"): (prefix, family.embed_weights), Stage("norm"): (prefix, family.norm_weights)}
    for layer in range(config.layers):
        below = prefix + family.layer_prefix.format(i=layer)
        stages[Stage("layer", layer)] = (below, family.layer_weights(config, layer))
    stages[Stage("head")] = (head_prefix, family.head_weights)

    embedding, head = prefix + family.embedding, head_prefix + family.head
    alias: dict[str, str] = {}
    if config.tied:  # a stored head wins over the tie, as in transformers 5; either name may be absent
        alias = {head: embedding} if head not in names else {embedding: head} if embedding not in names else {}
    elif head not in names:
        del stages[Stage("head")]
    return _Tables(stages, alias)


def tensors_of(stages: Iterable[Stage], names: Collection[str], family: Family, config: Any) -> set[str]:
    """The tensors, of those there are by name, that these stages take. Raises `ModelError`."""
    tables = _tables(names, family, config, "the checkpoint's index")
    found: set[str] = set()
    for stage in stages:
        if stage in tables.stages:
            below, weights = tables.stages[stage]
            for name in _names(weights, below, config):
                stored_name = tables.alias.get(name, name)
                ends = ("", FP8_SCALES, *MXFP4)
                found |= {stored_name + end for end in ends if stored_name + end in names}
    return found


def _names(weights: type, below: str, config: Any) -> Iterator[str]:
    """Of the tensors that a weights class takes, experts' included."""
    yield from (below + name for source in stored(weights, config).values() for name in source.names)
    for handle in routed(weights).values():
        sources = stored(handle.weights, config)
        for expert in range(getattr(config, handle.count)):
            for source in sources.values():
                yield from (below + handle.prefix + name.replace("{e}", str(expert)) for name in source.names)


def lay_out(
    checkpoint: Checkpoint,
    family: Family,
    config: Any,
    quantised: Quantisation | None = None,
    stages: Collection[Stage] | None = None,
) -> Layout:
    """Claims every tensor of the checkpoint for a stage, or knows it as ignorable.

    A model without a head (a base-model checkpoint) has no "head" stage; nor has it any stage beyond ``stages`` (None:
    all) some of whose tensors are not there. Raises one `ModelError` with all that is missing, unclaimed or of another
    shape. quantised: what the config says of stored formats.
    """
    names = checkpoint.names
    tables = _tables(names, family, config, str(checkpoint.folder))
    claims = _Claims(checkpoint, tables.alias, config, quantised)
    parcels = {}
    for stage, (below, weights) in tables.stages.items():
        if stages is not None and stage not in stages and checkpoint.absent:
            own = tensors_of([stage], names, family, config)
            if not own.isdisjoint(checkpoint.absent):
                claims.claimed |= own
                continue
        parcels[stage] = claims.parcel(weights, below)
    below = "|".join(re.escape(body) for body, _ in family.prefixes)
    patterns = "|".join(pattern.replace("{layers}", str(config.layers)) for pattern in family.ignored) or "(?!)"
    ignored = re.compile(rf"(?:{below})?(?:{patterns})")
    unclaimed = sorted(n for n in names - claims.claimed if not ignored.fullmatch(n))
    problems = list(dict.fromkeys(claims.problems))
    if not problems and unclaimed:
        problems.append(f"tensors that {family.name} with this config does not have: {some(unclaimed)}")
    if problems:
        raise ModelError(f"{checkpoint.folder} does not fit its config: {'; '.join(problems[:12])}{more(problems, 12)}")
    return Layout(parcels)


class _Claims:
    """Finds the tensors of weights classes, and remembers what was found and what is wrong."""

    def __init__(
        self, checkpoint: Checkpoint, alias: Mapping[str, str], config: Any, quantised: Quantisation | None
    ) -> None:
        self._checkpoint, self._alias, self._config, self._quantised = checkpoint, alias, config, quantised
        self._known: dict[type, list[tuple[str, Source, tuple[int, ...]]]] = {}
        self.claimed: set[str] = set()
        self.problems: list[str] = []

    def parcel(self, weights: type, below: str) -> Parcel:
        fields = self._fields(weights, below)
        handles = {field: self._experts(source, below) for field, source in routed(weights).items()}
        return Parcel(weights, fields, handles)

    def _experts(self, source: ExpertSource, below: str) -> tuple[Parcel, ...]:
        rows = getattr(self._config, source.count)
        tables = (self._fields(source.weights, below + source.prefix, (row, rows)) for row in range(rows))
        return tuple(Parcel(source.weights, fields, {}) for fields in tables)

    def _fields(self, weights: type, below: str, expert: tuple[int, int] | None = None) -> Fields:
        fields = {}
        for name, source, shape in self._sources(weights):
            pieces = [self._piece(below + tensor, source, shape, expert) for tensor in source.names]
            if None not in pieces:
                gathered = expert is not None and "{e}" in source.names[0]
                fields[name] = Slot(tuple(piece for piece in pieces if piece is not None), source.dtype, gathered)
        return fields

    def _sources(self, weights: type) -> list[tuple[str, Source, tuple[int, ...]]]:
        """Field, where it lies and its shape; asked once, as there may be thousands of experts."""
        if weights not in self._known:
            found = stored(weights, self._config)
            self._known[weights] = [(name, source, source.shape(self._config)) for name, source in found.items()]
        return self._known[weights]

    def _piece(self, name: str, source: Source, shape: tuple[int, ...], expert: tuple[int, int] | None) -> Piece | None:
        """The tensor of this name; for one of several experts its own, or its row of the stack of all."""
        row, rows, whole = 0, 1, shape
        if expert is not None and "{e}" not in name:
            (row, rows), whole = expert, (expert[1], *shape)
        elif expert is not None:
            name = name.format(e=expert[0])
        name = self._alias.get(name, name)
        values, scales = self._checkpoint.look_up(name)
        if values is None:
            absent = self._checkpoint.absent.get(name)
            words = _words(source, shape, whole)
            self.problems.append(
                f"{name} is " + (f"in {absent}, which is missing" if absent else f"missing (expected {words})")
            )
            return None
        piece = Piece(values, shape, scales, row, rows, self._quantised)
        self.claimed.update(entry.name for entry in piece.stored)
        expected = _stored_shapes(piece, whole)
        if not expected:
            words = _words(source, shape, whole)
            of = f" with scales in {scales.dtype}" if scales is not None and scales.dtype not in SCALES else ""
            self.problems.append(f"{values.name} is stored as {values.dtype}, which is not supported{of} ({words})")
        for entry, stored_shape in zip(piece.stored, expected, strict=False):
            if entry.shape != stored_shape:
                words = _words(source, shape, whole)
                meant = words if stored_shape == whole else f"{words}, stored as {list(stored_shape)}"
                self.problems.append(f"{entry.name} has shape {list(entry.shape)} where the config says {meant}")
        return piece


def _words(source: Source, shape: tuple[int, ...], whole: tuple[int, ...]) -> str:
    """A shape in words of the config; of a stack, with its experts."""
    said = " x ".join(f"{dim} {size}" for dim, size in zip(source.dims, shape, strict=True))
    return said if whole == shape else f"experts {whole[0]} x {said}"


def _stored_shapes(piece: Piece, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of the tensors that hold a tensor of this shape; none if it cannot be held so."""
    block = piece.quantised.block if piece.quantised else None
    match piece.format:
        case "fp8" if block is not None and len(shape) == 2:
            return [shape, (-(-shape[0] // block[0]), -(-shape[1] // block[1]))]
        case "mxfp4" if len(shape) > 1 and shape[-2] % 32 == 0:
            *rows, width, height = shape
            return [(*rows, height, width // 32, 16), (*rows, height, width // 32)]
        case "plain":
            return [shape]
        case _:
            return []


def _size(slots: Iterable[Slot]) -> int:
    return sum(piece.size for slot in slots for piece in slot.pieces)
