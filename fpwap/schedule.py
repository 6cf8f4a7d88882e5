"""The order of a sweep as data: which stage meets which microbatch, when.

A *stage* is what has weights of its own: the embedding, each layer, the final norm, the head. A *layer group* is
consecutive stages resident together; a microbatch goes through all of them in one visit. A *wave* is a part of the
dataset that is swept on its own. Weights are read once per wave: groups outside, microbatches inside.
A stage is *streamed* where it does not fit as a whole: a layer's experts come one at a time, the head in slices of the
vocabulary. That happens once per *chunk*, consecutive microbatches that visit it together.

Knows nothing of tensors or files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Kind = Literal["embed", "layer", "norm", "head"]
Loading = Literal["resident", "stream"]
"""Whether stages stay in memory, or are read when their turn comes."""


class Stage(NamedTuple):
    """A part of the model with weights of its own; ``layer`` is set for layers only."""

    kind: Kind
    layer: int | None = None

    @property
    def label(self) -> str:
        return str(self.layer) if self.kind == "layer" else self.kind


class Point(NamedTuple):
    """Between two visits: of this wave and group, the first ``done`` ones lie behind, and everything before them."""

    wave: int = 0
    group: int = 0
    done: int = 0


START = Point()


class Step(NamedTuple):
    """One visit: these stages, on these microbatches of the token table at once, of this wave.

    first, last: whether it is the group's first or last visit of the wave: weights come before, commits after. Where a
    sweep begins amid a group, the first one that is left is the first. after: the point behind it.
    sweep_pass, variant: constant today; several passes, or several variants of a model over one pass of its weights.
    """

    wave: int
    group: int
    microbatches: range
    first: bool
    last: bool
    after: Point
    sweep_pass: int = 0
    variant: str | None = None


@dataclass(frozen=True)
class Schedule:
    """groups: stages in the model's order. waves: ranges of microbatch indices, together the whole table.

    streamed: the layers whose experts are, and ``Stage("head")`` if that is. chunks: ranges of microbatches that go as
    one through the group of a streamed layer, so that each expert is read once a chunk; together the whole table, or
    none. head_chunks: the same of the head, which has a group of its own then.
    """

    groups: tuple[tuple[Stage, ...], ...]
    waves: tuple[range, ...]
    chunks: tuple[range, ...] = ()
    streamed: frozenset[Stage] = frozenset()
    head_chunks: tuple[range, ...] = ()

    def visits(self, wave: range, group: int) -> list[range]:
        """What goes through a group at once, visit by visit."""
        apart = self.streamed.intersection(self.groups[group])
        if not apart:
            return [range(index, index + 1) for index in wave]
        chunks = self.head_chunks if Stage("head") in apart else self.chunks
        within = (range(max(wave.start, chunk.start), min(wave.stop, chunk.stop)) for chunk in chunks)
        return [chunk for chunk in within if chunk]

    def steps(self, start: Point = START) -> Iterator[Step]:
        """Every step behind a point in order: for each wave, for each group, each visit."""
        for wave, microbatches in enumerate(self.waves):
            for group in range(len(self.groups)):
                if (wave, group) < start[:2]:
                    continue
                visits = self.visits(microbatches, group)
                begun = start.done if (wave, group) == start[:2] else 0
                for place, visit in enumerate(visits[begun:], begun):
                    last = place == len(visits) - 1
                    after = Point(wave, group, place + 1)
                    if last:
                        after = Point(wave, group + 1) if group + 1 < len(self.groups) else Point(wave + 1)
                    yield Step(wave, group, visit, place == begun, last, after)

    def loads(self, start: Point = START) -> list[Stage]:
        """The stages in the order in which their weights are needed behind a point, once per wave."""
        return [
            stage
            for wave in range(len(self.waves))
            for place, group in enumerate(self.groups)
            for stage in group
            if (wave, place) >= start[:2]
        ]

    def behind(self, point: Point) -> int:
        """How often a stage is gone through up to a point, by however many microbatches at once."""
        before = (
            (stages, self.visits(wave, at), (count, at))
            for count, wave in enumerate(self.waves)
            for at, stages in enumerate(self.groups)
        )
        return sum(
            len(stages) * (len(visits) if place < point[:2] else point.done if place == point[:2] else 0)
            for stages, visits, place in before
        )

    def __len__(self) -> int:
        """How often a stage is gone through in all."""
        return self.behind(Point(len(self.waves)))

    # --- there and back ---

    def to_json(self) -> dict[str, Any]:
        """JSON of it."""

        def spans(ranges: Sequence[range]) -> list[list[int]]:
            return [[part.start, part.stop] for part in ranges]

        return {
            "groups": [[list(stage) for stage in group] for group in self.groups],
            "waves": spans(self.waves),
            "chunks": spans(self.chunks),
            "streamed": sorted((list(stage) for stage in self.streamed), key=str),
            "head_chunks": spans(self.head_chunks),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Schedule":
        def spans(name: str) -> tuple[range, ...]:
            return tuple(range(start, stop) for start, stop in found[name])

        return cls(
            groups=tuple(tuple(Stage(*stage) for stage in group) for group in found["groups"]),
            waves=spans("waves"),
            chunks=spans("chunks"),
            streamed=frozenset(Stage(*stage) for stage in found["streamed"]),
            head_chunks=spans("head_chunks"),
        )


def cut(sizes: NDArray[np.int64], limit: int) -> tuple[range, ...]:
    """Consecutive items in ranges of at most ``limit`` together, each as long as can be; what is larger stands alone.

    sizes: int64 ``[items]``, of each item.
    """
    ends = np.concatenate(([0], np.cumsum(sizes)))
    fits = np.maximum(np.searchsorted(ends, ends[:-1] + limit, side="right") - 1, np.arange(len(sizes)) + 1).tolist()
    found, start = [], 0
    while start < len(sizes):
        found.append(range(start, fits[start]))
        start = fits[start]
    return tuple(found)


def group_stages(
    layers: Sequence[int], *, norm: bool, head: bool, size: int, apart: bool = False
) -> tuple[tuple[Stage, ...], ...]:
    """Stages cut into groups of ``size`` layers.

    The embedding visits with the first group, since it makes what the group reads; the final norm and the head come
    after the layers, in a visit of their own unless all layers fit into one, or they are to be apart.
    """
    assert size >= 1
    blocks = [Stage("layer", layer) for layer in layers]
    groups = [blocks[start : start + size] for start in range(0, len(blocks), size)] or [[]]
    groups[0] = [Stage("embed"), *groups[0]]
    tail = [Stage("norm")] * norm + [Stage("head")] * head
    if tail and len(groups) == 1 and not apart:
        groups[0] += tail
    elif tail:
        groups.append(tail)
    return tuple(tuple(group) for group in groups)
