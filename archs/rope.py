"""Rotary position embedding (Su et al., 2021): frequencies, tables, rotation.

The scaled kinds are those of transformers' ``modeling_rope_utils``: linear (position interpolation), dynamic (NTK by
the length of the sequence), yarn (Peng et al., 2023) and llama3. All frequencies are computed on the CPU in fp32: an
accelerator's differ in the last bit. Knows neither families nor files.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Batch
from .contract import ArchError, Keys

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """One rotary embedding in the words of ``rope_parameters``; ``dim`` is the rotated part of a head."""

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

    @classmethod
    def from_hf(cls, keys: Keys, dim: int, max_positions: int, theta: float = 10000.0) -> "Rope":
        """From ``rope_parameters`` (transformers 5) or ``rope_scaling`` and ``rope_theta`` (before)."""
        scaled = keys.nested("rope_scaling" if keys.get("rope_scaling") else "rope_parameters")
        for name in ("rope_scaling", "rope_parameters"):
            keys.get(name)
        theta = scaled.number("rope_theta", keys.number("rope_theta", theta))
        kind = scaled.choice("rope_type" if "rope_type" in scaled else "type", "default", KINDS)
        scaled.get("type")
        if scaled.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0)) != 1.0:
            raise ArchError("partial_rotary_factor is not supported by this family")
        rope = cls(kind=kind, dim=dim, theta=theta, max_positions=max_positions)
        stored = scaled.size("original_max_position_embeddings", max_positions)
        original = keys.size("original_max_position_embeddings", stored)
        if kind in ("linear", "dynamic"):
            rope = dataclasses.replace(rope, factor=scaled.number("factor"))
        if kind in ("llama3", "yarn"):
            rope = dataclasses.replace(rope, original=original)
        if kind == "llama3":
            rope = dataclasses.replace(
                rope,
                factor=scaled.number("factor"),
                low_freq_factor=scaled.number("low_freq_factor"),
                high_freq_factor=scaled.number("high_freq_factor"),
            )
        if kind == "yarn":
            rope = rope._yarn(scaled)
        scaled.finish({"factor"})
        return rope

    def _yarn(self, scaled: Keys) -> "Rope":
        factor = scaled.number("factor", self.max_positions / self.original)

        def mscale(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        num, den = scaled.number("mscale", 0.0), scaled.number("mscale_all_dim", 0.0)
        return dataclasses.replace(
            self,
            factor=factor,
            attention_factor=scaled.number("attention_factor", mscale(num) / mscale(den) if num and den else mscale(1)),
            beta_fast=scaled.number("beta_fast", 32.0) or 32.0,
            beta_slow=scaled.number("beta_slow", 1.0) or 1.0,
            truncate=scaled.flag("truncate", True),
        )

    def inv_freq(self, longest: int) -> Tensor:
        """fp32 ``[dim / 2]``, for a batch whose longest sequence has ``longest`` tokens (only `dynamic` cares)."""
        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        if self.kind == "dynamic":
            return 1.0 / (self._dynamic_base(longest) ** exponents)
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

    def tables(length: int, longest: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(length, dtype=torch.float32)[:, None] * rope.inv_freq(longest)
        angles = torch.cat((angles, angles), dim=-1)
        both = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
        cos, sin = (table.to(dtype).to(batch.ids.device)[:, None] for table in both)
        return cos, sin

    def gather() -> tuple[Tensor, Tensor]:
        if rope.kind != "dynamic":
            limit = 1 << max(group.length for group in batch.groups).bit_length()
            cos, sin = batch.once((rope, dtype, limit), lambda: tables(limit, 0), shared=True)
            return cos[batch.positions], sin[batch.positions]
        cos = torch.empty(len(batch.ids), 1, rope.dim, dtype=dtype, device=batch.ids.device)
        cos[batch.tokens :] = 1
        sin = torch.zeros_like(cos)
        for group in batch.groups:
            table = tables(group.length, group.longest)  # not shared: one for every length would not fit
            cos[group.rows], sin[group.rows] = (part[batch.positions[group.rows]] for part in table)
        return cos, sin

    return batch.once((rope, dtype), gather)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x cos + rotate_half(x) sin`` for ``x [rows, heads, dim]``, with the roundings of that sum."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half] -= x[..., half:] * sin[..., :half]
    out[..., half:] += x[..., :half] * sin[..., half:]
    return out
