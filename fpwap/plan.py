"""Request and machine -> one frozen `Plan`: what will be computed, in which order, where it lies, what it costs.

Budgets choose tiers, group sizes and waves, never the partition into microbatches: the same request gives the same
bytes whatever memory is free. The plan is made from headers and lengths alone; it reads no tensor and allocates
nothing. It is the only value that all parts share.
"""

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from archs.batch import Attention, fixed_height

from .callbacks.base import Site
from .residual import Tier
from .schedule import Schedule, Stage
from .sites import where

HEIGHT = {"cpu": 1024}
"""Rows of a GEMM tile in packed mode, by device type; what is not named here has `ACCELERATOR_HEIGHT`."""
ACCELERATOR_HEIGHT = 2048
SPARSE_HEIGHT = 128
"""Rows of a tile within an expert, which sees only some of a microbatch's rows."""
FLOPS = {"cpu": {torch.bfloat16: 3e11, torch.float16: 3e10, torch.float32: 1.5e11}}
ACCELERATOR_FLOPS = 5e13
DISK_BYTES_PER_S = 1e9
"""Conservative rates of a machine that was not calibrated."""
POOLED = 2**30
"""Bytes of per-prompt outputs that are assembled in memory, at most."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the parts say they need: bytes, except ``flops`` (multiply-adds count two).

    weights: on disk, per stage. resident: copies of weights in memory (a map of the file costs none). experts: the part
    of ``weights`` that is a layer's experts. streamed: what weights take, maps included, with experts read one at a
    time. mapped: what the experts of the largest layer take of the page cache, twice, as the next layer is read ahead.
    row: tensors of one row of a microbatch in a routed layer. reference: Hugging Face's layer, under ``verify=True``.
    """

    weights: Mapping[Stage, int]
    resident: int
    experts: Mapping[Stage, int] = field(default_factory=dict)
    streamed: int = 0
    mapped: int = 0
    row: int = 0
    reference: int = 0
    residual: int
    microbatch: int
    outputs: int
    states: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep, decided. ``blockers`` is empty if it can run; each names the number to change."""

    model: str
    family: str
    commit: str | None
    layers: int
    last: str
    dtype: torch.dtype
    device: torch.device
    attention: Attention
    batching: str
    threads: int
    prompts: int
    tokens: int
    rows: int
    longest: int
    microbatches: int
    microbatch: str
    height: int | None
    sparse_height: int | None
    schedule: Schedule
    tier: Tier
    costs: Costs
    memory_bytes: int
    memory_free: int
    disk_bytes: int
    disk_free: int
    warnings: tuple[str, ...] = ()
    blockers: tuple[str, ...] = ()

    @property
    def feasible(self) -> bool:
        return not self.blockers

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights read by the whole sweep, at most: an expert that no token chooses is not read."""
        again = max(0, len(self.schedule.chunks) - 1) + bool(self.costs.reference)
        experts = sum(self.costs.experts.get(stage, 0) for stage in self.schedule.streamed)
        return sum(self.costs.weights[stage] for stage in self.schedule.loads()) + again * experts

    @property
    def compute_s(self) -> float:
        rates = FLOPS.get(self.device.type, {})
        return self.costs.flops / rates.get(self.dtype, ACCELERATOR_FLOPS)

    @property
    def disk_s(self) -> float:
        return self.weights_bytes / DISK_BYTES_PER_S

    @property
    def predicted_s(self) -> float:
        """Wall-clock by the slower of compute and disk, which overlap. Not calibrated on this machine."""
        return max(self.compute_s, self.disk_s)

    def _reading(self) -> str:
        """How often weights are read."""
        chunks = self.schedule.chunks
        if not chunks:
            return " once"
        experts = sum(self.costs.experts[stage] for stage in self.schedule.streamed)
        return (
            f": once, but for the experts of {counted(len(self.schedule.streamed), 'layer')} ({size(experts)}), which "
            f"do not fit and are read for each of {counted(len(chunks), 'chunk')} of the dataset"
        )

    def _repr_html_(self) -> str:
        """The summary, in a notebook."""
        return f"<pre>{html.escape(self.summary())}</pre>"

    def summary(self) -> str:
        """The page a person reads before a run."""
        bound = "compute" if self.compute_s >= self.disk_s else "disk"
        padding = f", {self.rows - self.tokens:,} pad rows" if self.rows > self.tokens else ""
        height = f", every GEMM {self.height} rows high" if self.height else ""
        lines = [
            f"model      {self.model}" + (f" @ {self.commit[:12]}" if self.commit else ""),
            f"           {self.family}, {self.layers} layers, {_name(self.dtype)}, {self.attention}, on {self.device}"
            f" ({self.threads} threads)",
            f"dataset    {counted(self.prompts, 'prompt')}, {counted(self.tokens, 'token')}{padding}, "
            f"longest {self.longest:,}",
            f"batching   {self.batching}: {counted(self.microbatches, 'microbatch')} of {self.microbatch}{height}",
            f"sweep      up to {self.last}, {counted(len(self.schedule.groups), 'visit')} of each microbatch, "
            f"{counted(len(self.schedule.waves), 'wave')}",
            f"weights    {size(self.weights_bytes)} read" + self._reading(),
            f"residual   {size(self.costs.residual)} in {self.tier}",
            f"outputs    {size(self.costs.outputs)}, callbacks' state {size(self.costs.states)}",
            f"memory     {size(self.memory_bytes)} of {size(self.memory_free)} that may be taken",
            f"disk       {size(self.disk_bytes)} of {size(self.disk_free)} that may be taken",
            f"time       about {duration(self.predicted_s)}, bound by {bound} (conservative rates, not calibrated)",
        ]
        lines += [f"warning    {warning}" for warning in self.warnings]
        lines += [f"BLOCKER    {blocker}" for blocker in self.blockers]
        lines.append("feasible   yes" if self.feasible else "feasible   no")
        return "\n".join(lines)


def make_plan(
    *,
    residual: str,
    last: Site,
    microbatch: int,
    costs: Costs,
    device: torch.device,
    memory_free: int,
    device_free: int,
    disk_free: int,
    lengths: Sequence[int],
    schedule: Callable[[tuple[range, ...]], Schedule],
    **known: Any,
) -> Plan:
    """Decides the tier, the chunks of routed layers, and what does not fit.

    residual: the tier asked for, or "auto". memory_free, device_free, disk_free: bytes that may be taken. lengths: rows
    of every microbatch. schedule: makes it of the chunks. known: fields of `Plan`.
    """
    tier = _tier(residual, costs.residual, device, device_free, memory_free)
    pooled = min(costs.outputs, POOLED)
    held = costs.residual if tier != "disk" else 0
    others = costs.states + pooled + held + costs.reference
    split = chunks(costs, lengths, known["height"], memory_free - others)
    if split:
        longest = max(_filled(sum(lengths[index] for index in chunk), known["height"]) for chunk in split)
        costs = replace(costs, resident=costs.streamed, microbatch=max(costs.microbatch, longest * costs.row))
    memory = costs.resident + costs.microbatch + others
    disk = costs.outputs + (2 * costs.residual if tier == "disk" else 0)
    unit = "token" if known["height"] else "row"
    return Plan(
        **known,
        last=where(last),
        device=device,
        threads=torch.get_num_threads(),
        microbatch=counted(microbatch, unit),
        costs=costs,
        schedule=schedule(split),
        tier=tier,
        memory_bytes=memory,
        memory_free=memory_free,
        disk_bytes=disk,
        disk_free=disk_free,
        blockers=tuple(_blockers(costs, held, memory, memory_free, disk, disk_free)),
    )


def chunks(costs: Costs, rows: Sequence[int], height: int | None, memory: int) -> tuple[range, ...]:
    """Consecutive microbatches that visit a routed layer together, as large as memory allows; none if experts fit.

    rows: of each microbatch. height: of a tile, to which a chunk is filled up. memory: bytes that weights and a chunk's
    tensors may take.
    """
    if not costs.experts or costs.resident + costs.mapped + costs.row * _filled(max(rows), height) <= memory:
        return ()
    found: list[range] = []
    held = 0
    for index, count in enumerate(rows):
        if found and costs.streamed + costs.row * _filled(held + count, height) <= memory:
            found[-1] = range(found[-1].start, index + 1)
        else:
            found.append(range(index, index + 1))
            held = 0
        held += count
    return tuple(found)


def _filled(rows: int, height: int | None) -> int:
    return rows if height is None else -(-rows // height) * height


def tile_heights(device: torch.device, widths: tuple[int, ...]) -> tuple[int, int]:
    """Rows of every GEMM in packed mode, and of those within an expert. widths: of what goes through activations."""
    heights = HEIGHT.get(device.type, ACCELERATOR_HEIGHT), SPARSE_HEIGHT
    dense, sparse = (fixed_height(height, widths, torch.get_num_threads()) for height in heights)
    return dense, sparse


def _tier(asked: str, need: int, device: torch.device, device_free: int, memory_free: int) -> Tier:
    """Where the residual stream lives: the device if a third of it suffices, else RAM if half does, else disk."""
    tiers: dict[str, Tier] = {"device": "device", "ram": "ram", "disk": "disk"}
    if asked != "auto":
        return tiers[asked]
    if device.type != "cpu" and need <= device_free // 3:
        return "device"
    return "ram" if need <= memory_free // 2 else "disk"


def _blockers(costs: Costs, held: int, memory: int, memory_free: int, disk: int, disk_free: int) -> Iterator[str]:
    """What does not fit, each with the number to change."""
    if memory > memory_free:
        terms = {
            f"the residual stream ({size(held)}): residual='disk' moves it out": held,
            f"callbacks' state ({size(costs.states)}): fewer layers at a time, or fewer components": costs.states,
            f"a microbatch's tensors ({size(costs.microbatch)}): lower the microbatch's size": costs.microbatch,
            f"weights ({size(costs.resident)}): lower layers_per_visit": costs.resident,
            f"Hugging Face's layer ({size(costs.reference)}): leave verify=True out": costs.reference,
        }
        largest = max(terms, key=lambda term: terms[term])
        yield f"{size(memory)} of RAM are needed and {size(memory_free)} may be taken; most of it is {largest}"
    if disk > disk_free:
        yield (
            f"{size(disk)} of disk are needed and {size(disk_free)} may be taken: free {size(disk - disk_free)}, "
            "choose another out=, or capture fewer layers or positions"
        )


def size(count: float) -> str:
    """Bytes for a reader: decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def counted(count: int, what: str) -> str:
    plural = what + ("es" if what.endswith("ch") else "s")
    return f"{count:,} {what if count == 1 else plural}"


def duration(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
