"""What a run shows of itself while it goes: one tqdm bar over layers x microbatches, or events to a callable.

Knows nothing of the run but counts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from tqdm.auto import tqdm


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """One step done: stage ("embed", "0", ..., "head"), steps done and in all, seconds since the start."""

    stage: str
    done: int
    total: int
    elapsed_s: float


class _Bar(tqdm):  # type: ignore[type-arg]
    monitor_interval = 0  # else a thread stays behind


class Progress:
    """``show=True`` draws a bar (quiet when stderr is no terminal), False nothing, a callable gets the events."""

    def __init__(self, show: bool | Callable[[ProgressEvent], None], total: int, done: int = 0) -> None:
        self._tell = show if callable(show) else None
        self._bar = _Bar(total=total, initial=done, unit="step", disable=None) if show is True else None
        self._done, self._total, self._started = done, total, perf_counter()

    def step(self, stage: str) -> None:
        self._done += 1
        if self._tell is not None:
            self._tell(ProgressEvent(stage, self._done, self._total, perf_counter() - self._started))
        elif self._bar is not None:
            self._bar.set_description(f"layer {stage}" if stage.isdigit() else stage, refresh=False)
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
