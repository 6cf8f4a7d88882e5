"""Where the time of a run went, and how many bytes moved.

`Recorder` is a stack of spans on the run's own thread: at every moment exactly one phase is charged, the innermost. A
callback inside a forward is charged to "callback" and not to "forward", so phases add up to the wall-clock and what is
left over is shown as "unattributed". `Profile` is the finished record; it is stored as ``profile.json``.

It does not know what the phases do, and takes no part in any decision.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

PHASES = ("plan", "load", "residual", "forward", "callback", "write", "commit", "verify", "finish")
"""What a moment of `run()` can be spent on: planning, waiting for weights, fetching and keeping a microbatch's residual
rows, a stage's maths, callbacks, output files, committing a layer, the comparison with Hugging Face, opening and
closing the parts."""


class Recorder:
    """Charges wall-clock to (layer, phase). Spans on the run's thread only; `count` from any thread."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._bytes: dict[str, int] = defaultdict(int)
        self._reading = 0.0
        self._lock = threading.Lock()
        self._stack: list[tuple[str, str]] = []
        self._started = self._since = perf_counter()

    def _charge(self) -> None:
        now = perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now

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

    def finish(self, *, prompts: int, tokens: int, predicted_s: float | None) -> "Profile":
        """The record up to now; recording may go on and be finished again."""
        self._charge()
        spans = [Span(layer, phase, seconds) for (layer, phase), seconds in self._seconds.items()]
        wall = perf_counter() - self._started
        return Profile(wall, self._reading, prompts, tokens, predicted_s, tuple(spans), dict(self._bytes))


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds of one phase at one layer: "embed", "0", "1", ..., "norm", "head", or "run" for what belongs to none."""

    layer: str
    phase: str
    seconds: float


@dataclass(frozen=True)
class Profile:
    """What a run cost. Seconds are wall-clock, bytes are bytes, tokens are real tokens (no padding)."""

    wall_s: float
    reading_s: float
    prompts: int
    tokens: int
    predicted_s: float | None
    spans: tuple[Span, ...]
    moved: Mapping[str, int] = field(default_factory=dict)

    def by_phase(self) -> dict[str, float]:
        """Seconds of each phase, and what no phase accounts for."""
        totals = {phase: sum(s.seconds for s in self.spans if s.phase == phase) for phase in PHASES}
        return {**totals, "unattributed": self.wall_s - sum(totals.values())}

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
        return self.tokens / self.wall_s if self.wall_s else 0.0

    def weight_bandwidth_gb_per_s(self) -> float:
        """Weights read per second that the reader spent on them; reading overlaps with compute."""
        return self.moved.get("weights", 0) / 1e9 / self.reading_s if self.reading_s else 0.0

    def summary(self) -> str:
        """A table a person reads: one line a layer, one column a phase, seconds."""
        phases = [phase for phase in PHASES if any(s.phase == phase for s in self.spans)]
        lines = ["layer     " + "".join(f"{phase:>10}" for phase in phases) + f"{'total':>10}"]
        for layer, row in self.by_layer().items():
            cells = "".join(f"{row[phase]:>10.3f}" for phase in phases)
            lines.append(f"{layer:<10}{cells}{sum(row.values()):>10.3f}")
        totals = self.by_phase()
        lines.append(f"{'all':<10}" + "".join(f"{totals[phase]:>10.3f}" for phase in phases) + f"{self.wall_s:>10.3f}")
        share = 100 * totals["unattributed"] / self.wall_s if self.wall_s else 0.0
        lines.append(f"unattributed {totals['unattributed']:.3f} s ({share:.1f} %)")
        moved = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in sorted(self.moved.items()))
        lines.append(f"moved: {moved or 'nothing'}; weights at {self.weight_bandwidth_gb_per_s():.2f} GB/s")
        predicted = "" if self.predicted_s is None else f" (predicted {self.predicted_s:,.1f} s)"
        lines.append(
            f"{self.prompts:,} prompts, {self.tokens:,} tokens in {self.wall_s:,.2f} s{predicted}: "
            f"{self.throughput_tok_per_s():,.0f} tokens/s"
        )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Profile":
        return cls(**{**record, "spans": tuple(Span(**span) for span in record["spans"])})
