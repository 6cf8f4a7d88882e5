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

    def unembed(self, given: Tensor, weights: Any) -> Tensor:
        return self._shaped(self.family.unembed(given.flatten(0, 1), weights, self.config, self._flat()))

    def _flat(self) -> Batch:
        return self.batch.flat(self.attention)

    def _shaped(self, rows: Tensor) -> Tensor:
        return rows.view(*self.batch.ids.shape, *rows.shape[1:])


def compare_layer(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], layer: int, batch: Rectangle) -> list[Row]:
    """What our block shows beside what the modules of HF's layer take and give: a row for each hook that both show.

    Which module shows a hook is told by the values: of all that have as many elements, the nearest. A hook that none
    comes near has no row; "residual_post" always has one.
    """
    rows: list[Row] = []
    for hook, value in ours.items():
        own = batch.real(value)
        near, place, best = (0.0, "layer out", theirs["residual_post"])
        if hook != "residual_post":
            found = [
                (distance(batch.real(other.reshape(value.shape)), own), at, other)
                for at, other in theirs.items()
                if other.numel() == value.numel() and other.is_floating_point() == value.is_floating_point()
            ]
            near, place, best = min(found, key=lambda entry: entry[0], default=(torch.inf, "", value))
        if near < SHOWN:
            rows.append(compare(layer, hook, place, own, batch.real(best.reshape(value.shape))))
    return rows
