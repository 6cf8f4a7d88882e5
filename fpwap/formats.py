"""Stored weight formats that checkpoints are trained or published in, decoded one piece at a time.

* **fp8 blocks** (DeepSeek-V3 technical report, section 3.3): float8 e4m3 values, one fp32 scale for each block of a
  matrix; blocks at the right and lower edge may be short.
* **mxfp4** (OCP Microscaling Formats v1.0): 32 four-bit e2m1 values share an eight-bit exponent.

Both are computed with as published: decoded to the model's dtype, one rounding. Any other ``quantization_config`` is
refused by name. Knows neither files nor models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import ModelError
from .foreign import shown

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The sixteen values of four bits."""
BIAS = 127
"""Of the shared exponents."""
LARGEST_BLOCK = 1 << 12
"""Rows or columns of a block; scales are spread out over it when it is decoded."""
SCRATCH = 1 << 20
"""Values that are decoded at once."""


@dataclass(frozen=True)
class Quantisation:
    """What a ``quantization_config`` says. block: rows and columns that one fp8 scale covers; None for mxfp4."""

    method: str
    block: tuple[int, int] | None = None


ACCEPTED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "fp8": {
        "activation_scheme": ("dynamic",),
        "dequantize": (False, True),
        "expert_dtype": ("fp8", None),
        "fmt": ("e4m3", None),
        "modules_to_convert": (None,),
        "scale_fmt": ("float", "ue8m0", None),
    },
    "mxfp4": {"dequantize": (False, True)},
}
"""Method -> keys of its config and the values that mean what is computed here; all else is refused."""
SAID_BY_DTYPES = "modules_to_not_convert"
"""A key that need not be read: which tensors are quantised is told by how they are stored."""


def quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """What ``config.json`` says of quantised weights. Raises `ModelError` for all but the two formats."""
    found = config.get("quantization_config")
    if not found:
        return None
    if not isinstance(found, Mapping) or "quant_method" not in found:
        raise ModelError(f"'quantization_config' must be a mapping with 'quant_method', not {shown(found)}")
    method = found["quant_method"]
    accepted = ACCEPTED.get(method) if isinstance(method, str) else None
    if accepted is None:
        known = " and ".join(ACCEPTED)
        raise ModelError(
            f"weights quantised with {shown(method)} are not supported; supported: {known}, decoded as published"
        )
    read = {"quant_method", SAID_BY_DTYPES, *(["weight_block_size"] if method == "fp8" else [])}
    for key in sorted(set(found) - read):
        if key not in accepted or found[key] not in accepted[key]:
            raise ModelError(
                f"'quantization_config' of {method} holds {shown(key)} = {shown(found[key])}, which is not supported"
            )
    if method == "mxfp4":
        return Quantisation(method)
    block = found.get("weight_block_size")
    sides = block if isinstance(block, list | tuple) else ()
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= LARGEST_BLOCK for side in sides):
        raise ModelError(
            f"fp8 weights need 'weight_block_size', two positive integers, not {shown(block)} (at most {LARGEST_BLOCK})"
        )
    return Quantisation(method, (sides[0], sides[1]))


def fp8_blocks(values: Tensor, scales: Tensor, block: tuple[int, int], out: Tensor) -> None:
    """``out [r, c] = values [r, c] * scales``, where ``scales [ceil(r / b0), ceil(c / b1)]`` is fp32, rounded once."""
    rows, columns = values.shape
    across = scales.float().repeat_interleave(block[1], dim=1)[:, :columns]
    for strip, first in enumerate(range(0, rows, block[0])):
        part = slice(first, first + block[0])
        out[part] = values[part].float() * across[strip]


def mxfp4(blocks: Tensor, scales: Tensor, out: Tensor) -> None:
    """``out [r, groups * 32]`` from uint8 ``blocks [r, groups, 16]``, the low half of a byte first, and uint8
    ``scales [r, groups]``, the exponents of two plus 127.
    """
    table = torch.tensor(E2M1)
    rows = max(1, SCRATCH // (blocks.shape[1] * 32))
    for first in range(0, len(blocks), rows):
        part = slice(first, first + rows)
        halves = torch.stack((blocks[part] & 15, blocks[part] >> 4), dim=-1).flatten(-2)
        exponents = scales[part].to(torch.int32)[..., None] - BIAS
        out[part] = torch.ldexp(table[halves.int()], exponents).flatten(-2)
