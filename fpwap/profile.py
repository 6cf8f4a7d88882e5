"""Where the time of a run went, and how many bytes moved.

`Recorder` is a stack of spans on the run's own thread: at every moment exactly one phase is charged, the innermost. A
callback inside a forward is charged to "callback" and not to "forward", so phases add up to the wall-clock and what is
left over is shown as "unattributed". Where work outlives the call that launched it, events at the same edges say beside
it what the device's own time went to. `Profile` is the finished record; it is stored as ``profile.json``.

It does not know what the phases do, and takes no part in any decision.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

from .device import Device, Event

PHASES = ("plan", "load", "residual", "forward", "callback", "write", "commit", "verify", "finish")
"""What a moment of `run()` can be spent on: planning, waiting for weights, fetching and keeping a microbatch's residual
rows (and what else lies between the stages of a visit), a stage's maths, callbacks, output files, committing a layer,
the comparison with Hugging Face, opening and closing the parts."""
BESIDE = ("callback", "verify")
"""Phases that no plan predicts."""
EDGES = 4096
"""Events that are kept; when there are twice as many the older half, long past, is made into seconds."""
Key = tuple[str, str]
"""Layer, phase."""


class _Edges:
    """Where one span's work ends on the device and the next one's begins."""

    def __init__(self, device: Device) -> None:
        self._compute = device.compute
        self._edges: list[tuple[Key | None, Event]] = []  # whom the time up to each is charged to
        self.seconds: dict[Key, float] = defaultdict(float)

    def edge(self, before: Key | None) -> None:
        self._edges.append((before, self._compute.record()))
        if len(self._edges) >= 2 * EDGES:
            self.resolve(EDGES)

    def resolve(self, count: int) -> None:
        """Make the oldest ``count`` edges into seconds; the last one of them stays, as the next one's beginning."""
        self._edges[count - 1][1].synchronize()
        for (_, earlier), (key, event) in pairwise(self._edges[:count]):
            if key is not None:
                self.seconds[key] += event.seconds_since(earlier)
        del self._edges[: count - 1]

    def resolve_all(self) -> None:
        if self._edges:
            self.resolve(len(self._edges))


class Recorder:
    """Charges wall-clock to (layer, phase). Spans on the run's thread only; `count` from any thread.

    device: if it is an asynchronous one its time is charged too, and nobody waits for it before `finish`.
    """

    def __init__(self, device: Device | None = None) -> None:
        self._edges = _Edges(device) if device is not None and device.asynchronous else None
        self._seconds: dict[Key, float] = defaultdict(float)
        self._bytes: dict[str, int] = defaultdict(int)
        self._reading = 0.0
        self._lock = threading.Lock()
        self._stack: list[Key] = []
        self._started = self._since = perf_counter()

    def _charge(self) -> None:
        now = perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now
        if self._edges is not None:
            self._edges.edge(self._stack[-1] if self._stack else None)

    @contextmanager
    def span(self, phase: str, layer: str | None = None) -> Iterator[None]:
        """Charge what happens inside to ``phase``, of ``layer`` or of the enclosing span's layer."""
        self._charge()
        self._stack.append((layer if layer is not None else self._stack[-1][0] if self._stack else "run", phase))
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def count(self, kind: str, size: int, seconds: float = 0.0) -> None:
        """Add ``size`` bytes moved; ``seconds`` is what a reader thread spent on them, beside the run's own time."""
        with self._lock:
            self._bytes[kind] += size
            self._reading += seconds

    def finish(
        self,
        *,
        prompts: int,
        tokens: int,
        predicted: Mapping[str, float] | None = None,
        peaks: Mapping[str, Mapping[str, int]] | None = None,
        share: float = 1.0,
    ) -> "Profile":
        """The record up to now; recording may go on and be finished again.

        predicted: the plan's seconds by phase, which add up to its prediction. peaks: of "memory", "device" and "disk",
        bytes "planned" and "measured". share: of the work, where an earlier run had done the rest.
        """
        self._charge()
        if self._edges is not None:
            self._edges.resolve_all()
        near = None if self._edges is None else self._edges.seconds
        return Profile(
            wall_s=perf_counter() - self._started,
            reading_s=self._reading,
            prompts=prompts,
            tokens=tokens,
            predicted_s=None if predicted is None else sum(predicted.values()),
            spans=tuple(
                Span(*key, seconds, None if near is None else near.get(key, 0.0))
                for key, seconds in self._seconds.items()
            ),
            moved=dict(self._bytes),
            predicted=dict(predicted or {}),
            peaks={name: dict(peak) for name, peak in (peaks or {}).items()},
            share=share,
        )


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds of one phase at one layer: "embed", "0", "1", ..., "norm", "head", or "run" for what belongs to none.

    device_s: of the device's own time, spent on what was launched here; None where nothing outlives its call.
    """

    layer: str
    phase: str
    seconds: float
    device_s: float | None = None


@dataclass(frozen=True)
class Profile:
    """What a run cost. Seconds are wall-clock, bytes are bytes, tokens are real tokens (no padding).

    predicted: the plan's seconds by phase; predicted_s: in all. peaks: name -> {"planned", "measured"}, bytes. share:
    of the work that this is about; a run that went on from a commit did less than all of it.
    """

    wall_s: float
    reading_s: float
    prompts: int
    tokens: int
    predicted_s: float | None
    spans: tuple[Span, ...]
    moved: Mapping[str, int] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    peaks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    share: float = 1.0

    def by_phase(self) -> dict[str, float]:
        """Seconds of each phase, and what no phase accounts for."""
        totals = {phase: sum(s.seconds for s in self.spans if s.phase == phase) for phase in PHASES}
        return {**totals, "unattributed": self.wall_s - sum(totals.values())}

    def on_device(self) -> dict[str, float] | None:
        """The device's own seconds of each phase; None where the wall-clock says it all."""
        if any(span.device_s is None for span in self.spans):
            return None
        return {phase: sum(s.device_s or 0.0 for s in self.spans if s.phase == phase) for phase in PHASES}

    def prediction_error(self) -> float | None:
        """Measured over predicted seconds, less what no plan predicts (callbacks, comparison); None without a plan."""
        if not self.predicted_s:
            return None
        totals = self.by_phase()
        return (self.wall_s - sum(totals[phase] for phase in BESIDE)) / self.predicted_s

    def by_layer(self) -> dict[str, dict[str, float]]:
        """layer -> phase -> seconds, in the order in which the layers came."""
        table: dict[str, dict[str, float]] = {}
        for span in self.spans:
            table.setdefault(span.layer, dict.fromkeys(PHASES, 0.0))[span.phase] += span.seconds
        return table

    def slowest_layer(self) -> tuple[int, float]:
        """The layer that took longest, and its seconds."""
        layers = {int(layer): sum(row.values()) for layer, row in self.by_layer().items() if layer.isdigit()}
        return max(layers.items(), key=lambda item: item[1]) if layers else (0, 0.0)

    def bytes_moved(self) -> dict[str, int]:
        """Bytes by kind: weights, residual_read, residual_written, outputs."""
        return dict(self.moved)

    def throughput_tok_per_s(self) -> float:
        return self.share * self.tokens / self.wall_s if self.wall_s else 0.0

    def weight_bandwidth_gb_per_s(self) -> float:
        """Weights read per second that the reader spent on them; reading overlaps with compute."""
        return self.moved.get("weights", 0) / 1e9 / self.reading_s if self.reading_s else 0.0

    def summary(self) -> str:
        """A table a person reads: one line a layer, one column a phase, seconds; then the plan beside what came."""
        totals = self.by_phase()
        phases = [phase for phase in PHASES if any(s.phase == phase for s in self.spans) or phase in self.predicted]

        def line(name: str, row: Mapping[str, float], total: float) -> str:
            cells = "".join(f"{row[phase]:>10.3f}" if phase in row else f"{'-':>10}" for phase in phases)
            return f"{name:<10}{cells}{total:>10.3f}"

        lines = ["layer     " + "".join(f"{phase:>10}" for phase in phases) + f"{'total':>10}"]
        lines += [line(layer, row, sum(row.values())) for layer, row in self.by_layer().items()]
        lines.append(line("all", totals, self.wall_s))
        near = self.on_device()
        if near is not None and self.spans:
            lines.append(line("on device", near, sum(near.values())))
        if self.predicted_s is not None and self.predicted:
            lines.append(line("predicted", self.predicted, self.predicted_s))
        share = 100 * totals["unattributed"] / self.wall_s if self.wall_s else 0.0
        lines.append(f"unattributed {totals['unattributed']:.3f} s ({share:.1f} %)")
        moved = ", ".join(f"{kind} {_megabytes(size)}" for kind, size in sorted(self.moved.items()))
        lines.append(f"moved: {moved or 'nothing'}; weights at {self.weight_bandwidth_gb_per_s():.2f} GB/s")
        if self.peaks:
            peaks = (
                f"{name} {_megabytes(peak['measured'])} of {_megabytes(peak['planned'])} planned"
                for name, peak in self.peaks.items()
            )
            lines.append(f"peaks: {', '.join(peaks)}")
        predicted = "" if self.predicted_s is None else f" (predicted {self.predicted_s:,.1f} s)"
        lines.append(
            f"{self.prompts:,} prompts, {self.tokens:,} tokens in {self.wall_s:,.2f} s{predicted}: "
            f"{self.throughput_tok_per_s():,.0f} tokens/s"
        )
        if self.share < 1:
            lines.append(f"an earlier run had done {100 * (1 - self.share):.0f} % of it; the times are of the rest")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Profile":
        """Also of an earlier version's record, which said less."""
        return cls(**{**record, "spans": tuple(Span(**span) for span in record["spans"])})


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
