"""The dataset becomes a token table: `ingest` reads and checks it, `arrange` puts its tokens into the order of a sweep.

`Prompts` is what the user gave, unpadded and in input order; it is read once. `TokenTable` is the same tokens in the
order in which a sweep visits them, cut into microbatches, each a slice of the table's rows:

* **packed**: no padding; the longest prompts first, microbatches filled to a budget, equal lengths side by side;
* **padded**: dataset order, a number of prompts at a time, with the pad rows that HF would compute.

A `View` says which rows of a microbatch are whose tokens. Nothing else in fpwap knows the order of rows. This module
does not know models, callbacks or memory: it is told the vocabulary, the budget and the device.
"""

import itertools
import math
import reprlib
from array import array
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from archs.batch import Attention, Batch, Group

from .errors import DatasetError, FpwapError
from .foreign import one_line

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Batching = Literal["packed", "padded"]
Truncation = Literal["error", "left", "right"]

IDS, MASK = "input_ids", "attention_mask"
ENTRIES: Mapping[str, set[type]] = {IDS: {int}, MASK: {int, bool}}
"""The exact types of entries: to Python a bool is an int, but it is no token id."""
LONGEST = 1 << 22
"""Entries of one sample: what is more is no prompt, and must not be unfolded into memory."""
PART = 1 << 20
"""Rows that are looked up at once."""
SHORT = reprlib.Repr()
"""Of what may be anything: a few entries, a few levels, and no error of its own."""
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60
SHORT.maxlist = SHORT.maxtuple = SHORT.maxset = SHORT.maxdict = 8
TOKENISE = f"tokenise first, tokenizer(text)[{IDS!r}] (`fpwap run` does, once fpwap[text] is installed)"

# --- the dataset, in input order ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Given:
    """How each prompt came padded.

    widths: int64 ``[N]``, length of the row with its pads; -1 if it came without a mask or was truncated. left: int64
    ``[N]``, pads before the first token. ids: int32, what stood at the pads, ``ids[offsets[i] : offsets[i + 1]]`` of i.
    """

    widths: Int64
    left: Int64
    ids: Int32
    offsets: Int64


@dataclass(frozen=True, eq=False)
class Prompts:
    """The dataset, valid and unpadded; a sample id is a prompt's place in it.

    ids: int32 ``[T]``, real tokens only. offsets: int64 ``[N + 1]``, prompt i is ``ids[offsets[i] : offsets[i + 1]]``.
    metadata: what each sample held beside ids and mask; None if not kept. given: its padding; None if not kept.
    """

    ids: Int32
    offsets: Int64
    metadata: Sequence[Mapping[str, Any]] | None
    given: Given | None

    @property
    def n(self) -> int:
        return len(self.offsets) - 1

    @property
    def total_tokens(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> Int64:
        """int64 ``[N]``, real tokens of each prompt, at least 1."""
        return np.diff(self.offsets)

    def tokens(self, sample_id: int) -> Int32:
        """int32 ``[length]``, a view: not for writing."""
        return self.ids[self.offsets[sample_id] : self.offsets[sample_id + 1]]

    def digest(self) -> str:
        """xxh3_128 in hex of all that decides bits: tokens, boundaries and kept padding, but not metadata."""
        padding = () if self.given is None else (self.given.widths, self.given.left, self.given.ids)
        state = xxhash.xxh3_128()
        for values in (self.offsets, self.ids, *padding):
            state.update(values.data)
        return state.hexdigest()


def ingest(
    dataset: Iterable[Any],
    *,
    vocab: int,
    seq_len: int | None,
    max_positions: int | None,
    truncation: Truncation,
    keep_metadata: bool,
    keep_padding: bool,
) -> Prompts:
    """Read the dataset, once and whole.

    A sample is a mapping with ``input_ids``, perhaps ``attention_mask`` (ones in one piece, pads on either side) and
    any other keys, its metadata; or the ids alone. Ids and mask are lists, arrays or tensors, ``[S]`` or ``[1, S]``.
    What stands at a pad has to be an id of the vocabulary only if padding is kept, for then the model meets it.

    seq_len: the most real tokens of a prompt; truncation "left" drops a longer one's first tokens, "right" its last.
    max_positions: the most that the model can place, None if there is no limit. Raises DatasetError.
    """
    assert seq_len is None or seq_len > 0
    # Flat typed arrays: as Python lists, a million prompts would take gigabytes.
    ids, offsets = array("i"), array("q", [0])
    widths, lefts, pads, pad_offsets = array("q"), array("q"), array("i"), array("q", [0])
    metadata: list[Mapping[str, Any]] = []
    samples = _samples(dataset)
    try:
        for index, sample in enumerate(samples):
            fields = sample if isinstance(sample, Mapping) else {IDS: sample}
            where = f"sample {index}"
            if IDS not in fields:
                raise DatasetError(f"{where} has no {IDS!r}, its keys are {_keys(fields)}; {TOKENISE}")
            row, mask = _entries(where, IDS, fields[IDS]), fields.get(MASK)
            real = slice(0, len(row)) if mask is None else _ones(where, _entries(where, MASK, mask), len(row))
            _check_ids(where, row, slice(0, len(row)) if keep_padding else real, vocab)

            kept = real if truncation == "error" or seq_len is None else _cut(real, seq_len, truncation)
            ids.extend(row[kept])
            offsets.append(len(ids))
            if keep_padding:
                whole = mask is not None and kept == real
                widths.append(len(row) if whole else -1)
                lefts.append(real.start if whole else 0)
                pads.extend(row[: real.start] + row[real.stop :] if whole else ())
                pad_offsets.append(len(pads))
            if keep_metadata:
                metadata.append({key: value for key, value in fields.items() if key not in ENTRIES})
    except FpwapError:
        raise
    except Exception as error:  # of the user's own objects
        raise DatasetError(
            f"sample {len(offsets) - 1} cannot be read: {type(error).__name__}: {one_line(error)}"
        ) from error

    if len(offsets) == 1:
        raise DatasetError("the dataset is empty: pass one prompt or more (a generator can be used only once)")
    given = Given(*map(np.asarray, (widths, lefts, pads, pad_offsets))) if keep_padding else None
    prompts = Prompts(np.asarray(ids), np.asarray(offsets), metadata if keep_metadata else None, given)
    either = "truncation='left' or truncation='right'"
    _refuse_longer(prompts.lengths, f"seq_len={seq_len}", seq_len, f"{either}, or a larger seq_len")
    _refuse_longer(prompts.lengths, "the model has positions", max_positions, f"seq_len={max_positions} and {either}")
    return prompts


def _samples(dataset: Iterable[Any]) -> Iterator[Any]:
    """The one iterator that is ever asked of the dataset."""
    try:
        if isinstance(dataset, Mapping | str | bytes):
            raise TypeError("iterable, but not over prompts")
        return iter(dataset)
    except TypeError as error:
        wanted = "an iterable of prompts, such as a list of dicts or one split of a Hugging Face dataset"
        raise DatasetError(f"the dataset is {_shown(dataset)}; pass {wanted}") from error


def _entries(where: str, key: str, value: Any) -> list[int]:
    """The entries of a list, tuple, array or tensor ``[S]`` or ``[1, S]``; at least one, all integers."""
    if type(value) is list and 1 < len(value) <= LONGEST and set(map(type, value)) <= ENTRIES[key]:
        return value  # what nearly all are: nothing more to look at
    _refuse_endless(where, key, value)
    value = _plain(value)
    if isinstance(value, list | tuple) and len(value) == 1:
        _refuse_endless(where, key, value[0])
        inner = _plain(value[0])
        value = inner if isinstance(inner, Sequence) else value
    if isinstance(value, str | bytes):
        raise DatasetError(f"{where}: {key} is text, not token ids; {TOKENISE}")
    if not isinstance(value, Sequence):
        hint = "a list, array or tensor of integers (a single prompt is a dataset once it stands in a list)"
        raise DatasetError(f"{where}: {key} is {_shown(value)}; it must be {hint}")
    if not isinstance(value, list | tuple):
        value, length = list(itertools.islice(value, LONGEST)), len(value)
        if len(value) != length:
            raise DatasetError(f"{where}: {key} says that it has {length} entries, and has {len(value)}")
    if not value:
        raise DatasetError(f"{where}: {key} is empty; a prompt has one token or more: leave the sample out")
    if not set(map(type, value)) <= ENTRIES[key]:
        value = [_plain(entry) for entry in value]
        for place, entry in enumerate(value):
            if isinstance(entry, list | tuple):
                raise DatasetError(
                    f"{where}: {key} is nested, with {len(value)} rows; pass each as a sample of its own"
                )
            if type(entry) not in ENTRIES[key]:
                raise DatasetError(f"{where}: {key}[{place}] is {_shown(entry)}; pass integers")
    return value if isinstance(value, list) else list(value)


def _refuse_endless(where: str, key: str, value: Any) -> None:
    """Before anything is unfolded: ranges and arrays that repeat one number are small however long they are."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and all(isinstance(side, int) for side in shape):
        size = math.prod(shape)
    elif isinstance(value, range):
        size = max(0, -((value.start - value.stop) // value.step))  # len has bounds of its own
    else:
        size = len(value) if isinstance(value, Sequence) else 0
    if size > LONGEST:
        raise DatasetError(f"{where}: {key} has {size} entries, more than {LONGEST}; cut the text into prompts")


def _plain(value: Any) -> Any:
    """Arrays, tensors and scalars of whatever library as (lists of) Python numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _shown(value: Any) -> str:
    text = " ".join(SHORT.repr(value).split())
    return f"{text if len(text) <= 60 else text[:56] + ' ...'} (type {type(value).__name__})"


def _keys(fields: Mapping[Any, Any]) -> str:
    return SHORT.repr([*itertools.islice(fields, 8)]).replace("\n", " ")


def _ones(where: str, mask: list[int], width: int) -> slice:
    """Where in a row of ``width`` ids the real tokens lie."""
    if len(mask) != width:
        raise DatasetError(f"{where}: {MASK} has length {len(mask)}, {IDS} has {width}; make them equal")
    if wrong := set(mask) - {0, 1}:
        raise DatasetError(f"{where}: {MASK} holds {min(wrong)}; it must hold 0 and 1 only")
    flags = bytes(mask)
    ones = flags.strip(b"\0")
    if not ones:
        raise DatasetError(f"{where}: {MASK} is zero everywhere; a prompt has one token or more: leave the sample out")
    if b"\0" in ones:
        raise DatasetError(f"{where}: {MASK} has a hole, zeros between ones; pass each piece as a sample of its own")
    left = flags.index(1)
    return slice(left, left + len(ones))


def _check_ids(where: str, row: list[int], part: slice, vocab: int) -> None:
    real = row[part]
    if min(real) < 0 or max(real) >= vocab:
        place = next(place for place in range(part.start, part.stop) if not 0 <= row[place] < vocab)
        raise DatasetError(
            f"{where}: {IDS}[{place}] is {row[place]}, but the model's ids are 0 to {vocab - 1}; use the model's own "
            f"tokenizer, and mark pads by {MASK!r}"
        )


def _cut(real: slice, seq_len: int, truncation: Truncation) -> slice:
    if truncation == "left":
        return slice(max(real.start, real.stop - seq_len), real.stop)
    return slice(real.start, min(real.stop, real.start + seq_len))


def _refuse_longer(lengths: Int64, limit_name: str, limit: int | None, advice: str) -> None:
    """Asked once the whole dataset is read, to say how many."""
    if limit is None or lengths.max() <= limit:
        return
    longer = np.flatnonzero(lengths > limit)
    raise DatasetError(
        f"{len(longer)} of {len(lengths)} samples have {IDS} of more than {limit} tokens ({limit_name}): the first is "
        f"sample {longer[0]} with {lengths[longer[0]]}, the longest has {lengths.max()}; pass {advice}"
    )


# --- the token table, in the order of a sweep -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What a callback sees of a microbatch: b prompts of one length, without padding.

    sample_ids: int64 ``[b]``, on the CPU. rows: of their tokens, counted from the *microbatch's* first row: a slice of
    ``b * length`` rows (packed) or int64 ``[b, length]``, on the CPU (padded).
    """

    sample_ids: Tensor
    length: int
    rows: slice | Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Microbatch:
    """The unit of compute: ``rows`` of the token table.

    groups: cover the rows in order; starts count from the microbatch's first row, masks lie on the CPU.
    views: cover every real token exactly once.
    """

    index: int
    rows: slice
    groups: tuple[Group, ...]
    views: tuple[View, ...]

    def after(self, rows: int) -> tuple[list[Group], list[View]]:
        """Groups and views of this one behind so many rows of others."""
        groups = [replace(group, start=group.start + rows) for group in self.groups]
        return groups, [replace(view, rows=_moved(view.rows, rows)) for view in self.views]


def _moved(rows: slice | Tensor, by: int) -> slice | Tensor:
    return rows + by if isinstance(rows, Tensor) else slice(rows.start + by, rows.stop + by)


@dataclass(frozen=True, eq=False)
class TokenTable:
    """All rows in the order of the sweep; the microbatches cover them in order.

    ids: int32 ``[rows]``. positions: int32 ``[rows]``, over a prompt's real tokens from 0, and 1 at pads: HF's
    ``(mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)``.
    """

    ids: Int32
    positions: Int32
    microbatches: Sequence[Microbatch]

    @property
    def rows(self) -> int:
        return len(self.ids)

    def joined(self, microbatches: range) -> Microbatch:
        """Consecutive microbatches as one."""
        first, *others = (self.microbatches[index] for index in microbatches)
        if not others:
            return first
        groups, views = list(first.groups), list(first.views)
        for microbatch in others:
            more = microbatch.after(microbatch.rows.start - first.rows.start)
            groups += more[0]
            views += more[1]
        return Microbatch(first.index, slice(first.rows.start, others[-1].rows.stop), tuple(groups), tuple(views))

    def compact(self, vocab: int) -> "tuple[TokenTable, Int64] | None":
        """The ids that occur, int64 ``[used]``, ascending, and this table with places among them for its ids.

        None where more than half of ``vocab`` occurs.
        """
        present = np.zeros(vocab, dtype=bool)
        for part in self._parts():
            present[self.ids[part]] = True
        used = np.flatnonzero(present)
        if 2 * len(used) > vocab:
            return None
        place, ids = np.cumsum(present, dtype=np.int32) - 1, np.empty_like(self.ids)
        for part in self._parts():
            ids[part] = place[self.ids[part]]
        return replace(self, ids=ids), used

    def _parts(self) -> Iterator[slice]:
        """Of the rows; numpy makes int64 of the ids by which it looks up, for a hundred million that is much."""
        return (slice(first, first + PART) for first in range(0, self.rows, PART))

    def batch(
        self,
        microbatch: Microbatch,
        *,
        device: torch.device,
        height: int | None,
        sparse_height: int | None = None,
        attention: Attention,
        shared: dict[Hashable, object],
    ) -> Batch:
        """A microbatch as the maths wants it, on ``device``; filled up with zeros to whole tiles of ``height`` rows."""
        rows = microbatch.rows.stop - microbatch.rows.start
        filled = rows if height is None else -(-rows // height) * height

        def column(values: Int32) -> Tensor:
            out = torch.zeros(filled, dtype=torch.int64)
            out[:rows] = torch.from_numpy(values[microbatch.rows])
            return out.to(device)

        groups = tuple(g if g.mask is None else replace(g, mask=g.mask.to(device)) for g in microbatch.groups)
        ids, positions = column(self.ids), column(self.positions)
        return Batch(ids, positions, groups, height, attention=attention, sparse_height=sparse_height, shared=shared)


def arrange(
    prompts: Prompts, *, batching: Batching, microbatch_tokens: int, microbatch_size: int, pad_token_id: int
) -> TokenTable:
    """Decide the order of all rows, and where microbatches begin.

    Packed: ``microbatch_tokens`` is a microbatch's budget; a longer prompt is a microbatch of its own. The partition
    depends on it and on the lengths alone. Padded: ``microbatch_size`` prompts a microbatch; if all came with a mask
    and at one width they stay as they came, else they are padded on the right with ``pad_token_id``; needs `Given`.
    """
    if batching == "packed":
        return _packed(prompts, microbatch_tokens)
    return _padded(prompts, microbatch_size, pad_token_id)


def _packed(prompts: Prompts, budget: int) -> TokenTable:
    order = np.argsort(-prompts.lengths, kind="stable")  # longest first, equal lengths in input order
    sample_ids = torch.from_numpy(order)
    ids, positions = (np.empty(prompts.total_tokens, dtype=np.int32) for _ in range(2))
    microbatches: list[Microbatch] = []
    begin = end = 0
    for shares in _shares(prompts.lengths, budget):
        groups, views = [], []
        for length, share in shares:
            group = Group(end - begin, len(share), length, longest=length)
            chosen, rows, place = (
                slice(share.start, share.stop),
                slice(end, end + len(share) * length),
                np.arange(length),
            )
            ids[rows] = prompts.ids[(prompts.offsets[order[chosen], None] + place).ravel()]
            positions[rows] = np.tile(place, len(share))
            groups.append(group)
            views.append(View(sample_ids[chosen], length, group.rows))
            end = rows.stop
        microbatches.append(Microbatch(len(microbatches), slice(begin, end), tuple(groups), tuple(views)))
        begin = end
    return TokenTable(ids, positions, tuple(microbatches))


def _shares(lengths: Int64, budget: int) -> Iterator[list[tuple[int, range]]]:
    """Each microbatch as (length, places among the prompts sorted longest first): always the longest that yet fits."""
    distinct, counts = np.unique(lengths, return_counts=True)
    stops = np.cumsum(counts[::-1])[::-1]
    sizes = distinct.tolist()
    waiting = [range(stop - count, stop) for stop, count in zip(stops.tolist(), counts.tolist(), strict=True)]
    while sizes:
        room, shares = max(budget, sizes[-1]), []
        while at := bisect_right(sizes, room):
            length, queue = sizes[at - 1], waiting[at - 1]
            fitting = room // length
            shares.append((length, queue[:fitting]))
            room -= len(queue[:fitting]) * length
            waiting[at - 1] = queue[fitting:]
            if not waiting[at - 1]:
                del sizes[at - 1], waiting[at - 1]
        yield shares


def _padded(prompts: Prompts, size: int, pad: int) -> TokenTable:
    given, lengths, offsets = prompts.given, prompts.lengths, prompts.offsets
    assert given is not None
    firsts = np.arange(0, prompts.n, size)
    narrowest, widest = (pick.reduceat(given.widths, firsts) for pick in (np.minimum, np.maximum))
    as_given = (narrowest == widest) & (narrowest > 0)
    widths = np.where(as_given, widest, np.maximum.reduceat(lengths, firsts))
    ends = np.cumsum(widths * np.minimum(size, prompts.n - firsts))

    ids, positions = np.full(ends[-1], pad, dtype=np.int32), np.ones(ends[-1], dtype=np.int32)
    sample_ids = torch.arange(prompts.n)
    microbatches: list[Microbatch] = []
    begin = 0
    for first, width, end, keep in zip(*(a.tolist() for a in (firsts, widths, ends, as_given)), strict=True):
        chosen, rows = slice(first, min(first + size, prompts.n)), slice(begin, end)
        length, left = lengths[chosen], given.left[chosen] * keep
        place = np.arange(width) - left[:, None]  # [b, width], counted from each prompt's first token
        mask = (place >= 0) & (place < length[:, None])
        grid = ids[rows].reshape(mask.shape)
        grid[mask] = prompts.ids[offsets[chosen.start] : offsets[chosen.stop]]
        if keep:
            grid[~mask] = given.ids[given.offsets[chosen.start] : given.offsets[chosen.stop]]
        positions[rows].reshape(mask.shape)[mask] = place[mask]

        views = []
        for real in dict.fromkeys(length.tolist()):
            equal = np.flatnonzero(length == real)
            begins = equal * width + left[equal]
            tokens = torch.from_numpy(begins[:, None] + np.arange(real))
            views.append(View(sample_ids[first + equal], real, tokens))
        group = Group(0, len(length), width, int(length.max()), None if mask.all() else torch.from_numpy(mask))
        microbatches.append(Microbatch(len(microbatches), rows, (group,), tuple(views)))
        begin = end
    return TokenTable(ids, positions, tuple(microbatches))
