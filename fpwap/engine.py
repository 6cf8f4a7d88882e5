"""The loop: layers outside, microbatches inside.

    for every wave, for every layer group:
        for every microbatch (or chunk of them, where a layer's weights are streamed through it):
            read its residual rows, go through the group's stages, write them back
            (a stage's weights are there from its first visit to its last; the next are read meanwhile)
        commit what the group's layers put out
        (between two visits what a run needs that goes on from there may be made durable)

The only place where the parts meet. It decides nothing: the order is the schedule's, the numbers are the family's, what
is shown to whom is the taps'.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from archs.batch import Batch
from archs.contract import Family

from .commits import Committing
from .plan import KEPT_ROWS, Plan
from .profile import Recorder
from .progress import Progress
from .prompts import Microbatch, TokenTable
from .residual import Residual
from .schedule import Point, Stage, Step
from .store import Store
from .taps import Reached, Taps
from .watch import Watcher
from .weights import Weights


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a sweep is joined from; each part is opened and closed by the caller.

    flush: waits until every output that was shown to a callback has reached the store. start: where the parts stand.
    """

    plan: Plan
    family: Family
    config: Any
    table: TokenTable
    weights: Weights
    residual: Residual
    taps: Taps
    store: Store
    flush: Callable[[], None]
    recorder: Recorder
    progress: Progress
    watcher: Watcher
    commits: Committing
    start: Point
    loaded: dict[Stage, Any] = field(default_factory=dict)
    batches: dict[range, Batch] = field(default_factory=dict)
    shared: dict[Any, object] = field(default_factory=dict)


@torch.no_grad()
def sweep(parts: Parts) -> None:
    """Runs every step of the schedule; returns when every output is committed."""
    schedule, taps, table = parts.plan.schedule, parts.taps, parts.table
    taps.start_layer(None)
    for step, following in pairwise(chain(schedule.steps(parts.start), (None,))):
        assert step is not None
        stages = schedule.groups[step.group]
        layers = [stage.layer for stage in stages if stage.layer is not None]
        if step.first:
            for layer in layers:
                taps.start_layer(layer)
        same = following is not None and (following.wave, following.group) == (step.wave, step.group)
        with parts.recorder.span("residual", stages[0].label):
            _visit(parts, step, table.joined(step.microbatches), following if same else None)
            if step.last:
                parts.residual.turn()
                taps.settle()
        if step.last and step.wave == len(schedule.waves) - 1:
            for layer in layers:
                _commit(parts, layer)
        if following is not None:
            with parts.recorder.span("commit", stages[-1].label):
                parts.commits.after(step, _first_row(parts, following))
    _commit(parts, None)


def _visit(parts: Parts, step: Step, microbatch: Microbatch, following: Step | None) -> None:
    """One microbatch through the stages of one group. following: the group's next visit, whose rows may come nearer."""
    plan, recorder = parts.plan, parts.recorder
    stages = plan.schedule.groups[step.group]
    moved = microbatch.rows.start - _first_row(parts, step)

    def within_wave(rows: slice) -> slice:
        return slice(rows.start - moved, rows.stop - moved)

    with recorder.span("residual", stages[0].label):
        batch = _batch(parts, step.microbatches, microbatch)
        x = torch.empty(len(batch.ids), parts.config.hidden, dtype=plan.dtype, device=plan.device)
        x[batch.tokens :] = 0
        if stages[0].kind != "embed":
            real = x[: batch.tokens]
            parts.residual.read(within_wave(microbatch.rows), real)
            recorder.count("residual_read", real.nbytes)
            if following is not None:
                parts.residual.fetch(within_wave(parts.table.joined(following.microbatches).rows))
    for stage in stages:
        passed = _through(parts, step, stage, x, batch, microbatch)
        if passed is None:
            break
        x = passed
    if step.group < len(plan.schedule.groups) - 1:
        with recorder.span("residual", stages[-1].label):
            real = x[: batch.tokens]
            parts.residual.write(within_wave(microbatch.rows), real)
            recorder.count("residual_written", real.nbytes)
    parts.taps.settle(all=False)


def _first_row(parts: Parts, step: Step) -> int:
    """Where a visit begins among its wave's rows."""
    table, wave = parts.table.microbatches, parts.plan.schedule.waves[step.wave]
    return int(table[step.microbatches.start].rows.start - table[wave.start].rows.start)


def _batch(parts: Parts, which: range, microbatch: Microbatch) -> Batch:
    """A microbatch as the maths wants it; the same object at every layer, while there are not too many rows."""
    plan = parts.plan
    if which in parts.batches:
        return parts.batches[which]
    batch = parts.table.batch(
        microbatch,
        device=plan.device,
        height=plan.height,
        sparse_height=plan.sparse_height,
        attention=plan.attention,
        shared=parts.shared,
    )
    if plan.height is not None and plan.rows <= KEPT_ROWS:  # padded batches hold masks, which are large
        parts.batches[which] = batch
    return batch


def _through(parts: Parts, step: Step, stage: Stage, x: Tensor, batch: Batch, microbatch: Microbatch) -> Tensor | None:
    """One stage of a visit, from its weights' arrival to their release; None: the last wanted site is behind us."""
    recorder, weights, loaded = parts.recorder, parts.weights, parts.loaded
    if step.first:
        with recorder.span("load", stage.label):
            loaded[stage] = weights.acquire(stage)
    passed: Tensor | None = None
    with recorder.span("forward", stage.label), contextlib.suppress(Reached):
        passed = _forward(parts, stage, loaded[stage], x, batch, microbatch)
    parts.progress.step(stage.label)
    if step.last:
        if step.wave == len(parts.plan.schedule.waves) - 1:
            with recorder.span("verify", stage.label):
                parts.watcher.end(stage, loaded[stage])
        del loaded[stage]
        weights.release(stage)
    return passed


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


def _logits(parts: Parts, head: Any, x: Tensor, batch: Batch, microbatch: Microbatch) -> None:
    """Logits of the wanted rows only: a tile at a time, or all at once where the head is read piece by piece."""
    height = batch.height
    at_once = batch.tokens if Stage("head") in parts.plan.schedule.streamed else height
    for chunk in parts.taps.head_chunks(microbatch, at_once):
        wanted = x if chunk.rows is None else x[chunk.rows]
        if height is not None and len(wanted) % height:
            wanted = torch.cat((wanted, wanted.new_zeros(-len(wanted) % height, wanted.shape[1])))
        parts.taps.show_logits(parts.family.logits(wanted, head.pieces(), parts.config, batch), chunk)


def _commit(parts: Parts, layer: int | None) -> None:
    """A layer is done in every wave: its callbacks end, its files get their names."""
    with parts.recorder.span("commit", "run" if layer is None else str(layer)):
        parts.flush()
        for (at, hook), artifact in parts.taps.end_layer(layer):
            parts.store.artifact(at, hook, artifact)
        parts.store.commit(parts.taps.sites_of(layer))
