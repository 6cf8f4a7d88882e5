"""From a request to everything that a run needs, before anything is opened for writing or put on a device.

Config, headers and lengths in; sites, token table and plan out. No tensor is read.
"""

import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import archs
from archs.batch import Attention
from archs.contract import ArchError, Family

from . import hub, machine
from .callbacks.base import Callback, Declared, Site
from .checkpoint import INDEX, SINGLE, Checkpoint, Layout, aligned, lay_out, shard_names
from .context import SweepContext
from .errors import CallbackError, ModelError, RequestError
from .formats import Quantisation, quantisation
from .plan import Costs, Plan, make_plan, tile_heights
from .prompts import Prompts, TokenTable, arrange
from .schedule import Schedule, Stage, group_stages
from .sites import Targets, bind, check_positions, stage_of, where
from .store import Record

MICROBATCH_HEIGHTS = 4
"""Tiles of a packed microbatch by default: the fill of the last one is a few percent."""
COMPUTED = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that the families are proved in."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of a `fpwap.Sweep`, each checked for itself. dtype None: the checkpoint's own."""

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
    layers_per_visit: int
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
    """The shards, downloaded if they are not at hand, their headers checked against the config. Raises `ModelError`."""
    indexed = (model.files.folder / INDEX).is_file()
    files = hub.fetch(model.files, shard_names(model.files.folder, present=False)[0] if indexed else [SINGLE])
    checkpoint = Checkpoint.open(files.folder)
    return checkpoint, lay_out(checkpoint, model.family, model.config, model.quantisation)


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

    checkpoint, layout = open_checkpoint(model)
    if stage_of(targets.last).kind == "head" and Stage("head") not in layout:
        raise RequestError(f"{request.model} has no {family.head} and ties no weights: it has no logits")
    dtype = request.dtype or stored_dtype(model, checkpoint)
    height = sparse_height = None
    if request.batching == "packed":
        height, sparse_height = tile_heights(device, tuple(getattr(config, word) for word in family.activations))
    microbatch_tokens = request.microbatch_tokens or MICROBATCH_HEIGHTS * (height or 0)
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
    packed = request.batching == "packed"

    def schedule(chunks: tuple[range, ...]) -> Schedule:
        return _schedule(targets, model, layout, request.layers_per_visit, table, chunks)

    plan = make_plan(
        model=model.files.name,
        commit=model.files.commit,
        family=family.name,
        layers=config.layers,
        last=targets.last,
        dtype=dtype,
        device=device,
        attention=attention,
        batching=request.batching,
        prompts=prompts.n,
        tokens=prompts.total_tokens,
        rows=table.rows,
        longest=int(prompts.lengths.max()),
        microbatches=len(table.microbatches),
        microbatch=microbatch_tokens if packed else request.microbatch_size,
        height=height,
        sparse_height=sparse_height,
        schedule=schedule,
        residual=request.residual,
        costs=_costs(layout, callbacks, targets, context, table, schedule(()), verify=request.verify),
        lengths=[batch.rows.stop - batch.rows.start for batch in table.microbatches],
        memory_free=min(machine.available_memory(), request.memory or sys.maxsize),
        device_free=min(machine.device_memory(device), request.device_memory or sys.maxsize),
        disk_free=min(machine.free_disk(out or Path(tempfile.gettempdir())), request.disk or sys.maxsize),
        warnings=(*targets.warnings, *_beyond_training(model, prompts)),
    )
    return Prepared(
        model=model,
        checkpoint=checkpoint,
        layout=layout,
        prompts=prompts,
        table=table,
        targets=targets,
        context=context,
        plan=plan,
    )


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


def _schedule(
    targets: Targets, model: Model, layout: Layout, size: int, table: TokenTable, chunks: tuple[range, ...]
) -> Schedule:
    """The stages up to the last wanted site."""
    stage = stage_of(targets.last)
    waves = (range(len(table.microbatches)),)
    if stage.kind == "embed":
        return Schedule(((stage,),), waves)
    layers = range(model.config.layers if stage.layer is None else stage.layer + 1)
    groups = group_stages(layers, norm=stage.layer is None, head=stage.kind == "head", size=size, apart=bool(chunks))
    routed = frozenset(stage for group in groups for stage in group if layout[stage].experts)
    return Schedule(groups, waves, chunks, routed if chunks else frozenset())


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


def _costs(
    layout: Layout,
    callbacks: Sequence[Callback],
    targets: Targets,
    context: SweepContext,
    table: TokenTable,
    schedule: Schedule,
    *,
    verify: bool,
) -> Costs:
    """What the sweep will read, hold and put out. Raises `RequestError` from callbacks that cannot work so."""
    config, itemsize = context.config, context.dtype.itemsize
    outputs = 0
    names: set[str] = set()
    states: Counter[Stage] = Counter()  # of a layer's callbacks, until the layer ends
    for callback, own in zip(callbacks, targets.bound, strict=True):
        declared = callback.declare(context)
        for layer, hook in own:
            if hook in declared:
                _check_name(callback, (layer, hook), declared[hook], names)
            states[stage_of((layer, hook))] += callback.state_bytes(context, layer, hook)
            if hook in declared:
                out = declared[hook]
                count = context.n_prompts if out.per == "prompt" else context.total_tokens
                outputs += count * math.prod(out.rest) * out.dtype.itemsize
    stages = set(schedule.loads())
    layers = [stage for stage in stages if stage.kind == "layer"]
    hooks = (context.family.hooks(config, stage.layer or 0) for stage in layers)
    widest = max((math.prod(width) for shown in hooks for width in shown.values()), default=config.hidden)
    rows = max(batch.rows.stop - batch.rows.start for batch in table.microbatches)
    logits = config.vocab if Stage("head") in stages else 0
    where = context.dtype, context.device
    copied = {stage: layout[stage].copied(*where) for stage in stages}
    apart = {stage: sum(aligned(slot, context.dtype) for slot in layout[stage].fields.values()) for stage in stages}
    routed = [stage for stage in stages if layout[stage].experts]
    masked = max(group.length if group.mask is not None else 0 for part in table.microbatches for group in part.groups)
    whole = max((layout[stage].elements * itemsize for stage in stages), default=0)
    return Costs(
        weights={stage: layout[stage].size for stage in stages},
        resident=2 * max(sum(copied[stage] for stage in group) for group in schedule.groups),
        experts={stage: layout[stage].size - layout[stage].own_size for stage in routed},
        streamed=2 * max(sum(apart[stage] for stage in group) for group in schedule.groups)
        + 2 * max((layout[stage].largest_expert(context.dtype) for stage in routed), default=0),
        mapped=2 * max((layout[stage].mapped_experts(*where) for stage in routed), default=0),
        reference=whole if verify else 0,
        row=max((_routed_row(context, stage, masked) for stage in routed), default=0),
        residual=table.rows * config.hidden * itemsize if len(schedule.groups) > 1 else 0,
        microbatch=rows * (6 * config.hidden + 3 * widest + logits) * itemsize,
        outputs=outputs,
        states=max(sum(states[stage] for stage in group) for group in schedule.groups),
        flops=2.0 * sum(layout[stage].elements for stage in layers) * table.rows,
    )
