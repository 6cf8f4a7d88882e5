"""A microbatch: its tokens, where its sequences lie, and how its matrices are multiplied.

Everything in a block but attention sees flat rows ``[rows, width]``, one row a token. `Batch` is the only way from rows
to sequences: neighbouring prompts of one length form a `Group`, contiguous rows that reshape to
``[prompts, length, ...]`` without a copy.

A batch runs its row-wise maths in one of two ways:

* **natural height** (``height=None``, padded mode): every operation on all rows at once, exactly as HF does it;
* **fixed height** (packed mode): in tiles of ``height`` rows. The bits of a GEMM row depend on the number of rows of
  the call, but at one number neither on the row's place nor on the other rows; so at fixed height a prompt's bits
  depend on the prompt alone. The rows are filled up to whole tiles, ``rows >= tokens``; fill rows are never read.

The module does not know what a prompt, a layer or a weight is.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Attention = Literal["sdpa", "eager"]
T = TypeVar("T")

VECTOR = 64
"""Elements that one step of torch's vectorised CPU loops covers, at most (two AVX-512 registers of bf16)."""
GRAIN = 32768
"""``at::internal::GRAIN_SIZE``: elements per thread below which torch uses fewer threads."""


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring prompts of one length: rows ``start .. start + prompts * length``.

    mask: None when every row is a real token; else bool ``[prompts, length]``, False at pad rows (padded mode).
    longest: tokens of the longest prompt; below ``length`` only where every prompt was padded by the user.
    """

    start: int
    prompts: int
    length: int
    longest: int
    mask: Tensor | None = None

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.prompts * self.length)

    def sequences(self, flat: Tensor) -> Tensor:
        """``[rows, *rest]`` of the whole batch -> this group's ``[prompts, length, *rest]``, a view."""
        return rearrange(flat[self.rows], "(b s) ... -> b s ...", b=self.prompts)


@dataclass(frozen=True)
class Batch:
    """One microbatch, for as long as it is visited.

    ids, positions: int64 ``[rows]``; positions count real tokens of a prompt from 0 (HF's ``mask.cumsum(-1) - 1``).
    groups: cover the first ``tokens`` rows in order. Rows after them are fill.
    height: rows of a tile, None for natural height, where each group is HF's batch and a tile of its own.
    sparse_height: rows of a tile of what only some rows go through (experts); None where ``height`` is.
    attention: which of HF's implementations to reproduce.
    shared: what is built once and is good for every batch of a sweep (tables, causal masks); own: what holds here only.
    """

    ids: Tensor
    positions: Tensor
    groups: tuple[Group, ...]
    height: int | None
    attention: Attention = "sdpa"
    sparse_height: int | None = None
    shared: dict[Hashable, object] = field(default_factory=dict, repr=False)
    own: dict[Hashable, object] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        last = self.groups[-1]
        return last.start + last.prompts * last.length

    def once(self, key: Hashable, build: Callable[[], T], *, shared: bool = False) -> T:
        """What ``build`` returns, built at the first call with this key and kept for this batch (or for the sweep)."""
        memo = self.shared if shared else self.own
        if key not in memo:
            memo[key] = build()
        return memo[key]  # type: ignore[return-value]

    def tiles(self, rows: int) -> Iterator[slice]:
        """The slices that row-wise maths on ``rows`` rows is cut into: at natural height one a group, or one in all."""
        if self.height is None:
            groups = [group.rows for group in self.groups] if rows == len(self.ids) else [slice(0, rows)]
            return iter(groups)
        height = self.height
        assert rows % height == 0, f"{rows} rows are not whole tiles of {height}"
        return (slice(start, start + height) for start in range(0, rows, height))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [rows, in] @ weight.T + bias``, weight ``[out, in]``; `torch.nn.functional.linear` tile by tile."""
        if self.height is None:
            return self.rows(lambda tile: F.linear(tile, weight, bias), x)
        return self._gemm(x, weight.t(), bias)

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``x [rows, in] @ weight + bias``, weight ``[in, out]``: what HF calls ``Conv1D``; `torch.addmm` by tiles."""
        if self.height is None:
            return self.rows(lambda tile: torch.addmm(bias, tile, weight), x)
        return self._gemm(x, weight, bias)

    def _gemm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = x.new_empty(len(x), weight.shape[1])
        for tile in self.tiles(len(x)):
            if bias is None:
                torch.mm(x[tile], weight, out=out[tile])
            else:
                torch.addmm(bias, x[tile], weight, out=out[tile])
        return out

    def rows(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``fn`` on ``x [rows, width]``, tile by tile; fn maps ``[n, width]`` to ``[n, any]``, each row for itself.

        What a tile passes through stays in the cache. And functions whose vectorised and scalar code differ in the last
        bit (silu, gelu, sigmoid) must run by tiles: which one an element gets depends on the tensor's size and on the
        threads.
        """
        out: Tensor | None = None
        for tile in self.tiles(len(x)):
            part = fn(x[tile])
            if len(part) == len(x):
                return part
            if out is None:
                out = part.new_empty(len(x), *part.shape[1:])
            out[tile] = part
        assert out is not None
        return out

    def few(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``fn`` on some rows only, ``x [n, width]``: at natural height one call, else tiles of ``sparse_height``.

        A tile is filled up with zero rows.
        """
        if self.sparse_height is None:
            return fn(x)
        height, n = self.sparse_height, len(x)
        filled = F.pad(x, (0, 0, 0, -n % height))
        return torch.cat([fn(tile) for tile in torch.split(filled, height)])[:n]


def fixed_height(minimum: int, widths: tuple[int, ...], threads: int) -> int:
    """The smallest tile height >= minimum at which no row of a tile of these widths meets a scalar tail.

    torch splits an element-wise call evenly over its threads and finishes each part with scalar code where the part is
    not a multiple of the vector length. A tile is safe if its parts are: ``height * width / parts`` a multiple of
    `VECTOR`. Most functions use a thread for every `GRAIN` elements, gelu all threads much earlier.
    """
    assert minimum > 0 and threads > 0

    def safe(height: int) -> bool:
        sizes = (height * width for width in widths)
        return not any(n % (parts * VECTOR) for n in sizes for parts in (min(threads, -(-n // GRAIN)), threads))

    height = -(-minimum // VECTOR) * VECTOR
    while not safe(height):
        height += VECTOR
    return height
