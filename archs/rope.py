"""Rotary position embedding (Su et al., 2021): frequencies, tables, rotation.

The scaled kinds are those of transformers' ``modeling_rope_utils``: linear (position interpolation), dynamic (NTK by
the length of the sequence), yarn (Peng et al., 2023), longrope (Ding et al., 2024) and llama3. All frequencies are
computed on the CPU in fp32: an accelerator's differ in the last bit.

Dynamic and longrope depend on the longest sequence of a batch. In packed mode that is the prompt alone; in padded mode
it is the longest prompt of the microbatch, as in a fresh Hugging Face model (a used one remembers longer batches).
Knows neither families nor files.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from .batch import Batch
from .contract import ArchError, Keys

KINDS = ("default", "linear", "dynamic", "llama3", "longrope", "yarn")
BY_LENGTH = ("dynamic", "longrope")
"""Kinds whose frequencies depend on the longest sequence."""
ALIASES = {"su": "longrope"}
"""Names of old files."""
LEAST = 1e-3
"""Of a factor by which positions are stretched."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """One rotary embedding in the words of ``rope_parameters``; ``dim`` is the rotated part of a head.

    short, long: of longrope, a divisor for each frequency up to ``original`` tokens and beyond.
    """

    kind: str
    dim: int
    theta: float
    max_positions: int
    factor: float = 1.0
    original: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    @classmethod
    def from_hf(
        cls, keys: Keys, head_dim: int, max_positions: int, theta: float = 10000.0, *, partial: float | None = None
    ) -> "Rope":
        """From ``rope_parameters`` (transformers 5) or ``rope_scaling`` and ``rope_theta`` (before).

        theta: the family's default. partial: the share of a head that is rotated where the config does not say; None
        for a family that always rotates whole heads.
        """
        scaled = keys.nested("rope_scaling" if keys.get("rope_scaling") else "rope_parameters")
        for name in ("rope_scaling", "rope_parameters"):
            keys.get(name)
        return cls.read(scaled, keys, head_dim, max_positions, keys.number("rope_theta", theta), partial=partial)

    @classmethod
    def read(
        cls, scaled: Keys, keys: Keys, head_dim: int, max_positions: int, theta: float, *, partial: float | None = None
    ) -> "Rope":
        """From the mapping of one rotary embedding; ``keys``: the config around it. Finishes ``scaled``."""
        theta = scaled.number("rope_theta", theta, above=1)
        kind = scaled.choice("rope_type" if "rope_type" in scaled else "type", "default", (*KINDS, *ALIASES))
        kind = ALIASES.get(kind, kind)
        scaled.get("type")
        rotated = 1.0 if partial is None else partial
        share = scaled.number("partial_rotary_factor", keys.number("partial_rotary_factor", rotated))
        if partial is None and share != 1.0:
            raise ArchError(f"'partial_rotary_factor' = {share} is not supported by this family")
        dim = int(head_dim * min(max(share, 0.0), 2.0))
        if dim < 2 or dim % 2 or dim > head_dim:
            raise ArchError(f"{dim} of {head_dim} dimensions of a head would be rotated: rotary embedding needs pairs")
        rope = cls(kind=kind, dim=dim, theta=theta, max_positions=max_positions)
        stored = scaled.size("original_max_position_embeddings", max_positions)
        original = keys.size("original_max_position_embeddings", stored)
        if kind in ("linear", "dynamic"):
            rope = dataclasses.replace(rope, factor=scaled.number("factor", least=LEAST))
        if kind == "dynamic" and dim == 2:
            raise ArchError("rope type 'dynamic' needs heads of which more than 2 dimensions are rotated")
        if kind in ("llama3", "yarn", "longrope"):
            rope = dataclasses.replace(rope, original=original)
        if kind == "llama3":
            rope = dataclasses.replace(
                rope,
                factor=scaled.number("factor", least=LEAST),
                low_freq_factor=(low := scaled.number("low_freq_factor", above=0)),
                high_freq_factor=scaled.number("high_freq_factor", above=low),
            )
        if kind == "yarn":
            rope = rope._yarn(scaled)
        if kind == "longrope":
            rope = rope._longrope(scaled)
        scaled.finish({"factor"})
        return rope

    def _longrope(self, scaled: Keys) -> "Rope":
        short, long = (scaled.sequence(key, float, self.dim // 2) for key in ("short_factor", "long_factor"))
        if short is None or long is None:
            raise ArchError("rope type 'longrope' needs 'short_factor' and 'long_factor'")
        if min(*short, *long) <= 0:
            raise ArchError("rope type 'longrope' needs positive numbers in 'short_factor' and 'long_factor'")
        factor = scaled.number("factor", self.max_positions / self.original, least=LEAST)
        if factor > 1 and self.original == 1:
            raise ArchError("rope type 'longrope' needs an 'original_max_position_embeddings' of more than 1")
        grown = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(self.original))
        return dataclasses.replace(
            self, short=short, long=long, attention_factor=scaled.number("attention_factor", grown, above=0)
        )

    def _yarn(self, scaled: Keys) -> "Rope":
        factor = scaled.number("factor", self.max_positions / self.original, least=LEAST)

        def mscale(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        num, den = (scaled.number(key, 0.0, least=0) for key in ("mscale", "mscale_all_dim"))
        grown = mscale(num) / mscale(den) if num and den else mscale(1)
        return dataclasses.replace(
            self,
            factor=factor,
            attention_factor=scaled.number("attention_factor", grown, above=0),
            beta_fast=scaled.number("beta_fast", 32.0, least=0) or 32.0,
            beta_slow=scaled.number("beta_slow", 1.0, least=0) or 1.0,
            truncate=scaled.flag("truncate", True),
        )

    def inv_freq(self, longest: int) -> Tensor:
        """fp32 ``[dim / 2]``, for a batch whose longest sequence has ``longest`` tokens (only `BY_LENGTH` care)."""
        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        if self.kind == "dynamic":
            return 1.0 / (self._dynamic_base(longest) ** exponents)
        if self.kind == "longrope":
            return 1.0 / (torch.tensor(self.long if longest > self.original else self.short) * self.theta**exponents)
        inv_freq = 1.0 / (self.theta**exponents)
        if self.kind == "linear":
            return inv_freq / self.factor
        if self.kind == "llama3":
            return self._llama3(inv_freq)
        if self.kind == "yarn":
            return self._blended(exponents)
        return inv_freq

    def _dynamic_base(self, longest: int) -> float | Tensor:
        """NTK base. Beyond the trained length transformers has the length as a tensor, so the maths is fp32 there."""
        length = torch.tensor(longest) if longest > self.max_positions else self.max_positions
        grown: float | Tensor = (self.factor * length / self.max_positions) - (self.factor - 1)
        return self.theta * grown ** (self.dim / (self.dim - 2))

    def _llama3(self, inv_freq: Tensor) -> Tensor:
        low, high = self.low_freq_factor, self.high_freq_factor
        wavelength = 2 * math.pi / inv_freq
        slow, fast = wavelength > self.original / low, wavelength < self.original / high
        scaled = torch.where(slow, inv_freq / self.factor, inv_freq)
        smooth = (self.original / wavelength - low) / (high - low)
        blended = (1 - smooth) * scaled / self.factor + smooth * scaled
        return torch.where(~fast & ~slow, blended, scaled)

    def _blended(self, exponents: Tensor) -> Tensor:
        def turns_at(rotations: float) -> float:
            return self.dim * math.log(self.original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = turns_at(self.beta_fast), turns_at(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        high = high + 0.001 if low == high else high
        kept = 1 - torch.clamp((torch.arange(self.dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
        powers = self.theta**exponents
        return 1.0 / (self.factor * powers) * (1 - kept) + 1.0 / powers * kept


def rotary(rope: Rope, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin ``[rows, 1, dim]`` at the batch's positions, computed in fp32 and rounded to ``dtype``."""

    def table(length: int, longest: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(length, dtype=torch.float32)[:, None] * rope.inv_freq(longest)
        angles = torch.cat((angles, angles), dim=-1)
        both = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
        cos, sin = (part.to(dtype).to(batch.ids.device)[:, None] for part in both)
        return cos, sin

    return batch.once((rope, dtype), lambda: _at_positions(rope, batch, dtype, table))


def rotary_complex(rope: Rope, batch: Batch) -> Tensor:
    """complex64 ``[rows, 1, dim / 2]``: cos + i sin at the batch's positions, times the attention factor."""

    def table(length: int, longest: int) -> tuple[Tensor]:
        angles = torch.arange(length, dtype=torch.float32)[:, None] * rope.inv_freq(longest)
        turns = torch.polar(torch.ones_like(angles), angles) * rope.attention_factor
        return (turns.to(batch.ids.device)[:, None],)

    return batch.once((rope, "complex"), lambda: _at_positions(rope, batch, "complex", table))[0]


T = TypeVar("T", bound=tuple[Tensor, ...])


def _at_positions(rope: Rope, batch: Batch, kind: Hashable, table: Callable[[int, int], T]) -> T:
    """Rows of ``table(length, longest)``, tensors ``[length, ...]``, at every row's position.

    One table serves a whole sweep, except where frequencies depend on the longest sequence.
    """
    if rope.kind not in BY_LENGTH:
        limit = 1 << max(group.length for group in batch.groups).bit_length()
        shared = batch.once((rope, kind, limit), lambda: table(limit, 0), shared=True)
        return tuple(part[batch.positions] for part in shared)  # type: ignore[return-value]
    out: list[Tensor] = []
    for group in batch.groups:
        parts = table(group.length, group.longest)  # not shared: one for every length would not fit
        out = out or [part.new_ones(len(batch.ids), *part.shape[1:]) for part in parts]
        for whole, part in zip(out, parts, strict=True):
            whole[group.rows] = part[batch.positions[group.rows]]
    return tuple(out)  # type: ignore[return-value]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x cos + rotate_half(x) sin`` for ``x [rows, heads, width]``, with the roundings of that sum.

    Where cos and sin are narrower than a head its last dimensions stay as they are; where they are fp32 the sum is, and
    the result is rounded to the dtype of x.
    """
    dim = cos.shape[-1]
    half, turned = dim // 2, x[..., :dim]
    out = turned * cos
    out[..., :half] -= turned[..., half:] * sin[..., :half]
    out[..., half:] += turned[..., :half] * sin[..., half:]
    return _with_rest(out, x)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for neighbouring dimensions: pair i of a head turns by frequency i, ``[x0 x1 x2 x3 ...]``."""
    dim = cos.shape[-1]
    cos, sin = cos[..., : dim // 2], sin[..., : dim // 2]
    even, odd = x[..., 0:dim:2], x[..., 1:dim:2]
    out = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return _with_rest(out, x)


def rotate_complex(x: Tensor, turns: Tensor) -> Tensor:
    """The same pairs as complex numbers in fp32: ``x [rows, heads, dim]`` times ``turns``, rounded to x's dtype."""
    pairs = torch.view_as_complex(rearrange(x.float(), "... (pairs two) -> ... pairs two", two=2).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def _with_rest(turned: Tensor, x: Tensor) -> Tensor:
    rest = x[..., turned.shape[-1] :]
    turned = turned.to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
