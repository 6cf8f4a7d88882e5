"""What a sweep takes, one way or another: bytes of RAM, of the device and of the disk, and seconds of each phase.

`Costs` are the facts of a request: what each stage reads, holds and computes, and how large the dataset's parts are. A
`Way` is what budgets may choose: how weights are loaded, where the residual stream lies, which stages stand together,
in how many waves. `needs` says what a way takes of each memory, `Pace` how long it takes. Neither looks at what the
machine has; that is the plan's.

Knows nothing of files, tensors or callbacks, and no arithmetic here decides a bit of the result.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .outbox import RING
from .rates import Rates
from .recipes import CPU_STAGINGS, STAGINGS
from .residual import Tier
from .schedule import Loading, Schedule, Stage

Bound = Literal["matrix", "disk", "copy", "residual"]

POOLED = 2**30
"""Bytes of per-prompt outputs that are assembled in memory, at most."""
DIGESTS = 17
"""Bytes that the store keeps of each prompt of an output while its file is open."""
SPARE_FILES = 64
"""Files that are open beside shards and outputs."""
LANDING = 4
"""Slices of the residual stream on their way: two that are read ahead, two that are written behind."""
LOGITS = 2
"""Copies of a block of logits: as they are made, and as they are shown."""
START_S = 0.2
"""Opening and closing the parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Maths:
    """What a stage computes, for all rows. matrix, attention: flop, a multiply-add counts two. touched: bytes of the
    operands of matrix products. passes: bytes that element-wise operations read and write. calls: of attention.
    """

    matrix: float = 0.0
    touched: float = 0.0
    attention: float = 0.0
    passes: float = 0.0
    calls: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """One stage, in bytes.

    stored: what is read, whole; experts: the part of it that may be streamed, experts or the head's vocabulary. memory:
    what it takes in a buffer, whole; own: the same without that part. mapped: what serves in a map of the file; copied,
    own_copied: what then still takes a buffer. expert: two experts, or two slices of the vocabulary, in memory.
    scratch, own_scratch, expert_scratch: a buffer of what is not read to where it will lie. states: callbacks' state.
    pooled: outputs per prompt, which are best written as a whole; files: how many outputs there are.
    """

    stored: int
    experts: int = 0
    memory: int
    own: int
    mapped: int = 0
    copied: int = 0
    own_copied: int = 0
    expert: int = 0
    scratch: int = 0
    own_scratch: int = 0
    expert_scratch: int = 0
    maths: Maths = Maths()
    states: int = 0
    pooled: int = 0
    files: int = 0

    def held(self, *, mapped: bool, apart: bool) -> int:
        """Bytes of buffers. mapped: the file's own pages serve. apart: what may be streamed, is."""
        if mapped:
            return self.own_copied if apart else self.copied
        return self.own if apart else self.memory

    def read(self, *, apart: bool) -> int:
        return self.stored - self.experts if apart else self.stored


@dataclass(frozen=True, kw_only=True, eq=False)
class Costs:
    """The facts of a request; bytes, where nothing else is said.

    stages: up to the last wanted one, in the model's order. rows, wanted: int64 ``[microbatches]``, rows of each and
    rows of it whose logits are wanted. height: rows of a tile. width: of a row of the residual stream; vocabulary: of a
    row of logits. microbatch: tensors of the largest one, logits aside; logits: those that are made at once. routed:
    tensors of a row of a chunk in a routed layer. tables: positions, rotary tables, masks and scores, in every visit.
    libraries: copies of operands that libraries of matrix products make. shards: files that are read. reference:
    Hugging Face's layer, under ``verify=True``. commits: layers that put something out. by_rows: only what occurs of
    the embedding is read. on_device: whether an accelerator computes.
    """

    stages: Mapping[Stage, StageCost]
    rows: NDArray[np.int64]
    wanted: NDArray[np.int64]
    height: int | None
    width: int
    vocabulary: int
    microbatch: int
    logits: int
    routed: int
    tables: int
    outputs: int
    commits: int
    reference: int
    by_rows: bool
    on_device: bool
    tokens: int
    prompts: int = 0
    libraries: int = 0
    shards: int = 0

    @property
    def residual(self) -> int:
        """Of all rows."""
        return int(self.rows.sum()) * self.width

    @cached_property
    def largest(self) -> int:
        """Rows of the largest microbatch."""
        return int(self.rows.max())

    @property
    def mapped(self) -> int:
        """Pages of the checkpoint that serve as they lie."""
        return sum(cost.mapped for cost in self.stages.values())

    def filled(self, rows: int) -> int:
        """Rows up to whole tiles."""
        return rows if self.height is None else -(-rows // self.height) * self.height


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to do it. ring: stages in memory at once, held ones and those being read. pooled: bytes in which outputs
    per prompt are put together; what is beyond is written row by row.
    """

    loading: Loading
    tier: Tier
    ring: int
    schedule: Schedule
    pooled: int = 0

    @property
    def one_visit(self) -> bool:
        """Whether a microbatch goes through all stages at once, so that nothing is kept between visits."""
        return len(self.schedule.groups) == 1

    def to_json(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in _PLAIN}, "schedule": self.schedule.to_json()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Way":
        return cls(**{name: found[name] for name in _PLAIN}, schedule=Schedule.from_json(found["schedule"]))


_PLAIN = ("loading", "tier", "ring", "pooled")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes by what they are for. mapped: pages of the checkpoint in the page cache, which the kernel may drop. files:
    that are open at once.
    """

    memory: Mapping[str, int]
    device: Mapping[str, int]
    disk: Mapping[str, int]
    mapped: int
    files: int = 0

    @property
    def totals(self) -> tuple[int, int, int]:
        """RAM, device, disk."""
        return sum(self.memory.values()), sum(self.device.values()), sum(self.disk.values())


WEIGHTS, RESIDUAL, STATES, MICROBATCH, OUTPUTS, REFERENCE, LANDINGS, STAGED, LIBRARIES, LEAVING, KEPT = (
    "weights",
    "the residual stream",
    "callbacks' state",
    "a microbatch's tensors",
    "outputs",
    "Hugging Face's layer",
    "slices of the residual stream on their way",
    "buffers of the reader",
    "buffers of the libraries",
    "outputs on their way",
    "a callback's state on its way to the disk",
)
"""What memory is for."""


def needs(costs: Costs, way: Way, *, tensors: bool = True) -> Needs:
    """What a way takes. tensors: those of the largest visit too, which are what chunks are made to fit."""
    near: dict[str, int] = {WEIGHTS: _weights(costs, way), REFERENCE: costs.reference}
    files = alive(costs, way, {stage: cost.files for stage, cost in costs.stages.items()})
    memory: dict[str, int] = {OUTPUTS: way.pooled + DIGESTS * costs.prompts * files, LIBRARIES: costs.libraries}
    disk: dict[str, int] = {OUTPUTS: costs.outputs}
    if tensors:
        near[MICROBATCH] = _tensors(costs, way)
    near[STATES] = alive(costs, way, {stage: cost.states for stage, cost in costs.stages.items()})
    memory[KEPT] = max((cost.states for cost in costs.stages.values()), default=0)
    for size in _buffers(costs, way):
        staged = STAGINGS * power_of_two(size) if costs.on_device else CPU_STAGINGS * size
        memory[STAGED] = memory.get(STAGED, 0) + staged
    if not way.one_visit:
        stream = costs.width * _longest(costs.rows, way.schedule.waves)
        passing = LANDING * costs.width * _slice(costs, way) if tensors else 0
        match way.tier:
            case "device":
                near[RESIDUAL] = stream
            case "ram" if costs.on_device:
                memory[RESIDUAL], near[LANDINGS] = power_of_two(stream), passing
            case "ram":
                memory[RESIDUAL] = stream
            case "disk":
                disk[RESIDUAL] = 2 * stream
                memory[LANDINGS] = power_of_two(passing) if costs.on_device else passing
                if costs.on_device:
                    near[LANDINGS] = passing
    mapped = 0 if costs.on_device or way.loading == "stream" else costs.mapped
    files += costs.shards + SPARE_FILES
    if costs.on_device:
        memory[LEAVING] = near[LEAVING] = RING
        return Needs(memory=memory, device=near, disk=disk, mapped=mapped, files=files)
    for name, size in near.items():
        memory[name] = memory.get(name, 0) + size
    return Needs(memory=memory, device={}, disk=disk, mapped=mapped, files=files)


def alive(costs: Costs, way: Way, of: Mapping[Stage, int]) -> int:
    """What the stages that are under way at once have: a group's, or all, whose ends are in the last of several waves.

    of: what each stage has.
    """
    schedule = way.schedule
    if len(schedule.waves) > 1:
        return sum(of.values())
    return max(sum(of[stage] for stage in group) for group in schedule.groups)


def worth_pooling(costs: Costs, way: Way) -> int:
    """Bytes in which all outputs per prompt that are made at once could be put together."""
    return min(POOLED, alive(costs, way, {stage: cost.pooled for stage, cost in costs.stages.items()}))


def saved(costs: Costs, way: Way) -> int:
    """Bytes that a commit writes, besides outputs: callbacks' state, and the residual stream if it lies in memory."""
    states = alive(costs, way, {stage: cost.states for stage, cost in costs.stages.items()})
    in_memory = not way.one_visit and way.tier != "disk"
    return states + (costs.width * _longest(costs.rows, way.schedule.waves) if in_memory else 0)


def _weights(costs: Costs, way: Way) -> int:
    """The slots of the ring, stage i in slot ``i % ring``, and two of what is streamed."""
    mapped = way.loading == "resident" and not costs.on_device
    streamed = way.schedule.streamed
    held = [cost.held(mapped=mapped, apart=stage in streamed) for stage, cost in costs.stages.items()]
    apart = max((costs.stages[stage].expert for stage in streamed), default=0)
    return slots(held, way.ring, len(way.schedule.waves)) + apart


def _buffers(costs: Costs, way: Way) -> tuple[int, int]:
    """A buffer of the reader of stages, and one of the reader of what is streamed."""
    streamed = way.schedule.streamed
    stages = max(cost.own_scratch if stage in streamed else cost.scratch for stage, cost in costs.stages.items())
    return stages, max((costs.stages[stage].expert_scratch for stage in streamed), default=0)


def slots(held: Sequence[int], ring: int, waves: int) -> int:
    """Bytes of a ring, each slot as large as the largest stage that it will hold; stage i of all takes ``i % ring``.

    held: bytes of the stages of a wave, in order.
    """
    again = min(waves, ring // math.gcd(len(held), ring))  # waves after which stages meet the same slots
    places = np.zeros(-(-len(held) * again // ring) * ring, dtype=np.int64)
    places[: len(held) * again] = np.tile(np.array(held, dtype=np.int64), again)
    return int(places.reshape(-1, ring).max(0).sum())


def _slice(costs: Costs, way: Way) -> int:
    """Rows of the largest visit."""
    schedule = way.schedule
    return max(costs.largest, *(_longest(costs.rows, chunks) for chunks in (schedule.chunks, schedule.head_chunks)))


def _longest(sizes: NDArray[np.int64], parts: Sequence[range]) -> int:
    return int(np.add.reduceat(sizes, [part.start for part in parts]).max()) if parts else 0


def _tensors(costs: Costs, way: Way) -> int:
    """Of the largest visit."""
    head_apart = Stage("head") in way.schedule.streamed
    alone = costs.microbatch + (0 if head_apart else costs.logits)
    chunk = costs.routed * costs.filled(_longest(costs.rows, way.schedule.chunks))
    heads = way.schedule.head_chunks
    head = _longest(head_sizes(costs), heads) + head_fill(costs) if heads else 0
    return costs.tables + max(alone, chunk, head)


def head_sizes(costs: Costs) -> NDArray[np.int64]:
    """int64 ``[microbatches]``: bytes of each one's tensors in a streamed head, the fill of a chunk's tile aside."""
    return costs.rows * LANDING * costs.width + costs.wanted * LOGITS * costs.vocabulary


def head_fill(costs: Costs) -> int:
    """Bytes by which a chunk's logits are filled up to whole tiles, at most."""
    return (costs.height or 0) * LOGITS * costs.vocabulary


def power_of_two(size: int) -> int:
    """What a pinned allocation of this size takes."""
    return 1 << (size - 1).bit_length() if size else 0


# --- seconds --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds. phases: wall-clock, which they add up to. totals: what each resource works, beside the others."""

    phases: Mapping[str, float]
    totals: Mapping[Bound, float]
    weights_s: float
    """Reading all weights once."""

    @property
    def total(self) -> float:
        return sum(self.phases.values())

    @property
    def bound(self) -> Bound:
        return max(self.totals, key=lambda name: self.totals[name])

    @property
    def forward_s(self) -> float:
        return self.totals["matrix"]


@dataclass
class _Clock:
    """Two hands: when the reader is done with a stage, and when it is computed."""

    ring: int
    reader: float = 0.0
    now: float = 0.0
    waited: float = 0.0
    count: int = 0
    free: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = [0.0] * self.ring

    def group(self, reads: Sequence[float], works: Sequence[float], visits: int) -> None:
        """A group's stages: each is waited for at its first visit, and its place is free after its last."""
        slots = [(self.count + place) % self.ring for place in range(len(reads))]
        ends = []
        for slot, read, work in zip(slots, reads, works, strict=True):
            self.reader = max(self.reader, self.free[slot]) + read
            self.waited += max(0.0, self.reader - self.now)
            self.now = max(self.now, self.reader) + work / visits
            ends.append(self.now)
        self.count += len(reads)
        if visits > 1:
            self.now += sum(works) * (1 - 1 / visits)
            behind = 0.0
            for place in reversed(range(len(works))):
                ends[place] = self.now - behind
                behind += works[place] / visits
        for slot, end in zip(slots, ends, strict=True):
            self.free[slot] = end


class Pace:
    """How long the stages of a request take on a machine. hot: the checkpoint's share in the page cache."""

    def __init__(self, costs: Costs, rates: Rates, dtype: str, hot: float) -> None:
        self.costs, self.rates, self.dtype, self.hot = costs, rates, dtype, hot
        self._works = {stage: work_s(cost.maths, rates, dtype) for stage, cost in costs.stages.items()}

    def times(self, way: Way) -> Times:
        """How long a way takes."""
        costs, rates, schedule = self.costs, self.rates, way.schedule
        waves, last = len(schedule.waves), len(schedule.groups) - 1
        visits = max(1, len(costs.rows) // waves)
        reading = _reading(costs, way, rates, self.hot)
        moving, copying, storing = _moving(costs, way, rates, self.dtype)
        clock = _Clock(way.ring)
        forward = residual = apart = weights = 0.0
        for place, group in enumerate(schedule.groups):
            ends = (place > 0) + (place < last)  # it reads what the one before wrote, and writes for the next
            works, reads = [], []
            for stage in group:
                work, cost = self._works[stage] / waves, costs.stages[stage]
                streamed = stage in schedule.streamed
                forward += work
                read = reading * cost.read(apart=streamed)
                if streamed:
                    chunks = schedule.head_chunks if stage.kind == "head" else schedule.chunks
                    piecewise = reading * cost.experts * max(1.0, len(chunks) / waves)
                    weights += piecewise
                    apart += max(0.0, piecewise - work)
                    work = max(work, piecewise)
                weights += read
                works.append(work)
                reads.append(read + storing * ends / len(group))
            beside = max(0.0, (copying + storing) * ends - sum(works))  # what the maths does not hide
            works[-1] += moving * ends + beside
            residual += moving * ends + beside
            clock.group(reads, works, visits)
        committing = costs.outputs / rates.disk_write + costs.commits * rates.commit_s
        beside = waves * (clock.now - clock.waited)  # files are synced and named while the next layer is computed
        shared = max(0.0, weights + 2 * last * storing - clock.now)  # one disk gives what is streamed, and the rest
        copied = 2 * last * copying + (weights * rates.disk_read / rates.to_device if costs.on_device else 0.0)
        return Times(
            phases={
                "start": START_S,
                "load": waves * (clock.waited + apart + shared),
                "forward": waves * forward,
                "residual": waves * residual,
                "write": costs.outputs / rates.cached,
                "commit": max(committing / max(1, costs.commits), committing - beside),
            },
            totals={
                "matrix": waves * forward,
                "disk": waves * (weights + 2 * last * storing),
                "copy": waves * copied,
                "residual": waves * 2 * last * (moving + copying + storing),
            },
            weights_s=weights,
        )


def _reading(costs: Costs, way: Way, rates: Rates, hot: float) -> float:
    """Seconds per byte of weights: out of the page cache where they are mapped, else from the disk past it."""
    if costs.on_device:
        return max(1 / rates.disk_read, 1 / rates.to_device)
    if way.loading == "stream":
        return 1 / rates.disk_read
    return hot / rates.cached + (1 - hot) / rates.disk_read


def _moving(costs: Costs, way: Way, rates: Rates, dtype: str) -> tuple[float, float, float]:
    """Seconds of moving a wave's residual stream once: in the maths' own time, by copies and by the disk beside it."""
    if way.one_visit:
        return 0.0, 0.0, 0.0
    stream = costs.residual / len(way.schedule.waves)
    copying = stream / min(rates.to_device, rates.from_device) if costs.on_device and way.tier != "device" else 0.0
    storing = stream / 2 * (1 / rates.disk_read + 1 / rates.disk_write) if way.tier == "disk" else 0.0
    return 2 * stream / rates.passes[dtype], copying, storing


def work_s(maths: Maths, rates: Rates, dtype: str) -> float:
    """Seconds that it takes."""
    beside = (maths.touched + maths.passes) / rates.passes[dtype] + maths.calls * rates.call_s
    return products_s(maths, rates, dtype) + beside


def products_s(maths: Maths, rates: Rates, dtype: str) -> float:
    """Seconds of its matrix products and attention."""
    return maths.matrix / rates.matrix[dtype] + maths.attention / rates.attention[dtype]


def steps_up_to(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and ``most``: how many layers a visit may have, how many waves there may be."""
    found = {size << shift for size in (2, 3) for shift in range(most.bit_length()) if size << shift < most}
    return sorted({1, *found, max(1, most)})
