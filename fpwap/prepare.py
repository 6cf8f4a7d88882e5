"""From a request to everything that a run needs, before anything is opened for writing or put on a device.

Config, headers and lengths in; sites, token table and plan out. No tensor is read.
"""

import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

import archs
from archs.batch import Attention
from archs.contract import ArchError, Family
from archs.ops import ALL, Sees

from . import hub, machine, rates
from .callbacks.base import Callback, Declared, Site
from .checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    Entry,
    Layout,
    Parcel,
    Slot,
    entries_of,
    lay_out,
    shard_names,
    tensors_of,
)
from .context import SweepContext
from .costs import LOGITS, Costs, Maths, StageCost, products_s
from .errors import CallbackError, ModelError, RequestError
from .formats import Quantisation, quantisation
from .plan import KEPT_ROWS, SPARSE_HEIGHT, Budgets, Known, Plan, Shapes, Wanted, counted, make_plan, tile_heights
from .profile import Profile
from .prompts import Prompts, TokenTable, arrange
from .recipes import recipe, slices, slot_size, vocabulary, without_experts
from .residual import Tier
from .schedule import Loading, Stage
from .sites import Targets, bind, check_positions, stage_of, where
from .store import Record
from .weights import PIECE, PIECE_ROWS

MICROBATCH_HEIGHTS = 4
"""Tiles of a packed microbatch by default, at most: the fill of the last one is a few percent."""
AT_ONCE = 16
"""Headers that are asked of the hub at once."""
COLD = 0.1
"""Share of a checkpoint in the page cache up to which reading it says how fast the disk is."""
LIBRARY = 2**26
"""Bytes that libraries of matrix products keep for themselves, at most."""
COMPUTED = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that the families are proved in."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of a `fpwap.Sweep`, each checked for itself.

    dtype None: the checkpoint's own. layers_per_visit None: as many as pay.
    """

    model: str
    revision: str | None
    seq_len: int | None
    truncation: Literal["error", "left", "right"]
    dtype: torch.dtype | None
    device: str | torch.device
    batching: Literal["packed", "padded"]
    microbatch_size: int
    microbatch_tokens: int | None
    memory: int | None
    device_memory: int | None
    disk: int | None
    attention: Attention | None
    residual: str
    loading: str = "auto"
    layers_per_visit: int | None = None
    verify: bool


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model folder and the family that computes it.

    raw: ``config.json``; text: the part of it that is the language model's, all of it unless that is wrapped; config:
    what the family made of this. quantisation: how weights are stored, None for plainly.
    """

    files: hub.Model
    family: Family
    raw: Mapping[str, Any]
    text: Mapping[str, Any]
    config: Any
    quantisation: Quantisation | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` found."""

    model: Model
    checkpoint: Checkpoint
    layout: Layout
    prompts: Prompts
    table: TokenTable
    targets: Targets
    context: SweepContext
    plan: Plan
    verify: bool


def open_model(name: str, revision: str | None) -> Model:
    """The config and its family; the shards need not be there yet. Raises `ModelError` or `HubError`."""
    files = hub.locate(name, revision)
    raw = files.config()
    try:
        family = archs.family(raw)
        text = archs.text_config(raw)
        stored = quantisation(text)
        config = family.config({key: value for key, value in text.items() if key != "quantization_config"})
        for layer in range(config.layers):
            family.hooks(config, layer)  # refuses what the sizes of a layer rule out
    except (ArchError, ModelError) as error:
        raise ModelError(f"{name}: {error}") from error
    return Model(files=files, family=family, raw=raw, text=text, config=config, quantisation=stored)


def open_checkpoint(model: Model) -> tuple[Checkpoint, Layout]:
    """All shards, downloaded if they are not at hand, their headers checked against the config. Raises `ModelError`."""
    indexed = (model.files.folder / INDEX).is_file()
    files = hub.fetch(model.files, shard_names(model.files.folder, present=False)[0] if indexed else [SINGLE])
    checkpoint = Checkpoint.open(files.folder)
    return checkpoint, lay_out(checkpoint, model.family, model.config, model.quantisation)


def survey(model: Model, stages: Sequence[Stage], dtype: torch.dtype | None = None) -> tuple[Checkpoint, Layout]:
    """The headers of the shards that hold these stages, checked against the config; no shard is downloaded.

    dtype: None if the first tensor of all may have to say it. Raises `ModelError`, `HubError`.
    """
    needed = partial(_needed, model, stages, dtype)
    checkpoint = (
        Checkpoint.open(model.files.folder, needed) if model.files.commit is None else _from_afar(model, needed)
    )
    return checkpoint, lay_out(checkpoint, model.family, model.config, model.quantisation, frozenset(stages))


def _from_afar(model: Model, wanted: Callable[[Mapping[str, str]], set[str] | None]) -> Checkpoint:
    """Headers of shards that are not at hand are asked of the hub, many at once; the first failure ends it."""
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fpwap-headers")
    coming: dict[str, Future[tuple[dict[str, Any], int]]] = {}

    def needed(places: Mapping[str, str]) -> set[str] | None:
        found = wanted(places)
        for shard in sorted({places[name] for name in (places if found is None else found)}):
            if not (model.files.folder / shard).is_file():
                coming[shard] = pool.submit(hub.header, model.files, shard)
        return found

    def header(shard: str) -> list[Entry]:
        found = coming[shard].result() if shard in coming else hub.header(model.files, shard)
        try:
            return entries_of(shard, *found)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{shard} of {model.files.name} has a header that says nothing: {error!r}") from error

    try:
        return Checkpoint.open(model.files.folder, needed, header)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _needed(
    model: Model, stages: Sequence[Stage], dtype: torch.dtype | None, places: Mapping[str, str]
) -> set[str] | None:
    """The tensors that stages take; None, for all, where they must say what dtype the model is in."""
    if dtype is None and not (model.text.get("dtype") or model.text.get("torch_dtype")):
        return None
    return tensors_of(stages, places, model.family, model.config)


def prepare(
    request: Request, ingest: Callable[..., Prompts], callbacks: Sequence[Callback], out: Path | None
) -> Prepared:
    """Everything up to the plan. Raises `FpwapError`s; the plan may be infeasible.

    ingest: `fpwap.prompts.ingest` of the user's dataset, to be told the limits.

    What can be refused by the config or the dataset is refused before a shard is downloaded.
    """
    model = open_model(request.model, request.revision)
    family, config = model.family, model.config
    targets = bind(callbacks, family, config)
    implementations = family.implementations(config)
    attention = request.attention or implementations[0]
    if attention not in implementations:
        have = " and ".join(implementations)
        raise RequestError(f"attn_implementation {attention!r} is not one of {family.name}'s: it has {have}")
    device = to_device(request.device)
    if device.type == "cpu" and request.device_memory is not None:
        raise RequestError("device_memory is an accelerator's; on the CPU there is memory= alone")
    prompts = ingest(
        vocab=config.vocab,
        seq_len=request.seq_len,
        max_positions=config.max_positions,
        truncation=request.truncation,
        keep_metadata=any(callback.needs_metadata for callback in callbacks),
        keep_padding=request.batching == "padded",
    )
    for callback in callbacks:
        check_positions(callback, prompts.lengths)

    stages = _wanted_stages(targets, config)
    with machine.uncollected():
        checkpoint, layout = survey(model, _read_stages(stages, verify=request.verify), request.dtype)
    if stage_of(targets.last).kind == "head" and Stage("head") not in layout:
        raise RequestError(f"{request.model} has no {family.head} and ties no weights: it has no logits")
    dtype = request.dtype or stored_dtype(model, checkpoint)
    height = sparse_height = None
    if request.batching == "packed":
        height, sparse_height = tile_heights(device, tuple(getattr(config, word) for word in family.activations))
    microbatch_tokens = request.microbatch_tokens or _microbatch(
        height or 0, int(prompts.lengths.max()), config.hidden * dtype.itemsize, device
    )
    table = arrange(
        prompts,
        batching=request.batching,
        microbatch_tokens=microbatch_tokens,
        microbatch_size=request.microbatch_size,
        pad_token_id=pad_token(model),
    )
    context = SweepContext(
        dtype=dtype, device=device, family=family, config=config, prompts=prompts, bound=targets.by_callback(callbacks)
    )
    on_cpu = device.type == "cpu"
    files = tuple(checkpoint.folder / shard for shard in checkpoint.needed)
    known = Known(
        model=model.files.name,
        commit=model.files.commit,
        family=family.name,
        layers=config.layers,
        last=where(targets.last),
        dtype=dtype,
        device=device,
        attention=attention,
        batching=request.batching,
        threads=torch.get_num_threads(),
        prompts=prompts.n,
        tokens=prompts.total_tokens,
        rows=table.rows,
        longest=int(prompts.lengths.max()),
        microbatches=len(table.microbatches),
        microbatch=counted(microbatch_tokens if height else request.microbatch_size, "token" if height else "row"),
        height=height,
        sparse_height=sparse_height,
        hot=machine.hot(files) if on_cpu else 0.0,
        files=files,
        shapes=_shapes(layout, stages, context),
        warnings=(*targets.warnings, *_beyond_training(model, prompts)),
    )
    eager = attention == "eager" or any(hook == "attn_pattern" for own in targets.bound for _, hook in own)
    with machine.uncollected():
        costs = _costs(
            layout, stages, callbacks, targets, context, table, height=height, eager=eager, verify=request.verify
        )
    budgets = Budgets(
        memory=min(machine.available_memory(), request.memory or sys.maxsize),
        device=0 if on_cpu else min(machine.device_memory(device), request.device_memory or sys.maxsize),
        disk=min(machine.free_disk(out or Path(tempfile.gettempdir())), request.disk or sys.maxsize),
        files=machine.most_files(),
    )
    with machine.uncollected():
        plan = make_plan(known, costs, rates.load(device), budgets, _wished(request, device))
    return Prepared(
        model=model,
        checkpoint=checkpoint,
        layout=layout,
        prompts=prompts,
        table=table,
        targets=targets,
        context=context,
        plan=plan,
        verify=request.verify,
    )


def fetch(prepared: Prepared) -> Prepared:
    """The same with the shards that it needs at hand: downloaded, if they are a hub model's that is not in the cache.

    Their headers are read again: hours may lie between a plan and its run. Raises `HubError`, and `ModelError` if they
    are not what the plan was made for.
    """
    model, seen = prepared.model, prepared.checkpoint
    files = hub.fetch(model.files, seen.needed)
    return replace(prepared, model=replace(model, files=files), checkpoint=seen.again(files.folder))


def learn(plan: Plan, profile: Profile) -> None:
    """Corrects the machine's rates by what a run has seen, for the next plan; not where others were at work too."""
    if machine.crowded():
        return
    taken = profile.by_phase()
    cold = plan.loading == "stream" and plan.hot < COLD  # else it may have been the page cache's rate
    dtype = str(plan.dtype).removeprefix("torch.")
    apart = bool(plan.schedule.streamed)  # the maths waits for each expert and each slice of the head
    products = sum(products_s(cost.maths, plan.rates, dtype) for cost in plan.costs.stages.values())
    samples = rates.Samples(
        forward_s=0.0 if apart else (profile.on_device() or taken)["forward"],
        predicted_products_s=products,
        predicted_beside_s=plan.phases["forward"] - products,
        read=profile.bytes_moved().get("weights", 0) if cold else 0,
        read_s=profile.reading_s,
    )
    found = plan.rates.corrected(dtype, date.today(), samples)
    if found is not plan.rates:
        rates.save(found, plan.device)


def _wished(request: Request, device: torch.device) -> Wanted:
    """What the request fixes. On the CPU the device's memory is the RAM."""
    loadings: dict[str, Loading] = {"resident": "resident", "stream": "stream"}
    tiers: dict[str, Tier] = {"device": "ram" if device.type == "cpu" else "device", "ram": "ram", "disk": "disk"}
    return Wanted(
        loading=loadings.get(request.loading), tier=tiers.get(request.residual), size=request.layers_per_visit
    )


def _microbatch(height: int, longest: int, row: int, device: torch.device) -> int:
    """Tokens of a packed microbatch by default: whole tiles. longest: of all prompts; row: bytes of the residual
    stream.

    On the CPU as few as fill well with prompts of this length, for memory's sake, and no more than keep its tensors
    below what the allocator maps anew at every operation.
    """
    tiles = MICROBATCH_HEIGHTS
    if device.type == "cpu" and height:
        tiles = min(tiles, -(-MICROBATCH_HEIGHTS * longest // height))
        tiles = max(1, min(tiles, (machine.LARGEST_KEPT - 1) // (height * row)))
    return tiles * height


def stored_dtype(model: Model, checkpoint: Checkpoint) -> torch.dtype:
    """HF's rule: what the config names, else the first floating tensor's."""
    named = model.text.get("dtype") or model.text.get("torch_dtype") or checkpoint.first_floating() or torch.bfloat16
    dtype = getattr(torch, str(named).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or dtype not in COMPUTED:
        raise ModelError(f"{model.files.name} is made for {named}, which is not computed in: pass dtype='float32'")
    return dtype


def to_device(asked: str | torch.device) -> torch.device:
    try:
        return machine.resolve_device(asked)
    except RuntimeError as error:
        raise RequestError(f"device {asked!r} is not to be had: {str(error).splitlines()[0]}") from error


def pad_token(model: Model) -> int:
    pad = model.text.get("pad_token_id")
    return pad if isinstance(pad, int) and 0 <= pad < model.config.vocab else 0


def _beyond_training(model: Model, prompts: Prompts) -> list[str]:
    """Prompts longer than the model was made for, where the maths does not forbid them."""
    trained = model.text.get("max_position_embeddings")
    longer = int((prompts.lengths > trained).sum()) if isinstance(trained, int) else 0
    return [f"{longer} prompts are longer than max_position_embeddings ({trained})"] if longer else []


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


# --- costs ----------------------------------------------------------------------------------------------------------


def _wanted_stages(targets: Targets, config: Any) -> list[Stage]:
    """The stages up to the last wanted site, in the model's order."""
    last = stage_of(targets.last)
    if last.kind == "embed":
        return [last]
    layers = range(config.layers if last.layer is None else last.layer + 1)
    tail = {"layer": [], "norm": [Stage("norm")], "head": [Stage("norm"), Stage("head")]}
    return [Stage("embed"), *(Stage("layer", layer) for layer in layers), *tail[last.kind]]


def _read_stages(stages: Sequence[Stage], *, verify: bool) -> list[Stage]:
    """Those, and what Hugging Face reads beside them: its final norm comes with the head."""
    return [*stages, Stage("head")] if verify and stages[-1] == Stage("norm") else list(stages)


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


def _costs(
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
        key = stage.kind, _signature(layout[stage]), tuple(hooks.items())
        if key not in known:
            known[key] = _stage(layout[stage], stage, work)
        held = {name: getattr(put, name).get(stage, 0) for name in ("states", "pooled", "files")}
        found[stage] = replace(known[key], **held)
    return found


def _signature(parcel: Parcel) -> frozenset[Any]:
    """Equal for parcels that take as much memory: kinds and shapes of what is stored, and how many of each."""
    kinds = ((p.values.dtype, p.values.shape, p.rows) for slot in parcel.slots for p in slot.pieces)
    return frozenset(Counter(kinds).items())


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
    each = {_signature(one): one for parcels in parcel.experts.values() for one in parcels}
    if stage.kind == "head":
        experts, apart = stored, Parcel(parcel.weights, {}, {})
        each = {frozenset(): slices(parcel, dtype, PIECE, PIECE_ROWS)[0]}
    return StageCost(
        stored=stored,
        experts=experts,
        memory=slot_size(parcel, dtype, way, rows),
        own=slot_size(apart, dtype, way, rows),
        mapped=parcel.mapped(dtype, work.context.device, but=vocabulary(parcel) if rows is not None else frozenset()),
        copied=slot_size(parcel, dtype, "map", rows),
        own_copied=slot_size(apart, dtype, "map", rows),
        expert=2 * max((slot_size(one, dtype, way) for one in each.values()), default=0),
        scratch=recipe(parcel, dtype, way, used).room,
        own_scratch=recipe(apart, dtype, way, used).room,
        expert_scratch=max((recipe(one, dtype, way).room for one in each.values()), default=0),
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


def _shapes(layout: Layout, stages: Sequence[Stage], context: SweepContext) -> Shapes | None:
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
