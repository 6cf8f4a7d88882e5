"""All ways in which a request could be run here: loading, ring, layer groups, waves, chunks, where the residual lies.

`Search.ways` gives each with what it takes (`fpwap.costs`), `Search.lacks` by how much that is beyond the budgets, and
`preference` decides between ways that are as fast. How fast they are, and which is taken, is not known here.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .costs import LANDING, WEIGHTS, Costs, Needs, Way, head_fill, head_sizes, needs, steps_up_to, worth_pooling
from .residual import Tier
from .schedule import Loading, Schedule, Stage, cut, group_stages

HOT = 0.9
"""Share of a checkpoint that the page cache must hold for its pages to serve as they lie."""

ROOMY = 0.9
"""Share of what memory is left that chunks take: an unfinished run keeps its chunks, and may find less free."""


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Bytes that may be taken: of RAM, of the device's memory (on the CPU there is none of its own), of the disk.

    files: how many may be open at once.
    """

    memory: int
    device: int
    disk: int
    files: int = sys.maxsize


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the request fixes; None is left to the plan. size: layers per visit."""

    loading: Loading | None = None
    tier: Tier | None = None
    size: int | None = None


def preference(way: Way, need: Needs) -> tuple[int, ...]:
    """Between ways that are as fast: resident before streamed, few waves, little in pieces and few times, the residual
    stream near, few weights at a time.
    """
    schedule = way.schedule
    return (
        way.loading == "stream",
        len(schedule.waves),
        len(schedule.streamed),
        len(schedule.chunks) + len(schedule.head_chunks),
        ("device", "ram", "disk").index(way.tier),
        need.memory.get(WEIGHTS, 0) + need.device.get(WEIGHTS, 0),
        sum(need.totals),
    )


class Search:
    """All ways that a request allows, each with what it needs."""

    def __init__(self, costs: Costs, budgets: Budgets, wanted: Wanted, hot: float) -> None:
        self._costs, self._budgets, self._wanted, self._hot = costs, budgets, wanted, hot
        self._waves: dict[int, tuple[range, ...]] = {}

    @cached_property
    def _loadings(self) -> list[Loading]:
        if self._wanted.loading is not None:
            return [self._wanted.loading]
        return ["resident", "stream"] if self._costs.on_device or self._hot >= HOT else ["stream"]

    def lacks(self, way: Way, need: Needs) -> tuple[int, int, int, int]:
        """Bytes of RAM, device and disk, and open files, by which a way goes beyond its budgets."""
        _, device, disk = need.totals
        beyond = self._memory(way, need), device, disk, need.files
        most = self._budgets.memory, self._budgets.device, self._budgets.disk, self._budgets.files
        memory, device, disk, files = (max(0, taken - may) for taken, may in zip(beyond, most, strict=True))
        return memory, device, disk, files

    def _memory(self, way: Way, need: Needs) -> int:
        """Bytes of RAM, and of maps that have to stay there."""
        memory = need.totals[0]
        if need.mapped and self._wanted.loading is None:
            return memory + need.mapped  # nobody asked for maps that the page cache cannot hold
        if need.mapped:
            experts = [c.experts for s, c in self._costs.stages.items() if s not in way.schedule.streamed]
            return memory + 2 * max(experts, default=0)
        return memory

    def _pooled(self, way: Way) -> Way:
        """With outputs put together in what memory is left."""
        left = self._budgets.memory - self._memory(way, needs(self._costs, way))
        return replace(way, pooled=max(0, min(left, worth_pooling(self._costs, way))))

    def ways(self) -> Iterator[tuple[Way, Needs]]:
        for loading in self._loadings:
            for groups, streamed in self._groupings():
                for ring in self._rings(groups, loading):
                    for tier in self._tiers(groups):
                        yield from self._in_waves(loading, groups, streamed, ring, tier)

    def like(self, before: Way) -> Iterator[tuple[Way, Needs]]:
        """In the order of work of an unfinished run."""
        for loading in self._loadings:
            for ring in self._rings(before.schedule.groups, loading):
                way = self._pooled(replace(before, loading=loading, ring=ring, pooled=0))
                yield way, needs(self._costs, way)

    def _groupings(self) -> Iterator[tuple[tuple[tuple[Stage, ...], ...], frozenset[Stage]]]:
        """Which stages stand together, and which are streamed."""
        stages = self._costs.stages
        layers = [stage.layer for stage in stages if stage.layer is not None]
        norm, head = Stage("norm") in stages, Stage("head") in stages
        routed = frozenset(stage for stage, cost in stages.items() if stage.kind == "layer" and cost.experts)
        heads = [frozenset[Stage]()]
        if head and self._costs.height is not None:  # at natural height other rows, or another width, have other bits
            heads.append(frozenset({Stage("head")}))
        sizes = steps_up_to(len(layers)) if self._wanted.size is None else [self._wanted.size]
        for experts in (frozenset[Stage](), routed) if routed else (frozenset[Stage](),):
            for pieces in heads:
                streamed = experts | pieces
                for count in sizes:
                    yield group_stages(layers, norm=norm, head=head, size=count, apart=bool(streamed)), streamed

    def _rings(self, groups: Sequence[Sequence[Stage]], loading: Loading) -> list[int]:
        """Places for stages: of the largest group, and of what is read meanwhile, from nothing to another group."""
        every, largest = sum(map(len, groups)), max(map(len, groups))
        if loading == "resident" and self._costs.on_device:
            return [max(2, every)]
        return sorted({max(2, min(ring, every)) for ring in (largest, largest + 1, 2 * largest)})

    def _tiers(self, groups: Sequence[Sequence[Stage]]) -> list[Tier]:
        if self._wanted.tier is not None:
            return [self._wanted.tier]
        if self._costs.on_device:
            return ["device"] if len(groups) == 1 else ["device", "ram", "disk"]
        return ["ram"] if len(groups) == 1 else ["ram", "disk"]

    def _in_waves(
        self,
        loading: Loading,
        groups: tuple[tuple[Stage, ...], ...],
        streamed: frozenset[Stage],
        ring: int,
        tier: Tier,
    ) -> Iterator[tuple[Way, Needs]]:
        """In as few waves as fit; in more too where chunks and the residual stream share memory: it leaves more."""
        beside = bool(streamed) and tier == ("device" if self._costs.on_device else "ram")
        counts = [1] if len(groups) == 1 else steps_up_to(len(self._costs.rows))
        smallest = Way(
            loading=loading, tier=tier, ring=ring, schedule=Schedule(groups, self._cut(counts[-1]), (), streamed)
        )
        if any(self.lacks(smallest, needs(self._costs, smallest, tensors=False))):
            counts = sorted({1, counts[-1]})  # several waves have less of the stream, and the states of all layers
        for count in counts:
            schedule = Schedule(groups, self._cut(count), (), streamed)
            way = self._pooled(self._chunked(Way(loading=loading, tier=tier, ring=ring, schedule=schedule)))
            need = needs(self._costs, way)
            yield way, need
            if not beside and not any(self.lacks(way, need)):
                return

    def _cut(self, count: int) -> tuple[range, ...]:
        """The dataset in about so many waves."""
        if count not in self._waves:
            rows = self._costs.rows
            whole = (range(len(rows)),)
            self._waves[count] = whole if count == 1 else cut(rows, -(-int(rows.sum()) // count))
        return self._waves[count]

    def _chunked(self, way: Way) -> Way:
        """With chunks as large as the memory allows that the rest leaves, less some: see `ROOMY`."""
        costs, schedule = self._costs, way.schedule
        if not schedule.streamed:
            return way
        left = needs(costs, way, tensors=False).totals
        room = self._budgets.device - left[1] if costs.on_device else self._budgets.memory - left[0]
        room = int(ROOMY * (room - costs.tables))
        row = costs.routed + (LANDING * costs.width if way.tier == "disk" or costs.on_device else 0)
        most = max(0, room) // row if row else 0
        if costs.height:
            most = most // costs.height * costs.height
        routed = any(stage.kind == "layer" for stage in schedule.streamed)
        chunks = cut(costs.rows, most) if routed else ()
        heads = cut(head_sizes(costs), max(0, room - head_fill(costs))) if Stage("head") in schedule.streamed else ()
        return replace(way, schedule=replace(schedule, chunks=chunks, head_chunks=heads))
