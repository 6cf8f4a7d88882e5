"""A checkpoint's blocks beside Hugging Face's layers: from the same input, on the same padded batch, equal bit for bit.

`verify` takes a checkpoint of any size, holding one layer at a time, ours and theirs. Needs transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from archs.batch import Attention, Batch, Group
from archs.contract import Family

from .device import open_device
from .errors import RequestError
from .prepare import open_checkpoint, open_model, pad_token, stored_dtype, to_device
from .prompts import ingest
from .reference import HFLayers
from .schedule import Stage
from .weights import Decoded, Head, Weights

SHOWN = 0.1
"""Relative distance below which a module of HF's is taken to show what one of our hooks does."""


# --- a padded batch -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rectangle:
    """Prompts padded on the right, as HF takes them: ids, mask, positions ``[b, s]``, on the device."""

    ids: Tensor
    mask: Tensor
    positions: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Tensor], pad: int, device: torch.device) -> "Rectangle":
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        return cls(ids.to(device), mask.to(device), positions.to(device))

    def flat(self, attention: Attention) -> Batch:
        """The same for our blocks: one group at natural height."""
        prompts, width = self.ids.shape
        real = self.mask.bool()
        group = Group(0, prompts, width, int(real.sum(-1).max()), None if bool(real.all()) else real)
        return Batch(self.ids.flatten(), self.positions.flatten(), (group,), None, attention=attention)

    def reversed(self) -> "Rectangle":
        """The same with every prompt's positions counted from its end."""
        ends = self.mask.sum(-1, keepdim=True) - 1
        return Rectangle(self.ids, self.mask, (ends - self.positions).clamp_min(0))

    def alone(self) -> "Iterator[tuple[int, Rectangle]]":
        """Each prompt as a batch of its own, without padding."""
        for row, length in enumerate(self.mask.sum(-1).tolist()):
            at = slice(row, row + 1), slice(0, length)
            yield row, Rectangle(self.ids[at], self.mask[at], self.positions[at])

    def pad(self, rows: Sequence[Tensor]) -> Tensor:
        """Each prompt's ``[length, width]`` -> ``[b, s, width]``; pads are zero."""
        out = rows[0].new_zeros(*self.ids.shape, rows[0].shape[-1])
        for prompt, own in enumerate(rows):
            out[prompt, : len(own)] = own
        return out

    def real(self, value: Tensor) -> Tensor:
        """``[b, s, ...] -> [tokens, ...]``."""
        return value[self.mask.bool()]


# --- one comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One hook of one layer, compared. place: the module of HF's layer that shows it, None for a part of the model.

    largest: absolute difference. ulps: in units of the last place, at most. share: of elements that differ.
    """

    layer: int | None
    hook: str
    place: str | None
    equal: bool
    largest: float
    ulps: int
    share: float

    @property
    def label(self) -> str:
        return f"{'model' if self.layer is None else f'layer {self.layer}'}, hook {self.hook!r}"


def compare(layer: int | None, hook: str, place: str | None, ours: Tensor, theirs: Tensor) -> Row:
    """Two tensors of the same elements; the shape behind the first dimension may be folded."""
    theirs = theirs.reshape(ours.shape)
    if ours.dtype != theirs.dtype and not ours.is_floating_point():
        theirs = theirs.to(ours.dtype)
    different = ours != theirs
    if ours.dtype == theirs.dtype and not bool(different.any()):
        return Row(layer, hook, place, True, 0.0, 0, 0.0)
    largest = float((ours.double() - theirs.double()).abs().nan_to_num(torch.inf).max())
    return Row(layer, hook, place, False, largest, _ulps(ours, theirs), float(different.double().mean()))


def _ulps(a: Tensor, b: Tensor) -> int:
    """The largest distance of two numbers of one dtype, counted in numbers between them."""
    if a.dtype != b.dtype or not a.is_floating_point():
        return 0
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    lowest = torch.iinfo(whole).min

    def ordered(x: Tensor) -> Tensor:
        bits = x.contiguous().view(whole).to(torch.int64)
        return torch.where(bits < 0, lowest - bits, bits)

    return int((ordered(a) - ordered(b)).abs().max())


def distance(a: Tensor, b: Tensor) -> float:
    """Relative root mean square of ``a - b`` against ``b``, in fp64."""
    b = b.double()
    return float((a.double() - b).norm() / b.norm().clamp_min(torch.finfo(torch.float64).tiny))


class _Recorder:
    """A tap that keeps everything that a block shows."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def __call__(self, hook: str, value: Tensor, group: Group | None = None) -> Tensor:
        if group is None:
            self.seen[hook] = value.clone()
        return value

    def wants(self, hook: str) -> bool:
        return hook != "attn_pattern"


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Our maths on one padded batch, as a function of weights."""

    family: Family
    config: Any
    attention: Attention
    batch: Rectangle

    def embed(self, weights: Any) -> Tensor:
        return self._shaped(self.family.embed(weights, self.config, self._flat()))

    def block(self, given: Tensor, weights: Any, layer: int) -> dict[str, Tensor]:
        """hook -> ``[b, s, ...]`` of everything that a block shows but the attention pattern."""
        recorder = _Recorder()
        self.family.block(given.flatten(0, 1).clone(), weights, self.config, layer, self._flat(), recorder)
        return {hook: self._shaped(value) for hook, value in recorder.seen.items()}

    def norm(self, given: Tensor, weights: Any) -> Tensor:
        return self._shaped(self.family.final_norm(given.flatten(0, 1), weights, self.config, self._flat()))

    def unembed(self, given: Tensor, head: Head) -> Tensor:
        return self._shaped(self.family.logits(given.flatten(0, 1), head.pieces(), self.config, self._flat()))

    def _flat(self) -> Batch:
        return self.batch.flat(self.attention)

    def _shaped(self, rows: Tensor) -> Tensor:
        return rows.view(*self.batch.ids.shape, *rows.shape[1:])


def compare_layer(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], layer: int, batch: Rectangle) -> list[Row]:
    """What our block shows beside what the modules of HF's layer take and give: a row for each hook that both show.

    Which module shows a hook is told by the values: one that is equal in every bit, else the nearest that does not so
    show another hook. A hook that none comes near has no row; "residual_post" always has one.
    """
    real = {hook: batch.real(value) for hook, value in ours.items()}
    places = {
        hook: {
            at: batch.real(other.reshape(value.shape))
            for at, other in theirs.items()
            if other.numel() == value.numel() and other.is_floating_point() == value.is_floating_point()
        }
        for hook, value in ours.items()
    }
    places["residual_post"] = {"residual_post": batch.real(theirs["residual_post"])}
    exact = {
        hook: [at for at, other in shown.items() if torch.equal(other, real[hook])] for hook, shown in places.items()
    }
    taken = {at for found in exact.values() for at in found}
    rows: list[Row] = []
    for hook, shown in places.items():
        free = {at: other for at, other in shown.items() if at not in taken}
        if exact[hook]:
            rows.append(compare(layer, hook, exact[hook][0], real[hook], shown[exact[hook][0]]))
        elif free:
            apart = {at: distance(other, real[hook]) for at, other in free.items()}
            nearest = min(free, key=lambda at: apart[at])
            if hook == "residual_post" or apart[nearest] < SHOWN:
                rows.append(compare(layer, hook, nearest, real[hook], free[nearest]))
    return rows


# --- a checkpoint ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `verify` found.

    unseen: hooks that no module of Hugging Face's comes near, in some layer. yardsticks: layer -> distance of
    residual_post (relative RMS) under a deliberately wrong rope, None where positions do not enter the layer.
    """

    model: str
    family: str
    numbers: str
    rows: tuple[Row, ...]
    unseen: tuple[str, ...]
    yardsticks: Mapping[int, float | None]

    @property
    def passed(self) -> bool:
        return all(row.equal for row in self.rows)

    @property
    def first(self) -> Row | None:
        """The first difference."""
        return next((row for row in self.rows if not row.equal), None)

    def summary(self) -> str:
        """One line a layer and hook, the first difference marked, and a verdict."""
        head = ("layer", "hook", "Hugging Face's module", "equal", "max abs", "max ulp", "differ")
        cells = [head]
        for row in self.rows:
            layer = "-" if row.layer is None else str(row.layer)
            sizes = ("", "", "") if row.equal else (f"{row.largest:.3g}", f"{row.ulps:,}", f"{row.share:.2%}")
            cells.append((layer, row.hook, row.place or "-", "yes" if row.equal else "NO", *sizes))
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        if self.first is not None:
            lines[1 + self.rows.index(self.first)] += "  <- first difference"
        felt = [score for score in self.yardsticks.values() if score is not None]
        scale = f"{min(felt):.2g} to {max(felt):.2g}" if felt else "nothing: positions do not enter these layers"
        equal = sum(row.equal for row in self.rows)
        return "\n".join(
            [
                f"{self.model}: {self.family}, {self.numbers}",
                *(line.rstrip() for line in lines),
                f"not shown by a module, and covered by what follows from them: {', '.join(self.unseen) or 'none'}",
                f"yardstick: positions in reverse put residual_post off by (relative RMS) {scale}",
                f"{'PASS' if self.passed else 'FAIL'}: {equal} of {len(self.rows)} comparisons are equal in every bit",
            ]
        )


@torch.no_grad()
def verify(
    model: str,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    attention: Attention | None = None,
    device: str = "cpu",
    revision: str | None = None,
) -> Report:
    """Compares a checkpoint with transformers, layer by layer, on one padded batch.

    prompts: token ids; by default four of random tokens. layers: by default all; the input of each is what HF made of
    the one before, or, where that was left out, of the last that was not. dtype: by default the checkpoint's own.

    Raises `FpwapError`s for models and requests that cannot be compared.
    """
    opened = open_model(model, revision)
    family, config = opened.family, opened.config
    checkpoint, layout = open_checkpoint(opened)
    place = to_device(device)
    implementations = family.implementations(config)
    kind = attention or implementations[0]
    if kind not in implementations:
        raise RequestError(f"attn_implementation {kind!r} is not one of {family.name}'s: {', '.join(implementations)}")
    chosen = range(config.layers) if layers is None else sorted({_layer(index, config.layers) for index in layers})
    dtype = dtype or stored_dtype(opened, checkpoint)
    table = ingest(
        _random(config) if prompts is None else prompts,
        vocab=config.vocab,
        seq_len=None,
        max_positions=config.max_positions,
        truncation="error",
        keep_metadata=False,
        keep_padding=False,
    )
    rows_of = [torch.from_numpy(table.tokens(sample).astype("int64")) for sample in range(table.n)]
    batch = Rectangle.of(rows_of, pad_token(opened), place)
    ours = Ours(family=family, config=config, attention=kind, batch=batch)
    wrong = Ours(family=family, config=config, attention=kind, batch=batch.reversed())
    decoded = None if opened.quantisation is None else Decoded(checkpoint, opened.quantisation, dtype)
    hf = HFLayers(checkpoint.folder, dtype, kind, place, decoded)

    tail = [stage for stage in (Stage("norm"), Stage("head")) if stage in layout]
    stages = [Stage("embed"), *(Stage("layer", layer) for layer in chosen), *tail]
    weights = Weights(
        checkpoint,
        layout,
        stages,
        loading="stream",
        ring=2,
        streamed=frozenset(stage for stage in stages if layout[stage].experts),
        rows=None,
        dtype=dtype,
        device=open_device(place),
        moved=lambda size, seconds: None,
    )
    rows: list[Row] = []
    unseen: dict[str, None] = {}
    yardsticks: dict[int, float | None] = {}
    try:
        for stage in stages:
            w = weights.acquire(stage)
            if stage.kind == "embed":
                stream = hf.embed(batch.ids, batch.mask, batch.positions)
                rows.append(compare(None, "embedding", None, batch.real(ours.embed(w)), batch.real(stream)))
            elif stage.kind == "layer":
                assert stage.layer is not None
                theirs = hf.everything(stage.layer, stream, batch.mask, batch.positions, batch.ids)
                shown = ours.block(stream, w, stage.layer)
                found = compare_layer(shown, theirs, stage.layer, batch)
                unseen |= dict.fromkeys(hook for hook in shown if hook not in {row.hook for row in found})
                rows += found
                off = distance(wrong.block(stream, w, stage.layer)["residual_post"], theirs["residual_post"])
                yardsticks[stage.layer] = off or None
                stream = theirs["residual_post"]
            elif stage.kind == "norm":
                normed = ours.norm(stream, w)
                expected, logits = hf.norm_and_logits(stream)
                rows.append(compare(None, "final_norm", None, batch.real(normed), batch.real(expected)))
            else:
                rows.append(compare(None, "logits", None, batch.real(ours.unembed(normed, w)), batch.real(logits)))
            weights.release(stage)
    finally:
        weights.close()
    numbers = f"{str(dtype).removeprefix('torch.')}, {kind}, {batch.mask.sum()} tokens in {len(batch.ids)} prompts"
    return Report(
        model=opened.files.name,
        family=family.name,
        numbers=numbers,
        rows=tuple(rows),
        unseen=tuple(unseen),
        yardsticks=yardsticks,
    )


def _layer(index: int, layers: int) -> int:
    if not -layers <= index < layers:
        raise RequestError(f"layer {index} is out of range: the model has layers 0 to {layers - 1}")
    return index % layers


def _random(config: Any) -> list[list[int]]:
    """Four prompts of random tokens, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    longest = min(config.max_positions or 64, 64)
    lengths = (longest, max(1, longest // 2), max(1, longest // 3), longest)
    return [torch.randint(config.vocab, (length,), generator=generator).tolist() for length in lengths]
