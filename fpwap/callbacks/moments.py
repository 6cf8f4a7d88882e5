"""Principal axes of rows that come a few at a time: exact, mergeable, the same bits for the same order of rows.

While there are no more rows than columns the rows themselves are kept, in the dtype they came in, and a thin SVD of
the centred rows ends it. Beyond that, blocks of rows are absorbed into count, mean and scatter, each block centred on
its own mean and merged by the pairwise update of Chan, Golub and LeVeque (1979); one `eigh` ends it. All in fp64, and
nothing is ever computed as ``E[xx] - mean mean``, which cancels where a mean is far larger than its spread.

The module does not know what the rows are.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 1024
"""Rows that are kept and absorbed together: enough for an efficient product, whatever the size of a batch."""


class Moments:
    """count, mean ``[width]`` and scatter ``[width, width]``, the sum of ``(x - mean)(x - mean)^T``; fp64."""

    def __init__(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        self.count, self.mean, self.scatter = count, mean, scatter

    def absorb(self, rows: Tensor) -> None:
        """Add ``rows [n, width]`` of any dtype."""
        x = rows.double()
        mean = x.mean(0)
        x = x - mean
        self.scatter.addmm_(x.T, x)
        self._join(len(x), mean)

    def merge(self, other: "Moments") -> None:
        self.scatter += other.scatter
        self._join(other.count, other.mean)

    def _join(self, count: int, mean: Tensor) -> None:
        """The two scatters are added; account for the distance between the means they lie around."""
        total, apart = self.count + count, mean - self.mean
        self.scatter.addr_(apart, apart, alpha=self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total


class Axes(NamedTuple):
    """What `Spread.principal` finds, fp64.

    components: ``[k, width]``, unit rows, largest variance first, each one's largest coordinate positive. mean:
    ``[width]``. variance: ``[k]`` along each component, divided by count - 1.
    """

    components: Tensor
    mean: Tensor
    variance: Tensor


class Spread:
    """Rows of one width on one device, or their moments.

    expected: how many rows there will be. If more than columns, they are absorbed from the start; a wrong number costs
    time or memory, never exactness.
    """

    def __init__(self, width: int, expected: int, device: torch.device) -> None:
        self._width, self._device = width, device
        self._keep = width if expected <= width else 0
        self._block = min(BLOCK, expected)
        self._blocks: list[Tensor] = []  # [block, width] each; all full but the last
        self._kept = 0
        self._moments: Moments | None = None

    @staticmethod
    def nbytes(width: int, expected: int, dtype: torch.dtype) -> int:
        """What is held for ``expected`` rows; `principal` takes up to three times as much again, for a moment."""
        block = min(BLOCK, expected)
        if expected <= width:
            return -(-expected // block) * block * width * dtype.itemsize
        return block * width * dtype.itemsize + width * (width + 1) * torch.float64.itemsize

    @property
    def count(self) -> int:
        return self._kept + (self._moments.count if self._moments else 0)

    def add(self, rows: Tensor) -> None:
        """Copies ``rows [n, width]``. Raises ValueError if their dtype is not that of the rows before."""
        if self._blocks and rows.dtype != self._blocks[0].dtype:
            raise ValueError(f"rows of {rows.dtype} after rows of {self._blocks[0].dtype}")
        while len(rows):
            used = self._kept % self._block
            if not used:
                self._blocks.append(torch.empty(self._block, self._width, dtype=rows.dtype, device=self._device))
            part, rows = rows[: self._block - used], rows[self._block - used :]
            self._blocks[-1][used : used + len(part)] = part
            self._kept += len(part)
            if self.count > self._keep:
                self._absorb(self._kept - self._kept % self._block)

    def _absorb(self, rows: int) -> None:
        """Move the first ``rows`` kept rows, whole blocks or all there are, into the moments."""
        for start in range(0, rows, self._block):
            self._into().absorb(self._blocks.pop(0)[: rows - start])
        self._kept -= rows

    def _into(self) -> Moments:
        if self._moments is None:
            mean = torch.zeros(self._width, dtype=torch.float64, device=self._device)
            self._moments = Moments(0, mean, mean.new_zeros(self._width, self._width))
        return self._moments

    def _rows(self) -> Tensor:
        """The kept rows ``[n, width]``, a copy; there is at least one."""
        return torch.cat([block[: self._kept - i * self._block] for i, block in enumerate(self._blocks)])

    def principal(self, k: int) -> Axes:
        """The first k principal axes, ``1 <= k <= min(count - 1, width)``. Ends it: nothing may be added afterwards."""
        count = self.count
        assert 1 <= k <= min(count - 1, self._width)
        if self._moments is None and count <= self._width:
            x = self._rows().double()
            mean = x.mean(0)
            _, scale, axes = torch.linalg.svd(x - mean, full_matrices=False)
            axes, variance = axes[:k], scale[:k].square() / (count - 1)
        else:
            self._absorb(self._kept)
            moments = self._into()
            mean = moments.mean
            values, vectors = torch.linalg.eigh(moments.scatter.div_(count - 1))
            axes, variance = vectors.T.flip(0)[:k], values.flip(0)[:k].clamp(min=0)
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        return Axes(axes * largest.sign(), mean, variance)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """A copy: "rows" ``[n, width]``, and "count", "mean", "scatter" of those absorbed; each where there are any."""
        state: dict[str, Any] = {"rows": self._rows()} if self._kept else {}
        if self._moments is not None:
            mean, scatter = self._moments.mean.clone(), self._moments.scatter.clone()
            state |= {"count": self._moments.count, "mean": mean, "scatter": scatter}
        return state

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another `Spread` held. Into an empty one this restores it: what comes next gives the same bits."""
        if "count" in state:
            mean, scatter = (state[name].to(self._device) for name in ("mean", "scatter"))
            self._into().merge(Moments(state["count"], mean, scatter))
        if "rows" in state:
            self.add(state["rows"].to(self._device))
