"""What a request comes to, counted for the plan: bytes of each stage, operations, passes over memory, outputs.

Everything is counted from config words, headers and lengths, by the functions that will make it (recipes of slots,
slices of the head), so that the plan and the run cannot disagree. No rate is known here, and no tensor is read.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from archs.ops import ALL, Sees

from .callbacks.base import Callback, Declared, Site
from .context import SweepContext
from .costs import LOGITS, Costs, Maths, StageCost
from .errors import CallbackError, RequestError
from .parcels import Layout, Parcel, Slot
from .plan import KEPT_ROWS, SPARSE_HEIGHT, Shapes
from .prompts import TokenTable
from .recipes import kind, kinds, recipe, slices, slot_size, vocabulary, without_experts
from .schedule import Stage
from .sites import Targets, stage_of, where
from .store import Record
from .weights import PIECE, PIECE_ROWS

LIBRARY = 2**26
"""Bytes that libraries of matrix products keep for themselves, at most."""


def _check_name(callback: Callback, site: Site, declared: Declared, names: set[str]) -> None:
    """An output's file name is good and its own. Raises `RequestError`."""
    if declared.name is None:
        return  # the store finds one
    layer, hook = site
    record = Record(layer, hook, declared.name, declared.per, declared.rest, declared.dtype)
    try:
        file = record.file
    except CallbackError as error:
        raise RequestError(f"{type(callback).__name__}: {error}") from error
    if file in names:
        raise RequestError(f"{type(callback).__name__}: there are two outputs named {declared.name!r} at {where(site)}")
    names.add(file)


@dataclass(frozen=True)
class _Put:
    """What callbacks put out and hold: bytes of outputs, layers that put something out, and by stage bytes of state, of
    outputs per prompt, and how many outputs there are.
    """

    outputs: int
    commits: int
    states: Mapping[Stage, int]
    pooled: Mapping[Stage, int]
    files: Mapping[Stage, int]


def _put_out(callbacks: Sequence[Callback], targets: Targets, context: SweepContext) -> _Put:
    """Raises `RequestError` from callbacks that cannot work so."""
    outputs = 0
    names: set[str] = set()
    states, pooled, files = (Counter[Stage]() for _ in range(3))  # of a layer's callbacks, until the layer ends
    for callback, own in zip(callbacks, targets.bound, strict=True):
        declared = callback.declare(context)
        for layer, hook in own:
            states[stage_of((layer, hook))] += callback.state_bytes(context, layer, hook)
            if hook in declared:
                out = declared[hook]
                _check_name(callback, (layer, hook), out, names)
                count = context.n_prompts if out.per == "prompt" else context.total_tokens
                taken = count * math.prod(out.rest) * out.dtype.itemsize
                outputs += taken
                files[stage_of((layer, hook))] += 1
                if out.per == "prompt":
                    pooled[stage_of((layer, hook))] += taken
    commits = len({layer for own in targets.bound for layer, _ in own})
    return _Put(outputs=outputs, commits=commits, states=states, pooled=pooled, files=files)


def costs_of(
    layout: Layout,
    stages: Sequence[Stage],
    callbacks: Sequence[Callback],
    targets: Targets,
    context: SweepContext,
    table: TokenTable,
    *,
    height: int | None,
    eager: bool,
    verify: bool,
) -> Costs:
    """What the sweep will read, hold, compute and put out."""
    config, itemsize = context.config, context.dtype.itemsize
    put = _put_out(callbacks, targets, context)
    layers = [stage for stage in stages if stage.kind == "layer"]
    hooks = {stage: context.family.hooks(config, stage.layer or 0) for stage in layers}
    shown = [math.prod(width) for at in hooks.values() for width in at.values()]
    rows = np.array([batch.rows.stop - batch.rows.start for batch in table.microbatches], dtype=np.int64)
    wanted = _wanted_rows(callbacks, targets, table) if Stage("head") in stages else np.zeros_like(rows)
    logits = int(wanted.max()) if height is None else height
    sights = _sights(config)
    masked = max(group.length if group.mask is not None else 0 for part in table.microbatches for group in part.groups)
    routed = [stage for stage in layers if layout[stage].experts]
    whole = max((layout[stage].elements * itemsize for stage in stages), default=0)
    most = int(rows.max())
    filled = most if height is None else -(-most // height) * height
    heads = max((at["attn_pattern"][0] for at in hooks.values()), default=0)
    work = _Work(context, table, rows, wanted, height, verify)
    kept = table.rows if height is not None and table.rows <= KEPT_ROWS else most
    turns = max((at["q"][-1] for at in hooks.values()), default=0)
    ropes = len(set(getattr(config, "ropes", (None,))))  # different ones in different layers
    patterns = any(hook == "attn_pattern" for own in targets.bound for _, hook in own)
    uneven = any(at["q"][-1] != at["v"][-1] for at in hooks.values())
    return Costs(
        stages=_stages(layout, stages, work, put),
        rows=rows,
        wanted=wanted,
        height=height,
        width=config.hidden * itemsize,
        vocabulary=config.vocab * itemsize if Stage("head") in stages else 0,
        microbatch=filled * (6 * config.hidden + 3 * max(shown, default=config.hidden)) * itemsize
        + (2 * (height or filled) * config.hidden * torch.float32.itemsize if work.wide > 1 else 0),
        logits=logits * config.vocab * itemsize * LOGITS if Stage("head") in stages else 0,
        routed=max((_routed_row(context, stage, masked) for stage in routed), default=0),
        tables=kept * (2 * torch.int64.itemsize + 2 * ropes * turns * torch.float32.itemsize)
        + _scores(
            table, sights, heads, itemsize, eager=eager, patterns=patterns, uneven=uneven, packed=height is not None
        ),
        outputs=put.outputs,
        commits=put.commits,
        by_rows=work.used is not None,
        reference=whole if verify else 0,
        on_device=context.device.type != "cpu",
        tokens=context.total_tokens,
        prompts=context.n_prompts,
        libraries=_libraries(layout, stages, itemsize),
        shards=len(layout.shards(stages)),
    )


def _libraries(layout: Layout, stages: Sequence[Stage], itemsize: int) -> int:
    """Bytes that libraries of matrix products keep for themselves: a copy of the largest matrix, or less."""
    most = 0
    for stage in stages:
        parcel = layout[stage]
        first = (slot for parcels in parcel.experts.values() for slot in parcels[0].slots)
        slots = (*parcel.fields.values(), *first) if stage.kind != "embed" else ()
        most = max([most, *(math.prod(slot.shape[-2:]) * itemsize for slot in slots if len(slot.shape) > 1)])
    return min(LIBRARY, most)


def _wanted_rows(callbacks: Sequence[Callback], targets: Targets, table: TokenTable) -> NDArray[np.int64]:
    """int64 ``[microbatches]``: rows whose logits are wanted, at most."""
    asked = [c.positions for c, own in zip(callbacks, targets.bound, strict=True) if (None, "logits") in own]
    every = any(isinstance(positions, str) and positions == "all" for positions in asked)
    places = sum(1 if isinstance(positions, str) else len(positions) for positions in asked)
    found = []
    for batch in table.microbatches:
        rows, prompts = batch.rows.stop - batch.rows.start, sum(len(view.sample_ids) for view in batch.views)
        found.append(rows if every else min(rows, prompts * places))
    return np.array(found, dtype=np.int64)


def _sights(config: Any) -> frozenset[Sees]:
    """What the layers' queries may see."""
    found = getattr(config, "sees", ALL)
    return frozenset([found] if isinstance(found, Sees) else found)


def _scores(
    table: TokenTable,
    sights: frozenset[Sees],
    heads: int,
    itemsize: int,
    *,
    eager: bool,
    patterns: bool,
    uneven: bool,
    packed: bool,
) -> int:
    """Bytes of attention masks and scores that exist at once.

    Masks without padding are corners of squares of a power of two, one for each sight, which stay; others stay as long
    as their microbatch. sdpa makes numbers of a mask that is true and false. eager and ``patterns`` keep scores, in
    fp32 and in the model's dtype; so does sdpa itself where a value is not as wide as a key (``uneven``).
    """
    wide, own = torch.float32.itemsize, max((1 if eager else 0) * itemsize, 4 if patterns else 0)
    squares: dict[tuple[int, Sees], int] = {}
    most = 0
    for batch in table.microbatches:
        masks = scores = 0
        for group in batch.groups:
            length, side = group.length, 1 << (group.length - 1).bit_length()
            prompts = 1 if packed else group.prompts
            seen = [s for s in sights if eager or group.mask is not None or not s.all_of(length)]
            squares |= {(side, sees): side**2 * (1 + own) for sees in seen}
            if seen and group.mask is not None:
                masks += prompts * length**2 * (len(seen) * (1 + own) + 3)
            making = max(2 * side**2, prompts * length**2 * (heads if _explicit(sights) else 1) * itemsize)
            terms = itemsize + 2 * wide if eager else 0
            terms = max(terms, 3 * wide if patterns or uneven else 0)
            shown = 2 * group.prompts * heads * length**2 * max(itemsize, wide * patterns) if patterns else 0
            scores = max(scores, (making if seen else 0) + prompts * heads * length**2 * terms + shown)
        most = max(most, masks + scores)
    return sum(squares.values()) + most


def _explicit(sights: frozenset[Sees]) -> bool:
    """Whether sdpa's mask may hold a bias for each head."""
    return any(sees.explicit for sees in sights)


@dataclass(frozen=True)
class _Work:
    """What the maths of a stage depends on, besides its weights."""

    context: SweepContext
    table: TokenTable
    rows: NDArray[np.int64]
    wanted: NDArray[np.int64]
    height: int | None
    verify: bool

    @cached_property
    def filled(self) -> NDArray[np.int64]:
        """int64 ``[microbatches]``: rows that go through matrix products."""
        return self.rows if self.height is None else -(-self.rows // self.height) * self.height

    @property
    def wide(self) -> int:
        """How much larger than an activation what is computed in fp32 is."""
        return max(1, torch.float32.itemsize // self.context.dtype.itemsize)

    @cached_property
    def squares(self) -> float:
        """Pairs of query and key: the sum of lengths squared; half of it without padding, where none looks ahead."""
        squares = sum(group.prompts * group.length**2 for part in self.table.microbatches for group in part.groups)
        return squares / 2 if self.height else float(squares)

    @property
    def way(self) -> Literal["slot", "stage"]:
        """How bytes come into slots."""
        return "slot" if self.context.device.type == "cpu" else "stage"

    @cached_property
    def used(self) -> NDArray[np.int64] | None:
        """The ids that occur, ascending; None if they are most of the vocabulary, which is read whole then.

        So it is where Hugging Face looks on, from tokens of its own.
        """
        compact = None if self.verify else self.table.compact(self.context.vocab)
        return None if compact is None else compact[1]

    @cached_property
    def calls(self) -> int:
        """Of attention, in one layer."""
        return sum(
            group.prompts if self.height is not None else 1 for part in self.table.microbatches for group in part.groups
        )


def _stages(layout: Layout, stages: Sequence[Stage], work: _Work, put: _Put) -> dict[Stage, StageCost]:
    """Each stage's weights and maths. Layers that look alike are looked at once: there may be thousands of experts."""
    known: dict[Any, StageCost] = {}
    found = {}
    for stage in stages:
        hooks = work.context.family.hooks(work.context.config, stage.layer) if stage.layer is not None else {}
        key = stage.kind, kind(layout[stage], work.context.dtype, work.way), tuple(hooks.items())
        if key not in known:
            known[key] = _stage(layout[stage], stage, work)
        held = {name: getattr(put, name).get(stage, 0) for name in ("states", "pooled", "files")}
        found[stage] = replace(known[key], **held)
    return found


def _stage(parcel: Parcel, stage: Stage, work: _Work) -> StageCost:
    """One stage's weights and maths."""
    dtype, way = work.context.dtype, work.way
    used = work.used if stage.kind == "embed" else None
    rows = None if used is None else len(used)
    stored = parcel.size
    if rows is not None:
        table = sum(piece.size for field in vocabulary(parcel) for piece in parcel.fields[field].pieces)
        stored -= table - table * rows // work.context.vocab
    experts, apart = parcel.size - parcel.own_size, without_experts(parcel)
    each = kinds((one for parcels in parcel.experts.values() for one in parcels), dtype, way)
    if stage.kind == "head":
        experts, apart = stored, Parcel(parcel.weights, {}, {})
        each = slices(parcel, dtype, PIECE, PIECE_ROWS)[:1]
    return StageCost(
        stored=stored,
        experts=experts,
        memory=slot_size(parcel, dtype, way, rows),
        own=slot_size(apart, dtype, way, rows),
        mapped=parcel.mapped(dtype, work.context.device, but=vocabulary(parcel) if rows is not None else frozenset()),
        copied=slot_size(parcel, dtype, "map", rows),
        own_copied=slot_size(apart, dtype, "map", rows),
        expert=2 * max((slot_size(one, dtype, way) for one in each), default=0),
        scratch=recipe(parcel, dtype, way, used).room,
        own_scratch=recipe(apart, dtype, way, used).room,
        expert_scratch=max((recipe(one, dtype, way).room for one in each), default=0),
        maths=_maths(parcel, stage, work),
    )


def _maths(parcel: Parcel, stage: Stage, work: _Work) -> Maths:
    """What a stage computes, over all rows."""
    config, itemsize = work.context.config, work.context.dtype.itemsize
    rows = float(work.filled.sum())
    match stage.kind:
        case "embed":
            return Maths(passes=2.0 * rows * config.hidden * itemsize)
        case "norm":
            return Maths(passes=5.0 * work.wide * rows * config.hidden * itemsize)
        case "head":
            tile = work.height or 1
            rows = float((-(-work.wanted // tile) * tile).sum())
            matrix = [slot for slot in parcel.fields.values() if len(slot.shape) > 1]
            return replace(
                _products(matrix, rows, _tiles(rows, work), itemsize), passes=2.0 * rows * config.vocab * itemsize
            )
        case "layer":
            return _layer_maths(parcel, stage, work, rows)


def _layer_maths(parcel: Parcel, stage: Stage, work: _Work, rows: float) -> Maths:
    """Passes are counted by the words of the hooks: norms and sums over the stream, rotation and copies of queries and
    keys, copies of values, activations inside the MLP.
    """
    context, itemsize = work.context, work.context.dtype.itemsize
    hidden = context.config.hidden
    shown = {hook: math.prod(width) for hook, width in context.family.hooks(context.config, stage.layer or 0).items()}
    own = _products(
        [slot for slot in parcel.fields.values() if len(slot.shape) > 1], rows, _tiles(rows, work), itemsize
    )
    matrix, touched, inner = own.matrix, own.touched, shown.get("mlp_hidden", 0)
    for experts in parcel.experts.values():
        slots = [slot for slot in experts[0].slots if len(slot.shape) > 1]
        chosen, visits = shown["expert_ids"], len(work.rows)
        each = rows / visits * chosen / len(experts)  # rows that an expert sees in a visit
        tiles = visits * len(experts) * (each / SPARSE_HEIGHT + 0.5 if work.height else 1.0)
        through = tiles * SPARSE_HEIGHT if work.height else rows * chosen
        sparse = _products(slots, through, tiles, itemsize)
        matrix, touched = matrix + sparse.matrix, touched + sparse.touched
        touched += 4.0 * rows * chosen * hidden * torch.float32.itemsize
        inner += chosen * max(max(slot.shape) for slot in slots)
    words = (6 + 10 * work.wide) * hidden + 8 * (shown["q"] + shown["k"]) + 3 * (shown["v"] + shown["z"]) + 5 * inner
    return Maths(
        matrix=matrix,
        touched=touched,
        attention=2.0 * work.squares * (shown["q"] + shown["z"]),
        passes=float(rows * words * itemsize),
        calls=work.calls,
    )


def _products(slots: Iterable[Slot], rows: float, tiles: float, itemsize: int) -> Maths:
    """Matrix products of so many rows; every tile touches all weights."""
    elements = sum(math.prod(slot.shape) for slot in slots)
    widths = sum(sum(slot.shape[-2:]) for slot in slots)
    return Maths(matrix=2.0 * rows * elements, touched=float((tiles * elements + rows * widths) * itemsize))


def shapes_of(layout: Layout, stages: Sequence[Stage], context: SweepContext) -> Shapes | None:
    """Of the largest layer, for calibration."""
    layers = [stage for stage in stages if stage.kind == "layer"]
    if not layers:
        return None
    largest = max(layers, key=lambda stage: layout[stage].own_size)
    parcel, shown = layout[largest], context.family.hooks(context.config, largest.layer or 0)
    slots = [*parcel.fields.values(), *(slot for parcels in parcel.experts.values() for slot in parcels[0].slots)]
    products = {(slot.shape[-2], slot.shape[-1]) for slot in slots if len(slot.shape) > 1}
    return Shapes(
        hidden=context.config.hidden,
        inner=max(max(shape) for shape in products),
        products=tuple(sorted(products)),
        attention=(shown["q"][0], shown["k"][0], shown["q"][1], shown["v"][1]),
    )


def _tiles(rows: float, work: _Work) -> float:
    return rows / work.height if work.height else float(len(work.rows))


def _routed_row(context: SweepContext, stage: Stage, masked: int) -> int:
    """Bytes that a row of a chunk takes in a routed layer: the stream, fp32 norms, projections, a term per choice.

    masked: keys that a row's mask is about, 0 in packed mode.
    """
    config, itemsize = context.config, context.dtype.itemsize
    hooks = context.family.hooks(config, stage.layer or 0)
    (chosen,) = hooks["expert_ids"]
    widest = max(math.prod(width) for width in hooks.values())
    terms = 2 * chosen * config.hidden * torch.float32.itemsize
    return int((10 * config.hidden + 3 * widest) * itemsize + terms + masked * (1 + itemsize))
