"""The sites that somebody wants, and the callbacks on them, as one `Tap` for each visit of a stage.

A block shows flat rows; a callback sees ``[b, s, ...]``: b prompts of one length s, no padding. Between the two stand
the microbatch's views. At one site all "read" callbacks come first, then "write" in order of registration, each seeing
the one before, then "read_after_write". Emits go to `write`, values written back go on into the block.

Also here: the end of a sweep (the last wanted site raises `Reached`, nothing past it is computed), the flag of an
interrupt (looked at at every tap), and non-finite values. Beside an accelerator nothing here waits for a value: which
rows are finite is sent to the host and looked at by `settle`. Files, weights and the order of steps are not known.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from archs.batch import Group

from .callbacks.base import Callback, Emit, LayerArtifact, Site, WriteBack
from .device import Device, Event
from .errors import CallbackError, FpwapError, NonFiniteError
from .prompts import Microbatch, View
from .schedule import Stage
from .sites import PHASES, where
from .store import Record

Index = TypeVar("Index", slice, Tensor, slice | Tensor)
LEAVING = frozenset({"embedding", "residual_post", "final_norm"})
"""Hooks at which the residual stream leaves a stage: there, and at the last wanted site, it is checked to be finite."""


class Reached(Exception):
    """The last wanted site is behind us; not an error."""


@dataclass(frozen=True)
class Piece:
    """Prompts of one length in one chunk of the head: which of its rows hold which positions of them."""

    view: View
    positions: list[int]
    rows: Tensor


@dataclass(frozen=True)
class HeadChunk:
    """Logits that are computed at once. rows: indices into the microbatch, on the device, None for all of it."""

    rows: Tensor | None
    pieces: list[Piece]
    callbacks: Sequence[Callback]


@dataclass(frozen=True)
class _Awaited:
    """Which rows of a value are finite, as the host will know when ``come`` has come; near: kept until then."""

    site: Site
    dtype: torch.dtype
    places: Iterable[tuple[View, Tensor]]
    near: Tensor
    finite: Tensor
    come: Event


class Taps:
    """All callbacks of a sweep, bound to their sites.

    sites: for each callback, in order of registration, the sites it targets. declare, write: where outputs go; what is
    written is in the record's dtype, on the device, and may be written over after the call. span: profile spans by
    phase. check: raises if the run is to stop. last: the last wanted site.
    """

    def __init__(
        self,
        callbacks: Sequence[Callback],
        sites: Sequence[Sequence[Site]],
        *,
        prompts: int,
        last: Site,
        declare: Callable[[Record], None],
        write: Callable[[Record, Tensor, Tensor], None],
        span: Callable[[str], AbstractContextManager[None]],
        check: Callable[[], None],
        device: Device,
    ) -> None:
        self._device = device
        self._flags = self._device.stream()
        self._awaited: list[_Awaited] = []
        self._earlier: list[_Awaited] = []  # of the visits before
        self._callbacks, self._sites = list(callbacks), [list(own) for own in sites]
        self.prompts, self.last = prompts, last
        self.span, self.check = span, check
        self._declare, self._write = declare, write
        self._at: dict[Site, list[Callback]] = {}
        for phase in PHASES:
            for callback, own in zip(self._callbacks, self._sites, strict=True):
                for site in own:
                    if callback.phase == phase:
                        self._at.setdefault(site, []).append(callback)
        self._started: list[int | None] = []  # layers that have not ended
        self._records: dict[tuple[int, Site, str | None], Record] = {}
        self._emitted: Counter[Record] = Counter()

    def on(self, site: Site) -> Sequence[Callback]:
        """The callbacks at a site, in the order in which they are called."""
        return self._at.get(site, ())

    def sites_of(self, layer: int | None) -> list[Site]:
        return [site for site in self._at if site[0] == layer]

    def at(self, stage: Stage, microbatch: Microbatch) -> "StageTap":
        return StageTap(self, stage, microbatch)

    # --- the life cycle of a layer ---

    def _of_layer(self, layer: int | None) -> Iterator[tuple[Callback, list[Site]]]:
        for callback, own in zip(self._callbacks, self._sites, strict=True):
            at_layer = [site for site in own if site[0] == layer]
            if at_layer:
                yield callback, at_layer

    def start_layer(self, layer: int | None) -> None:
        """`on_layer_start` of everybody who targets it, once; None stands for the model-level hooks."""
        if layer in self._started:
            return
        self._started.append(layer)
        for callback, sites in self._of_layer(layer):
            with self.span("callback"), Blame(callback, "on_layer_start", sites[0]):
                callback.on_layer_start(layer)

    def end_layer(self, layer: int | None) -> list[tuple[Site, LayerArtifact]]:
        """`on_layer_end`, after the layer's last wave: the artifacts. Every emitter must have emitted every prompt."""
        assert not self._earlier + self._awaited, "nothing is committed before it is known to be finite"
        for (index, site, _), record in self._records.items():
            if record.layer == layer and self._emitted[record] != self.prompts:
                raise CallbackError(
                    f"{type(self._callbacks[index]).__name__} emitted {self._emitted[record]} of {self.prompts} "
                    f"prompts at {where(site)}: a callback that emits at a site emits for every prompt"
                )
        artifacts: list[tuple[Site, LayerArtifact]] = []
        for callback, sites in self._of_layer(layer):
            with self.span("callback"), Blame(callback, "on_layer_end", sites[0]):
                made = callback.on_layer_end(layer)
                for artifact in [made] if isinstance(made, LayerArtifact) else list(made or ()):
                    artifacts.append((_site_of(artifact, sites), artifact))
        self._started.remove(layer)
        return artifacts

    # --- for a run that goes on later ---

    def state(self, keep: Callable[[Any], Any]) -> dict[str, Any]:
        """What the layers that have not ended have come to, JSON. keep: is given a callback's state, and gives JSON."""
        states = []
        for index, (callback, own) in enumerate(zip(self._callbacks, self._sites, strict=True)):
            for site in (site for site in own if site[0] in self._started):
                with self.span("callback"), Blame(callback, "state_dict", site):
                    states.append([index, *site, keep(callback.state_dict(*site))])
        emitted = [
            [index, name, record.file, self._emitted[record]]
            for (index, site, name), record in self._records.items()
            if site[0] in self._started
        ]
        return {"layers": list(self._started), "emitted": emitted, "states": states}

    def restore(self, state: Mapping[str, Any], records: Mapping[str, Record], fetch: Callable[[Any], Any]) -> None:
        """Goes on from where `state` said this. records: the store's, by file. fetch: what ``keep`` was given."""
        for layer in state["layers"]:
            self.start_layer(layer)
        for index, name, file, count in state["emitted"]:
            record = records[file]
            self._records[index, record.site, name] = record
            self._emitted[record] = count
        for index, layer, hook, kept in state["states"]:
            callback = self._callbacks[index]
            with self.span("callback"), Blame(callback, "load_state_dict", (layer, hook)):
                callback.load_state_dict(layer, hook, fetch(kept))

    # --- one call of one callback ---

    def call(self, callback: Callback, site: Site, acts: Tensor, view: View) -> Tensor | None:
        """Shows ``acts`` to a callback; returns what it wrote back."""
        self.check()
        with self.span("callback"), Blame(callback, "on_batch", site, view):
            returned = callback.on_batch(site[0], site[1], acts, view.sample_ids.clone())
            parts = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
            names = [part.name for part in parts if isinstance(part, Emit)]
            if len(set(names)) < len(names):
                raise _Wrong("emitted two outputs of one name at once; give them different names")
            written: Tensor | None = None
            for part in parts:
                if isinstance(part, Emit):
                    self._emit(callback, site, part, view)
                elif isinstance(part, WriteBack):
                    written = _checked(part, callback, acts)
                else:
                    raise _Wrong(f"returned a {type(part).__name__}; on_batch returns Emit, WriteBack, both or None")
        return written

    def _emit(self, callback: Callback, site: Site, emit: Emit, view: View) -> None:
        lead = (len(view.sample_ids),) if emit.per == "prompt" else (len(view.sample_ids), view.length)
        shape = tuple(emit.values.shape)
        if shape[: len(lead)] != lead:
            raise _Wrong(f"emitted shape {list(shape)} per {emit.per}; it must start with {list(lead)}")
        key = (self._callbacks.index(callback), site, emit.name)
        rest, dtype = shape[len(lead) :], emit.dtype or emit.values.dtype
        record = self._records.get(key)
        if record is None:
            name = emit.name or self._free_name(callback, site)
            record = Record(layer=site[0], hook=site[1], name=name, per=emit.per, rest=rest, dtype=dtype)
            if any(record.name == other.name for other in self._records_at(site)):
                raise _Wrong(f"emitted a second output named {record.name!r}; give one of them another name")
            self._records[key] = record
            self._declare(record)
        elif (record.per, record.rest, record.dtype) != (emit.per, rest, dtype):
            before = f"{list(record.rest)} {record.dtype} per {record.per}"
            raise _Wrong(f"emitted {list(rest)} {dtype} per {emit.per} after {before}: they must stay the same")
        with self.span("write"):
            self._write(record, emit.values.detach().to(dtype), view.sample_ids)
        self._emitted[record] += len(view.sample_ids)

    def _records_at(self, site: Site) -> list[Record]:
        return [record for (_, at, _), record in self._records.items() if at == site]

    def _free_name(self, callback: Callback, site: Site) -> str | None:
        """The first unnamed output of a site has no name, the next ones their callback's class name and a number."""
        taken = {record.name for record in self._records_at(site)}
        base = type(callback).__name__
        candidates = (None, base, *(f"{base}_{number}" for number in range(2, len(taken) + 3)))
        return next(name for name in candidates if name not in taken)

    # --- the head ---

    def head_chunks(self, microbatch: Microbatch, limit: int | None) -> Iterator[HeadChunk]:
        """Which rows' logits are wanted, and by whom.

        limit: rows of a chunk at most, whole prompts, for all callbacks together (packed). None: natural height, where
        bits depend on the number of rows; so each choice of positions is a chunk of its own, with the rows of HF's
        `logits_to_keep`, or of its plain forward for "all".
        """
        everyone = self.on((None, "logits"))
        if limit is not None:
            yield from self._packed_chunks(microbatch, limit, everyone)
            return
        choices: dict[tuple[int, ...] | str, list[Callback]] = {}
        for callback in everyone:
            asked = callback.positions
            choices.setdefault(asked if isinstance(asked, str) else tuple(asked), []).append(callback)
        for positions, callbacks in choices.items():
            rows = [_row_index(view)[:, resolve(positions, view.length)] for view in microbatch.views]
            taken = None
            if positions != "all":
                taken = self.near(torch.cat([some.flatten() for some in rows]))
                rows = _numbered(rows)
            pieces = [
                Piece(view, resolve(positions, view.length), some)
                for view, some in zip(microbatch.views, rows, strict=True)
            ]
            yield HeadChunk(taken, pieces, callbacks)

    def _packed_chunks(self, microbatch: Microbatch, limit: int, callbacks: Sequence[Callback]) -> Iterator[HeadChunk]:
        pieces: list[Piece] = []
        taken: list[Tensor] = []
        filled = 0
        for view in microbatch.views:
            union = sorted({p for callback in callbacks for p in resolve(callback.positions, view.length)})
            rows = _row_index(view)[:, union]
            step = max(1, limit // len(union))
            for first in range(0, len(rows), step):
                some = rows[first : first + step]
                if filled and filled + some.numel() > limit:
                    yield HeadChunk(self.near(torch.cat(taken)), pieces, callbacks)
                    pieces, taken, filled = [], [], 0
                part = View(view.sample_ids[first : first + step], view.length, slice(0, 0))
                pieces.append(Piece(part, union, torch.arange(filled, filled + some.numel()).view(some.shape)))
                taken.append(some.flatten())
                filled += some.numel()
        yield HeadChunk(self.near(torch.cat(taken)), pieces, callbacks)

    def show_logits(self, value: Tensor, chunk: HeadChunk) -> None:
        """``value [rows, vocab]`` of one chunk, to those who asked for it."""
        site: Site = (None, "logits")
        self.check_finite(value, site, ((piece.view, piece.rows) for piece in chunk.pieces))
        for piece in chunk.pieces:
            for callback in chunk.callbacks:
                chosen = [piece.positions.index(p) for p in resolve(callback.positions, piece.view.length)]
                self.call(callback, site, value[self.near(piece.rows[:, chosen])], piece.view)

    # --- rows of values, which lie on the device, by indices, which are made on the host ---

    def near(self, index: Index) -> Index:
        """An index for the device's values; nobody waits for the way there."""
        if isinstance(index, slice) or not self._device.asynchronous:
            return index
        host = self._device.pinned(index.nbytes).view(index.dtype).view(index.shape)
        host.copy_(index)
        out = torch.empty_like(index, device=self._device.torch)
        self._device.compute.copy(out, host)
        return out

    def sequences(self, value: Tensor, view: View) -> Tensor:
        """Flat rows -> ``[b, length, *rest]``; a view of ``value`` where the rows are contiguous."""
        if isinstance(view.rows, Tensor):
            return value[self.near(view.rows)]
        return rearrange(value[view.rows], "(b s) ... -> b s ...", s=view.length)

    def put(self, value: Tensor, view: View, chosen: slice | Tensor, written: Tensor) -> None:
        """The way back, of the chosen positions."""
        if isinstance(view.rows, Tensor):
            value[self.near(view.rows[:, chosen])] = written.to(value.dtype)
        else:
            self.sequences(value, view)[:, self.near(chosen)] = written.to(value.dtype)

    # --- non-finite values ---

    def check_finite(self, value: Tensor, site: Site, places: Iterable[tuple[View, Tensor]]) -> None:
        """Raises `NonFiniteError` naming site and prompt if a real row is infinite or NaN; beside an accelerator later.

        places: the prompts whose rows are in ``value``, and which.
        """
        if self._device.asynchronous:
            rows = value.flatten(1)
            near = rows.amax(1).isfinite() & rows.amin(1).isfinite()  # NaN is both; no copy of the value is made
            finite = self._device.pinned(len(near)).view(torch.bool)
            self._flags.wait(self._device.compute.record(near))
            self._flags.copy(finite, near)
            self._awaited.append(_Awaited(site, value.dtype, places, near, finite, self._flags.record(near, finite)))
        elif not torch.isfinite(value.sum(dtype=torch.float32)):
            _refuse(torch.isfinite(value).flatten(1).all(1).cpu(), value.dtype, site, places)

    def settle(self, *, all: bool = True) -> None:
        """Raises what `check_finite` found meanwhile. all: everything is waited for, else what was known a visit ago.

        Called with ``all=False`` when a visit's work has been launched, and for all of it before anything is committed.
        """
        known = self._earlier + self._awaited if all else self._earlier
        self._earlier, self._awaited = ([], []) if all else (self._awaited, [])
        for awaited in known:
            awaited.come.synchronize()
            if not awaited.finite.all():
                _refuse(awaited.finite, awaited.dtype, awaited.site, awaited.places)


def _refuse(finite: Tensor, dtype: torch.dtype, site: Site, places: Iterable[tuple[View, Tensor]]) -> None:
    """finite: bool per row, on the CPU. Rows that are nobody's may be anything."""
    for view, rows in places:
        sound = finite[rows].all(1)
        if not sound.all():
            narrow = dtype == torch.float16
            advice = "float16 is too narrow for this model, try dtype='bfloat16'" if narrow else "check the weights"
            sample = int(view.sample_ids[~sound][0])
            raise NonFiniteError(f"sample {sample} is infinite or NaN at {where(site)}: {advice}")


class StageTap:
    """`archs.contract.Tap` for one stage and one microbatch."""

    def __init__(self, taps: Taps, stage: Stage, microbatch: Microbatch) -> None:
        self._taps, self._stage, self._microbatch = taps, stage, microbatch
        self._pattern_rows = 0

    def wants(self, hook: str) -> bool:
        return bool(self._taps.on((self._stage.layer, hook)))

    def __call__(self, hook: str, value: Tensor, group: Group | None = None) -> Tensor:
        taps, site = self._taps, (self._stage.layer, hook)
        taps.check()
        callbacks = taps.on(site)
        if callbacks and group is not None:
            self._show_pattern(site, callbacks, value, group)
        elif callbacks:
            value = self._show_rows(site, callbacks, value)
        last = site == taps.last and (group is None or self._pattern_rows == self._microbatch.groups[-1].rows.stop)
        if group is None and (last or hook in LEAVING):
            rows = self._microbatch.rows
            places = ((view, _row_index(view)) for view in self._microbatch.views)
            taps.check_finite(value[: rows.stop - rows.start], site, places)
        if last:
            raise Reached
        return value

    def _show_rows(self, site: Site, callbacks: Sequence[Callback], value: Tensor) -> Tensor:
        if any(callback.phase == "write" for callback in callbacks):
            value = value.clone()  # what the block computed from stays as it was
        for view in self._microbatch.views:
            for callback in callbacks:
                chosen = select(callback.positions, view.length)
                acts = self._taps.sequences(value, view)[:, self._taps.near(chosen)]
                if not callback.borrows:
                    acts = acts.clone(memory_format=torch.contiguous_format)
                elif isinstance(chosen, slice) and chosen != slice(0, view.length):
                    acts = acts.contiguous()
                written = self._taps.call(callback, site, acts, view)
                if written is not None:
                    self._taps.put(value, view, chosen, written)
        return value

    def _show_pattern(self, site: Site, callbacks: Sequence[Callback], value: Tensor, group: Group) -> None:
        self._pattern_rows += group.prompts * group.length
        for view in self._microbatch.views:
            first = _row_index(view)[:, 0] - group.start  # of each prompt, in rows of this group
            if not 0 <= int(first[0]) < group.prompts * group.length:
                continue
            prompt, offset = first // group.length, first % group.length
            spans = [slice(int(start), int(start) + view.length) for start in offset]
            acts = torch.stack([value[p, :, s, s] for p, s in zip(prompt.tolist(), spans, strict=True)])
            for callback in callbacks:
                chosen = select(callback.positions, view.length)
                self._taps.call(
                    callback,
                    site,
                    acts[:, :, self._taps.near(chosen)].clone(memory_format=torch.contiguous_format),
                    view,
                )


def resolve(positions: str | Sequence[int], length: int) -> list[int]:
    """``"all"``, ``"last"`` or positions, negative ones from the end -> indices into a prompt of this length."""
    if isinstance(positions, str):
        return list(range(length)) if positions == "all" else [length - 1]
    return [position % length if -length <= position < length else _outside(position, length) for position in positions]


def select(positions: str | Sequence[int], length: int) -> slice | Tensor:
    """What selects these positions of a prompt: a slice where they are neighbours in order, else indices."""
    found = resolve(positions, length)
    neighbours = slice(found[0], found[0] + len(found))
    return neighbours if found == list(range(neighbours.start, neighbours.stop)) else torch.tensor(found)


def _outside(position: int, length: int) -> int:
    raise AssertionError(f"position {position} of a prompt of {length} tokens: the request was not checked")


def _numbered(rows: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of these shapes that count through, 0 at the first element of the first."""
    places = torch.split(torch.arange(sum(some.numel() for some in rows)), [some.numel() for some in rows])
    return [place.view(some.shape) for place, some in zip(places, rows, strict=True)]


def _row_index(view: View) -> Tensor:
    """The view's rows as indices ``[b, length]``."""
    if isinstance(view.rows, Tensor):
        return view.rows
    return torch.arange(view.rows.start, view.rows.stop).view(-1, view.length)


def _site_of(artifact: LayerArtifact, sites: Sequence[Site]) -> Site:
    if artifact.hook is None and len(sites) > 1:
        raise _Wrong(f"returned artifact {artifact.name!r} without hook=, but targets several hooks")
    found = [site for site in sites if artifact.hook in (None, site[1])]
    if not found:
        raise _Wrong(f"returned artifact {artifact.name!r} for hook {artifact.hook!r}, which it does not target")
    return found[0]


def _checked(part: WriteBack, callback: Callback, acts: Tensor) -> Tensor:
    if callback.phase != "write":
        raise _Wrong(f"returned WriteBack in phase {callback.phase!r}; only phase 'write' may")
    if part.values.shape != acts.shape:
        raise _Wrong(f"wrote back shape {list(part.values.shape)} where acts had {list(acts.shape)}")
    return part.values


class _Wrong(Exception):
    """What a callback did wrong, said by us; `Blame` adds who and where."""


class Blame(AbstractContextManager[None]):
    """Turns whatever a callback raises into a `CallbackError` that names it, its site and the samples."""

    def __init__(self, callback: Callback, method: str, site: Site | None = None, view: View | None = None) -> None:
        self._callback, self._method, self._site, self._view = callback, method, site, view

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, FpwapError) or not isinstance(error, Exception):
            return
        words = f"{type(self._callback).__name__}.{self._method}"
        if self._site is not None:
            words += f" at {where(self._site)}"
        if self._view is not None:
            ids = self._view.sample_ids
            words += f", samples {ids[:5].tolist()}{'...' * (len(ids) > 5)}"
        what = str(error) if isinstance(error, _Wrong) else f"raised {type(error).__name__}: {error}"
        raise CallbackError(f"{words}: {what}") from error
