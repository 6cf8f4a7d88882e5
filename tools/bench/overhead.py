"""What the profile and the progress bar cost: the same sweep with them and without.

    python -m tools.bench.overhead

Both are paid per visit of a microbatch to a layer, a few spans and one step of the bar, so their share is largest where
a visit is short: a small model. The one used here, whose visits take some tens of milliseconds, bounds all larger ones.

The recorder is replaced from the outside by one that records nothing; the package has no switch for it. The bar writes
to a terminal that forgets, since without one tqdm would draw nothing and cost nothing.

Two answers. **Measured**: sweeps with and without take turns, and the medians of their wall-clock are compared; on a
machine that does other things the noise is larger than what is looked for, which the quartiles of the pairs show.
**Counted**: spans and steps of one sweep, times what one costs in a loop that does nothing else, over the wall-clock.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np
import torch

import fpwap.sweep
from fpwap import Sweep
from fpwap.callbacks.common import RawActivations
from fpwap.device import Device
from fpwap.profile import Profile, Recorder
from fpwap.progress import Progress

from . import make_checkpoint, report

SHAPE = make_checkpoint.Shape(layers=8, hidden=512, heads=8, kv_heads=4, head_dim=64, mlp=2048, vocab=4096, tied=True)
IN_A_LOOP = 20000


class Silent:
    """A recorder that keeps nothing: what it is asked for, it does at the least cost there is."""

    nothing = contextlib.nullcontext()

    def __init__(self, device: Device | None = None) -> None:
        pass

    def span(self, phase: str, layer: str | None = None) -> contextlib.AbstractContextManager[None]:
        return self.nothing

    def count(self, kind: str, size: int, seconds: float = 0.0) -> None:
        pass

    def finish(self, **known: Any) -> Profile:
        return Recorder().finish(**known)


class Counting(Recorder):
    """A recorder that also counts what it is asked for."""

    calls = 0

    def span(self, phase: str, layer: str | None = None) -> Any:
        Counting.calls += 1
        return super().span(phase, layer)

    def count(self, kind: str, size: int, seconds: float = 0.0) -> None:
        Counting.calls += 1
        super().count(kind, size, seconds)


class Terminal(io.StringIO):
    """Takes what a bar draws for the sake of somebody who watches, and forgets it."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def timed(model: Path, prompts: list[list[int]], *, recorder: Any, progress: bool) -> tuple[float, int]:
    """Seconds of one sweep, and its steps."""
    sweep = Sweep(model, prompts, callbacks=[RawActivations()], progress=progress)
    steps = len(sweep.preflight().schedule)
    with mock.patch.object(fpwap.sweep, "Recorder", recorder), contextlib.redirect_stderr(Terminal()):
        started = perf_counter()
        sweep.run()
        return perf_counter() - started, steps


def costs() -> tuple[float, float]:
    """Seconds of one span and of one step of a bar that is drawn."""
    recorder = Recorder()
    started = perf_counter()
    for _ in range(IN_A_LOOP):
        with recorder.span("forward", "0"):
            pass
    span = (perf_counter() - started) / IN_A_LOOP
    with contextlib.redirect_stderr(Terminal()):
        progress = Progress(True, IN_A_LOOP)
        started = perf_counter()
        for _ in range(IN_A_LOOP):
            progress.step("0")
        step = (perf_counter() - started) / IN_A_LOOP
        progress.close()
    return span, step


def ways(pair: int) -> Iterator[bool]:
    """With and without, or without and with: neither is always the first."""
    yield from (True, False) if pair % 2 else (False, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=report.cores())
    parser.add_argument("--write", action="store_true", help="keep the run under tools/bench/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    random = np.random.default_rng(0)
    prompts = random.integers(0, SHAPE.vocab, (args.prompts, args.length)).tolist()
    times: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        model = Path(folder) / "model"
        make_checkpoint.write(model, SHAPE)
        _, steps = timed(model, prompts, recorder=Counting, progress=True)
        for pair in range(args.pairs):
            for on in ways(pair):
                seconds, _ = timed(model, prompts, recorder=Recorder if on else Silent, progress=on)
                times[on].append(seconds)

    bare = median(times[False])
    span, step = costs()
    counted = (Counting.calls * span + steps * step) / bare
    pairs = [on / off - 1 for on, off in zip(times[True], times[False], strict=True)]
    low, _, high = quantiles(pairs, n=4)
    measured = median(times[True]) / bare - 1
    rows = [
        ("without, median", f"{bare:.4f} s"),
        ("with, median", f"{median(times[True]):.4f} s"),
        ("measured", f"{100 * measured:+.2f} %"),
        ("quartiles of the pairs", f"{100 * low:+.2f} to {100 * high:+.2f} %"),
        ("spans and counts", f"{Counting.calls} at {1e6 * span:.2f} us"),
        ("steps of the bar", f"{steps} at {1e6 * step:.2f} us"),
        ("counted", f"{100 * counted:.3f} %"),
    ]
    text = report.table(("profile and progress", f"{args.pairs} pairs"), rows)
    title = f"overhead: {SHAPE.layers} layers of {SHAPE.hidden}, {args.prompts} x {args.length} tokens"
    figures = {
        "bench": "overhead",
        "configuration": {"prompts": args.prompts, "length": args.length, "threads": args.threads},
        "with_s": times[True],
        "without_s": times[False],
        "measured": measured,
        "quartiles": [low, high],
        "calls": Counting.calls,
        "steps": steps,
        "counted": counted,
    }
    print(f"{title}\n{text}\n")
    if args.write:
        print(f"kept as {report.store('overhead', title, text, figures).name}")
    report.last_line(figures)


if __name__ == "__main__":
    main()
