"""The loop: layers outside, microbatches inside.

    for every wave, for every layer group:
        wait for the group's weights (the next group's are being read meanwhile)
        for every microbatch (or chunk of them, where experts are streamed):
            read its residual rows, go through the group's stages, write them back
        commit what the group's layers put out

The only place where the parts meet. It decides nothing: the order is the schedule's, the numbers are the family's, what
is shown to whom is the taps'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from archs.batch import Batch
from archs.contract import Family

from .plan import Plan
from .profile import Recorder
from .progress import Progress
from .prompts import Microbatch, TokenTable
from .residual import Residual
from .schedule import Stage
from .store import Store
from .taps import Reached, Taps
from .watch import Watcher
from .weights import Weights


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a sweep is joined from; each part is opened and closed by the caller."""

    plan: Plan
    family: Family
    config: Any
    table: TokenTable
    weights: Weights
    residual: Residual
    taps: Taps
    store: Store
    recorder: Recorder
    progress: Progress
    watcher: Watcher


@torch.no_grad()
def sweep(parts: Parts) -> None:
    """Runs every step of the schedule; returns when every output is committed."""
    schedule, taps = parts.plan.schedule, parts.taps
    loaded: dict[Stage, Any] = {}
    shared: dict[Any, object] = {}
    taps.start_layer(None)
    for step in schedule.steps():
        stages = schedule.groups[step.group]
        layers = [stage.layer for stage in stages if stage.layer is not None]
        if step.first:
            for stage in stages:
                with parts.recorder.span("load", stage.label):
                    loaded[stage] = parts.weights.acquire(stage)
            if step.wave == 0:
                for layer in layers:
                    taps.start_layer(layer)
        final = step.group == len(schedule.groups) - 1
        _visit(parts, stages, loaded, parts.table.joined(step.microbatches), shared, keep=not final)
        parts.progress.step(stages[-1].label)
        if step.last:
            parts.residual.turn()
            for stage in stages:
                with parts.recorder.span("verify", stage.label):
                    parts.watcher.end(stage, loaded[stage])
            loaded.clear()
            for stage in stages:
                parts.weights.release(stage)
            if step.wave == len(schedule.waves) - 1:
                for layer in layers:
                    _commit(parts, layer)
    _commit(parts, None)


def _visit(
    parts: Parts,
    stages: Sequence[Stage],
    loaded: dict[Stage, Any],
    microbatch: Microbatch,
    shared: dict[Any, object],
    *,
    keep: bool,
) -> None:
    """One microbatch through the stages of one group."""
    plan, recorder = parts.plan, parts.recorder
    with recorder.span("residual", stages[0].label):
        batch = parts.table.batch(
            microbatch,
            device=plan.device,
            height=plan.height,
            sparse_height=plan.sparse_height,
            attention=plan.attention,
            shared=shared,
        )
        x = torch.zeros(len(batch.ids), parts.config.hidden, dtype=plan.dtype, device=plan.device)
        real = x[: batch.tokens]
        if stages[0].kind != "embed":
            parts.residual.read(microbatch.rows, real)
            recorder.count("residual_read", real.nbytes)
    try:
        for stage in stages:
            with recorder.span("forward", stage.label):
                x = _forward(parts, stage, loaded[stage], x, batch, microbatch)
    except Reached:
        return
    if keep:
        with recorder.span("residual", stages[-1].label):
            real = x[: batch.tokens]
            parts.residual.write(microbatch.rows, real)
            recorder.count("residual_written", real.nbytes)


def _forward(parts: Parts, stage: Stage, w: Any, x: Tensor, batch: Batch, microbatch: Microbatch) -> Tensor:
    """One stage's maths, between its taps."""
    family, config = parts.family, parts.config
    tap = parts.watcher.tap(parts.taps.at(stage, microbatch), stage, microbatch)
    match stage.kind:
        case "embed":
            return tap("embedding", family.embed(w, config, batch))
        case "layer":
            assert stage.layer is not None
            return family.block(x, w, config, stage.layer, batch, tap)
        case "norm":
            return tap("final_norm", family.final_norm(x, w, config, batch))
        case "head":
            _logits(parts, w, x, batch, microbatch)
            return x


def _logits(parts: Parts, w: Any, x: Tensor, batch: Batch, microbatch: Microbatch) -> None:
    """Logits of the wanted rows only, a chunk at a time."""
    height = batch.height
    for chunk in parts.taps.head_chunks(microbatch, height):
        wanted = x if chunk.rows is None else x[chunk.rows]
        if height is not None and len(wanted) % height:
            wanted = torch.cat((wanted, wanted.new_zeros(-len(wanted) % height, wanted.shape[1])))
        parts.taps.show_logits(parts.family.unembed(wanted, w, parts.config, batch), chunk)


def _commit(parts: Parts, layer: int | None) -> None:
    """A layer is done in every wave: its callbacks end, its files get their names."""
    with parts.recorder.span("commit", "run" if layer is None else str(layer)):
        for (at, hook), artifact in parts.taps.end_layer(layer):
            parts.store.artifact(at, hook, artifact)
        parts.store.commit(parts.taps.sites_of(layer))
