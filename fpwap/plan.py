"""Request and machine -> one frozen `Plan`: what will be computed, in which order, where it lies, what it costs.

Budgets choose how weights are loaded, tiers, group sizes and waves, never the partition into microbatches: the same
request gives the same bytes whatever memory is free. All ways that the request allows (`fpwap.ways`) are tried on paper
(`fpwap.costs` says what each takes); of those that fit, the fastest by the machine's rates is taken, and of those that
are as fast within a percent the one that takes least. The plan is made from headers and lengths alone; it reads no
tensor and allocates nothing. It is the only value that all parts share.
"""

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from archs.batch import Attention, fixed_height

from .costs import (
    MICROBATCH,
    OUTPUTS,
    REFERENCE,
    RESIDUAL,
    STATES,
    WEIGHTS,
    Bound,
    Costs,
    Needs,
    Pace,
    Times,
    Way,
    needs,
    saved,
)
from .rates import Rates
from .residual import Tier
from .schedule import Loading, Schedule, Stage
from .ways import Budgets, Search, Wanted, preference

HEIGHT = {"cpu": 1024}
"""Rows of a GEMM tile in packed mode, by device type; what is not named here has `ACCELERATOR_HEIGHT`."""
ACCELERATOR_HEIGHT = 2048
SPARSE_HEIGHT = 128
"""Rows of a tile within an expert, which sees only some of a microbatch's rows."""
KEPT_ROWS = 2**18
"""Rows up to which positions and rotary tables of packed batches are kept from layer to layer."""
MAPS = "pages of the checkpoint in the page cache"
AS_FAST, AS_SOON_S = 1.01, 0.02
"""Times of ways, and seconds, between which the smaller memory decides."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The widest layer. products: (outputs, inputs) of its matrices. attention: heads, heads of keys, their width and
    that of values. inner: what an activation function sees.
    """

    hidden: int
    inner: int
    products: tuple[tuple[int, int], ...]
    attention: tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of model, dataset and machine before anything is chosen, for a reader.

    hot: share of the checkpoint's shards in the page cache. last: the last wanted site. microbatch: what its size is.
    files: the shards that are read; shapes: of the maths, None if no layer is wanted. noticed: warnings about what is
    asked for.
    """

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
    hot: float
    files: tuple[Path, ...] = field(default=(), repr=False)
    shapes: Shapes | None = None
    noticed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan(Known):
    """A sweep, decided. ``blockers`` is empty if it can run; each names the number to change.

    pooled_bytes: in which the store may put outputs per prompt together. cautions: warnings about what was chosen.
    """

    loading: Loading
    ring: int
    schedule: Schedule
    tier: Tier
    pooled_bytes: int
    costs: Costs = field(repr=False)
    needs: Needs
    times: Times
    rates: Rates = field(repr=False)
    wanted: Wanted
    budgets: Budgets
    blockers: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()

    @property
    def feasible(self) -> bool:
        return not self.blockers

    def again(
        self, *, rates: Rates | None = None, budgets: Budgets | None = None, wanted: Wanted | None = None
    ) -> "Plan":
        """The same request decided anew, on another machine or with other wishes."""
        return make_plan(self.known, self.costs, rates or self.rates, budgets or self.budgets, wanted or self.wanted)

    def like(self, before: Way) -> "Plan":
        """The same request in the order of an unfinished run, which goes on: its groups, waves, chunks and tier."""
        return make_plan(self.known, self.costs, self.rates, self.budgets, self.wanted, before)

    @property
    def known(self) -> Known:
        """What it was made of."""
        return Known(**{name: getattr(self, name) for name in Known.__dataclass_fields__})

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*self.noticed, *self.cautions)

    @property
    def way(self) -> Way:
        return Way(
            loading=self.loading, tier=self.tier, ring=self.ring, schedule=self.schedule, pooled=self.pooled_bytes
        )

    # --- bytes ---

    @property
    def memory_bytes(self) -> int:
        """Peak of RAM, maps of the checkpoint not counted: their pages are the page cache's."""
        return self.needs.totals[0]

    @property
    def memory_free(self) -> int:
        return self.budgets.memory

    @property
    def device_bytes(self) -> int:
        """Peak of the device's own memory; on the CPU it has none."""
        return self.needs.totals[1]

    @property
    def device_free(self) -> int:
        return self.budgets.device

    @property
    def disk_bytes(self) -> int:
        return self.needs.totals[2]

    @property
    def disk_free(self) -> int:
        return self.budgets.disk

    @property
    def mapped_bytes(self) -> int:
        """Pages of the checkpoint that are used as they lie in the page cache."""
        return self.needs.mapped

    @property
    def by_rows(self) -> bool:
        """Whether the embedding holds the token ids that occur, and not the whole vocabulary."""
        return self.costs.by_rows

    @property
    def residual_rows(self) -> int:
        """Rows that the residual store holds: those of the largest wave, none if all stages stand together."""
        if len(self.schedule.groups) == 1:
            return 0
        return max(int(self.costs.rows[wave.start : wave.stop].sum()) for wave in self.schedule.waves)

    @property
    def commit_s(self) -> float:
        """Seconds that a commit takes of the maths, about."""
        return saved(self.costs, self.way) / self.rates.disk_write + self.rates.commit_s

    @property
    def unsaved(self) -> str | None:
        """Why nothing can be committed on the way, in words; None if it can."""
        return _unsaved(self.costs, self.way, self.needs, self.budgets)

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights read by the whole sweep, at most: an expert that no token chooses is not read."""
        stages, streamed = self.costs.stages, self.schedule.streamed
        whole = sum(stages[stage].read(apart=stage in streamed) for stage in self.schedule.loads())
        chunks = {
            stage: len(self.schedule.head_chunks if stage.kind == "head" else self.schedule.chunks)
            for stage in streamed
        }
        again = bool(self.costs.reference)
        return whole + sum((times + again) * stages[stage].experts for stage, times in chunks.items())

    # --- seconds ---

    @property
    def phases(self) -> Mapping[str, float]:
        """Predicted seconds of each phase; they add up to the wall-clock."""
        return self.times.phases

    @property
    def predicted_s(self) -> float:
        """Wall-clock, without the callbacks' own."""
        return self.times.total

    @property
    def bound(self) -> Bound:
        """What works longest, and so decides how long it takes."""
        return self.times.bound

    @property
    def break_even_tokens(self) -> int:
        """Tokens of a dataset like this one at which reading the weights takes as long as the maths."""
        per_token = self.times.forward_s / self.tokens
        return round(self.times.weights_s / per_token) if per_token else 0

    # --- for a reader ---

    def _repr_html_(self) -> str:
        """The summary as a table, in a notebook."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th><td>{'<br>'.join(map(html.escape, lines))}</td>"
            "</tr>"
            for label, lines in self._table()
        )
        return f"<table>{rows}</table>"

    def summary(self) -> str:
        """The page a person reads before a run."""
        return "\n".join(
            f"{label if place == 0 else '':<11}{line}"
            for label, lines in self._table()
            for place, line in enumerate(lines)
        )

    def _table(self) -> list[tuple[str, list[str]]]:
        padding = f", {self.rows - self.tokens:,} pad rows" if self.rows > self.tokens else ""
        height = f", every GEMM {self.height} rows high" if self.height else ""
        computed = f"{self.family}, {self.layers} layers, {_name(self.dtype)}, {self.attention}, on {self.device}"
        table = [
            (
                "model",
                [
                    self.model + (f" @ {self.commit[:12]}" if self.commit else ""),
                    f"{computed} ({self.threads} threads)",
                ],
            ),
            (
                "dataset",
                [
                    f"{counted(self.prompts, 'prompt')}, {counted(self.tokens, 'token')}{padding}, "
                    f"longest {self.longest:,}"
                ],
            ),
            (
                "batching",
                [f"{self.batching}: {counted(self.microbatches, 'microbatch')} of {self.microbatch}{height}"],
            ),
            (
                "sweep",
                [
                    f"up to {self.last}, {counted(len(self.schedule.groups), 'visit')} of each microbatch, "
                    f"{counted(len(self.schedule.waves), 'wave')}"
                ],
            ),
            ("weights", self._reading()),
            ("residual", [self._residual()]),
            ("outputs", [f"{size(self.costs.outputs)}, callbacks' state {size(self._of(STATES))}"]),
            ("memory", [self._memory()]),
        ]
        if self.costs.on_device:
            table.append(("device", [f"{size(self.device_bytes)} of {size(self.device_free)} that may be taken"]))
        table += [
            ("disk", [f"{size(self.disk_bytes)} of {size(self.disk_free)} that may be taken"]),
            ("time", self._time()),
            *(("warning", [warning]) for warning in self.warnings),
            *(("BLOCKER", [blocker]) for blocker in self.blockers),
            ("feasible", ["yes" if self.feasible else "no"]),
        ]
        return table

    def _of(self, term: str) -> int:
        return self.needs.memory.get(term, 0) + self.needs.device.get(term, 0)

    def _reading(self) -> list[str]:
        """How weights are read, how often, and how large a layer is."""
        schedule, stages = self.schedule, self.costs.stages
        often = "once" if len(schedule.waves) == 1 else f"once for each of {len(schedule.waves)} waves"
        routed = [stage for stage in schedule.streamed if stage.kind == "layer"]
        apart = []
        if routed:
            experts = sum(stages[stage].experts for stage in routed)
            apart.append(
                f"the experts of {counted(len(routed), 'layer')} ({size(experts)}), which do not fit and are read for "
                f"each of {counted(len(schedule.chunks), 'chunk')} of the dataset"
            )
        if Stage("head") in schedule.streamed:
            apart.append(
                f"the head ({size(stages[Stage('head')].experts)}), which is read in slices for each of "
                f"{counted(len(schedule.head_chunks), 'chunk')} of the dataset"
            )
        read = f"{size(self.weights_bytes)} read {often}" + (f": but for {' and '.join(apart)}" if apart else "")
        layers = [cost.stored for stage, cost in stages.items() if stage.kind == "layer"]
        each = ""
        if layers:
            least, most = size(min(layers)), size(max(layers))
            each = f"; a layer is {most}" if least == most else f"; layers are {least} to {most}"
        if self.loading == "stream":
            how = f"streamed past the page cache, {counted(self.ring, 'stage')} in memory at a time"
        elif self.costs.on_device:
            how = "resident: all of them stay on the device"
        else:
            how = f"resident: {size(self.mapped_bytes)} used as they lie in the page cache"
        return [read, how + each]

    def _residual(self) -> str:
        if len(self.schedule.groups) == 1:
            return "nowhere: a microbatch goes through all stages in one visit"
        waves = len(self.schedule.waves)
        most = self.residual_rows * self.costs.width
        place = {"device": "on the device", "ram": "in RAM", "disk": "on disk"}[self.tier]
        return f"{size(most)} {place}" + (f", a wave's; {size(self.costs.residual)} in all" if waves > 1 else "")

    def _memory(self) -> str:
        return f"{size(self.memory_bytes)} of {size(self.memory_free)} that may be taken"

    def _time(self) -> list[str]:
        phases = ", ".join(
            f"{name} {duration(took)}" for name, took in self.phases.items() if took >= 0.005 * self.predicted_s
        )
        lines = [
            f"about {duration(self.predicted_s)}, bound by {self.bound} ({self.rates.known(_name(self.dtype))})",
            f"{phases}; callbacks come on top",
        ]
        if self.break_even_tokens:
            lines.append(
                f"reading the weights takes as long as computing {counted(self.break_even_tokens, 'token')} like these"
            )
        return lines


# --- the choice -----------------------------------------------------------------------------------------------------


def make_plan(
    known: Known, costs: Costs, rates: Rates, budgets: Budgets, wanted: Wanted, before: Way | None = None
) -> Plan:
    """Tries every way on paper and takes the best; if none fits, the one that lacks least, with its blockers.

    before: of an unfinished run; its order of visits and its tier stay, the rest is chosen again.
    """
    if before is not None:
        wanted = replace(wanted, tier=before.tier, size=None)
    search = Search(costs, budgets, wanted, known.hot)
    pace = Pace(costs, rates, _name(known.dtype), known.hot)
    ways = list(search.ways() if before is None else search.like(before))
    tried = [(way, need, search.lacks(way, need)) for way, need in ways]
    fitting = [(way, need, pace.times(way)) for way, need, lack in tried if not any(lack)]
    blockers: tuple[str, ...] = ()
    if fitting:
        fastest = min(times.total for *_, times in fitting)
        way, need, times = min(
            (one for one in fitting if one[2].total <= AS_FAST * fastest + AS_SOON_S),
            key=lambda one: (*preference(one[0], one[1]), one[2].total),
        )
    else:
        asked = wanted.loading or "stream"  # the smaller of the two
        way, need, lack = min(
            [one for one in tried if one[0].loading == asked] or tried,
            key=lambda one: (sum(one[2]), *preference(one[0], one[1])),
        )
        times = pace.times(way)
        blockers = tuple(_blockers(way, need, lack, budgets, wanted))
    return Plan(
        **vars(known),
        loading=way.loading,
        ring=way.ring,
        schedule=way.schedule,
        tier=way.tier,
        pooled_bytes=way.pooled,
        costs=costs,
        needs=need,
        times=times,
        rates=rates,
        wanted=wanted,
        budgets=budgets,
        blockers=blockers,
        cautions=tuple(_warnings(costs, way, need, times, budgets)),
    )


def _unsaved(costs: Costs, way: Way, need: Needs, budgets: Budgets) -> str | None:
    """Why a run cannot be gone on with: two commits' bytes have no room. None if it can."""
    needed, free = 2 * saved(costs, way), budgets.disk - need.totals[2]
    if needed <= free:
        return None
    return (
        f"if it is interrupted, the run cannot be gone on with: what that takes ({size(needed)}) has no room on the "
        f"disk ({size(max(0, free))} free)"
    )


def _warnings(costs: Costs, way: Way, need: Needs, times: Times, budgets: Budgets) -> Iterator[str]:
    waves = len(way.schedule.waves)
    if not need.totals[2] > budgets.disk and (unsaved := _unsaved(costs, way, need, budgets)) is not None:
        yield unsaved
    if waves > 1:
        more = (waves - 1) * times.weights_s
        yield (
            f"the residual stream of all rows ({size(costs.residual)}) fits nowhere: {waves} waves, each of which "
            f"reads all weights, {duration(more)} more of reading; {size(2 * costs.residual)} of free disk make it one"
        )
    mapped = needs(costs, way).mapped
    if mapped > budgets.memory:
        yield (
            f"loading='resident' maps {size(mapped)} where {size(budgets.memory)} may be taken: pages are read again "
            "and again; loading='stream' reads them once"
        )


def _blockers(
    way: Way, need: Needs, lack: tuple[int, int, int, int], budgets: Budgets, wanted: Wanted
) -> Iterator[str]:
    """What does not fit, each with the number to change. lack: of RAM, device, disk and open files."""
    advice = _advice(way, need, wanted)
    maps = {MAPS: budgets.memory + lack[0] - need.totals[0]}  # what of them has to stay in the page cache
    for what, terms, short, free, argument in (
        ("RAM", {**need.memory, **maps}, lack[0], budgets.memory, "memory"),
        ("device memory", need.device, lack[1], budgets.device, "device_memory"),
    ):
        if short:
            taken = free + short
            term = max(terms, key=lambda name: terms[name])
            yield (
                f"{size(taken)} of {what} are needed and {size(free)} may be taken ({argument}=); most of it is {term} "
                f"({size(terms[term])}): {advice.get(term, SMALLER)}"
            )
    if lack[2]:
        nearer = ", leave residual='disk' out" if wanted.tier == "disk" and RESIDUAL in need.disk else ""
        yield (
            f"{size(budgets.disk + lack[2])} of disk are needed and {size(budgets.disk)} may be taken: free "
            f"{size(lack[2])}{nearer}, choose another out=, or capture fewer layers or positions"
        )
    if lack[3]:
        fewer = "lower layers_per_visit" if _larger_than_one(wanted) else "capture fewer layers or hooks"
        yield (
            f"{need.files:,} files are open at once, outputs and shards, and {budgets.files:,} may be (ulimit -Hn): "
            f"{fewer}, or raise the limit"
        )


SMALLER = "lower the size of the microbatch"


def _larger_than_one(wanted: Wanted) -> bool:
    """Whether more layers were asked for in a visit than there must be."""
    return wanted.size is not None and wanted.size > 1


def _advice(way: Way, need: Needs, wanted: Wanted) -> dict[str, str]:
    """What would make each term smaller; nothing that was tried, or that was asked for."""
    if wanted.loading == "resident":
        weights = "loading='stream' holds a few layers at a time"
    elif _larger_than_one(wanted):
        weights = "lower layers_per_visit"
    else:
        weights = "it is as few at a time as can be, and takes more memory or a smaller model"
    if wanted.tier not in (None, "disk"):
        residual = "residual='disk' moves it out"
    else:
        residual = "more free disk would take it" if way.tier != "disk" else "fewer prompts at a time"
    fewer = "lower layers_per_visit" if _larger_than_one(wanted) else "fewer layers in a run, or fewer components"
    return {
        WEIGHTS: weights,
        RESIDUAL: residual,
        STATES: fewer,
        MICROBATCH: f"{SMALLER}, or shorten the longest prompts",
        OUTPUTS: "capture fewer layers or positions",
        REFERENCE: "leave verify=True out",
        MAPS: "loading='stream' does without",
    }


def tile_heights(device: torch.device, widths: tuple[int, ...]) -> tuple[int, int]:
    """Rows of every GEMM in packed mode, and of those within an expert. widths: of what goes through activations."""
    heights = HEIGHT.get(device.type, ACCELERATOR_HEIGHT), SPARSE_HEIGHT
    dense, sparse = (fixed_height(height, widths, torch.get_num_threads()) for height in heights)
    return dense, sparse


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


def duration(took: float) -> str:
    if took < 10:
        return f"{took:.1f} s"
    if took < 120:
        return f"{took:.0f} s"
    return f"{took / 60:.0f} min" if took < 7200 else f"{took / 3600:.1f} h"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
