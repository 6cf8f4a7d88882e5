"""From a request to everything that a run needs, before anything is opened for writing or put on a device.

Config, headers and lengths in; sites, token table and plan out. No tensor is read.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import archs
from archs.batch import Attention
from archs.contract import ArchError, Family, routed

from . import hub, machine, rates
from .callbacks.base import Callback
from .checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    Entry,
    entries_of,
    shard_names,
)
from .context import SweepContext
from .costs import products_s
from .counting import costs_of, shapes_of
from .errors import ModelError, RequestError
from .folder import REQUEST
from .foreign import is_plain, shown
from .formats import Quantisation, quantisation
from .parcels import Layout, lay_out, tensors_of
from .plan import Known, Plan, counted, make_plan, tile_heights
from .profile import Profile
from .prompts import Prompts, TokenTable, arrange
from .residual import Tier
from .schedule import Loading, Stage
from .sites import Targets, bind, check_positions, stage_of, where
from .ways import Budgets, Wanted

MOST_ROWS = 2**25
"""Bytes of a packed microbatch's residual rows by default, less than which they are on the CPU."""
MICROBATCH_HEIGHTS = 4
"""Tiles of a packed microbatch by default, at most: the fill of the last one is a few percent."""
AT_ONCE = 16
"""Headers that are asked of the hub at once."""
COLD = 0.1
"""Share of a checkpoint in the page cache up to which reading it says how fast the disk is."""
MOST_EXPERTS = 1 << 17
"""Of a model, in all its layers: what is listed of each takes time before anything is compared with the files."""
FOLLOWED = "verify=True follows a run from its beginning: if it is interrupted, it is begun again"
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
        routes = (routed(family.layer_weights(config, layer)).values() for layer in range(config.layers))
        experts = sum(getattr(config, route.count) for layer in routes for route in layer)
        if experts > MOST_EXPERTS:
            raise ModelError(f"config.json asks for {experts} experts in {config.layers} layers, beyond {MOST_EXPERTS}")
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
    coming: dict[str, Future[tuple[bytes, int | None]]] = {}

    def needed(places: Mapping[str, str]) -> set[str] | None:
        found = wanted(places)
        for shard in sorted({places[name] for name in (places if found is None else found)}):
            if not (model.files.folder / shard).is_file():
                coming[shard] = pool.submit(hub.header, model.files, shard)
        return found

    def header(shard: str) -> list[Entry]:
        found = coming[shard].result() if shard in coming else hub.header(model.files, shard)
        return entries_of(f"{shard} of {model.files.name}", shard, *found)

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
        shapes=shapes_of(layout, stages, context),
        noticed=(*targets.warnings, *_beyond_training(model, prompts), *([FOLLOWED] if request.verify else [])),
    )
    eager = attention == "eager" or any(hook == "attn_pattern" for own in targets.bound for _, hook in own)
    with machine.uncollected():
        costs = costs_of(
            layout, stages, callbacks, targets, context, table, height=height, eager=eager, verify=request.verify
        )
    budgets = Budgets(
        memory=min(machine.available_memory(), request.memory or sys.maxsize),
        device=0 if on_cpu else min(machine.device_memory(device), request.device_memory or sys.maxsize),
        disk=min(_free_disk(out), request.disk or sys.maxsize),
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


def learn(plan: Plan, profile: Profile, *, whole: bool) -> None:
    """Corrects the machine's rates by what a run has seen, for the next plan; not where others were at work too.

    whole: whether the last stage was computed to its end, which is what the plan counts.
    """
    if machine.crowded():
        return
    taken = profile.by_phase()
    cold = plan.loading == "stream" and plan.hot < COLD  # else it may have been the page cache's rate
    dtype = str(plan.dtype).removeprefix("torch.")
    apart = bool(plan.schedule.streamed)  # the maths waits for each expert and each slice of the head
    products = sum(products_s(cost.maths, plan.rates, dtype) for cost in plan.costs.stages.values())
    samples = rates.Samples(
        forward_s=0.0 if apart or not whole else (profile.on_device() or taken)["forward"],
        predicted_products_s=products,
        predicted_beside_s=plan.phases["forward"] - products,
        read=profile.bytes_moved().get("weights", 0) if cold else 0,
        read_s=profile.reading_s,
    )
    found = plan.rates.corrected(dtype, date.today(), samples)
    if found is not plan.rates:
        rates.save(found, plan.device)


def _free_disk(out: Path | None) -> int:
    """Bytes that a run may come to take in ``out``: those that an unfinished one there has taken are its own."""
    if out is None:
        return machine.free_disk(Path(tempfile.gettempdir()))
    return machine.free_disk(out) + (machine.held_disk(out) if (out / REQUEST).exists() else 0)


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

    On the CPU, for memory's sake, as few as fill well with prompts of this length, and no more than `MOST_ROWS` bytes.
    """
    tiles = MICROBATCH_HEIGHTS
    if device.type == "cpu" and height:
        tiles = min(tiles, -(-MICROBATCH_HEIGHTS * longest // height))
        tiles = max(1, min(tiles, (MOST_ROWS - 1) // (height * row)))
    return tiles * height


def stored_dtype(model: Model, checkpoint: Checkpoint) -> torch.dtype:
    """HF's rule: what the config names, else the first floating tensor's."""
    named = model.text.get("dtype") or model.text.get("torch_dtype") or checkpoint.first_floating() or torch.bfloat16
    said = named if is_plain(named) else str(named) if isinstance(named, torch.dtype) else shown(named)
    for dtype in COMPUTED:
        if said.removeprefix("torch.") == str(dtype).removeprefix("torch."):
            return dtype
    raise ModelError(f"{model.files.name} is made for {said}, which is not computed in: pass dtype='float32'")


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
