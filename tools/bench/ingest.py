"""A million short prompts: how long until they are read, checked and put in order, and how much memory that takes.

    python -m tools.bench.ingest
    python -m tools.bench.ingest --sweep

Nothing is computed but the order of rows, so what is measured is Python's own cost per prompt and what is kept of each:
4 bytes a token and 8 a prompt are enough to find it again, while a list of a million lists takes some 150 bytes for
each of them, before the integers. The prompts come from a generator, so that the memory is ours and not the dataset's.

The model has one small layer: with ``--sweep`` the run itself is taken too, which then is the cost per prompt of taps,
callbacks and output files.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from fpwap import Sweep
from fpwap.callbacks.common import RawActivations

from . import make_checkpoint, report
from .contenders import peak_rss

SHAPE = make_checkpoint.Shape(layers=1, hidden=64, heads=2, kv_heads=1, head_dim=32, mlp=128, vocab=1000, tied=True)
AT_ONCE = 10000


def prompts(count: int, length: int) -> Iterator[dict[str, list[int]]]:
    """Random prompts, made a few at a time."""
    random = np.random.default_rng(0)
    for start in range(0, count, AT_ONCE):
        for row in random.integers(0, SHAPE.vocab, (min(AT_ONCE, count - start), length)).tolist():
            yield {"input_ids": row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10**6)
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--sweep", action="store_true", help="go on and run it")
    parser.add_argument("--threads", type=int, default=report.cores())
    parser.add_argument("--write", action="store_true", help="keep the run under tools/bench/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = perf_counter()
    for _ in prompts(args.prompts, args.length):
        pass
    figures: dict[str, float] = {"generator_s": perf_counter() - started, "rss_before": peak_rss()}
    with tempfile.TemporaryDirectory(prefix="ingest-") as folder:
        make_checkpoint.write(Path(folder) / "model", SHAPE)
        sweep = Sweep(
            Path(folder) / "model", prompts(args.prompts, args.length), callbacks=[RawActivations()], progress=False
        )
        started = perf_counter()
        sweep.preflight()
        figures |= {"preflight_s": perf_counter() - started, "rss_preflight": peak_rss()}
        if args.sweep:
            started = perf_counter()
            sweep.run()
            figures |= {"run_s": perf_counter() - started, "rss_run": peak_rss()}

    rows = [(name, f"{v:.2f} s" if name.endswith("_s") else f"{v / 1e9:.3f} GB") for name, v in figures.items()]
    title = f"ingest: {args.prompts:,} prompts of {args.length} tokens, a model of one layer"
    text = report.table(("figure", ""), rows) + "\n\nrss: the peak up to then; preflight_s includes the generator."
    record = {"bench": "ingest", "prompts": args.prompts, "length": args.length, "threads": args.threads, **figures}
    print(f"{title}\n{text}\n")
    if args.write:
        print(f"kept as {report.store('ingest', title, text, record).name}")
    report.last_line(record)


if __name__ == "__main__":
    main()
