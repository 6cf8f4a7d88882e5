"""What ``verify=True`` costs: the same sweep with it and without, in turns.

    python -m tools.bench.verify_cost

Per layer it costs a fixed number of prompts' forward passes (ours once, Hugging Face's three times on the chosen ones),
the loading of HF's layer from the page cache, and a digest of every prompt's rows; so its share falls with the size of
the dataset. The default is 1,000 prompts of 16 to 128 tokens on four layers of M's shape.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from fpwap import Result, Sweep
from fpwap.callbacks.common import RawActivations

from . import make_checkpoint, report


def timed(model: Path, prompts: list[list[int]], *, verify: bool) -> tuple[float, Result]:
    """Seconds of one sweep, and its result."""
    sweep = Sweep(model, prompts, callbacks=[RawActivations(layers="all")], progress=False, verify=verify)
    sweep.preflight()
    started = perf_counter()
    result = sweep.run()
    return perf_counter() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=report.cores())
    parser.add_argument("--write", action="store_true", help="keep the run under tools/bench/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = replace(make_checkpoint.SHAPES["M"], layers=args.layers, vocab=32000)
    random = np.random.default_rng(0)
    lengths = random.integers(16, args.longest + 1, args.prompts)
    prompts = [random.integers(0, shape.vocab, length).tolist() for length in lengths]
    times: dict[bool, list[float]] = {True: [], False: []}
    certificate: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        model = Path(folder) / "model"
        make_checkpoint.write(model, shape)
        timed(model, prompts[:10], verify=True)  # imports
        for pair in range(args.pairs):
            for on in (True, False) if pair % 2 else (False, True):
                seconds, result = timed(model, prompts, verify=on)
                times[on].append(seconds)
                certificate = result.manifest.get("certificate", certificate)
    shares = [on / off - 1 for on, off in zip(times[True], times[False], strict=True)]
    rows = [
        ("without, median", f"{median(times[False]):.1f} s"),
        ("with, median", f"{median(times[True]):.1f} s"),
        ("cost, median of pairs", f"{100 * median(shares):+.1f} %"),
        ("cost, each pair", ", ".join(f"{100 * share:+.1f} %" for share in shares)),
        ("tokens compared", f"{certificate['tokens']} of {int(lengths.sum())}"),
        ("nearness, drift", f"{certificate['nearness']}, {certificate['drift']:.2g}"),
    ]
    text = report.table(("verify=True", f"{args.pairs} pairs"), rows)
    title = f"verify: {args.layers} layers of {shape.hidden}, {args.prompts} prompts, {int(lengths.sum())} tokens"
    figures = {
        "bench": "verify_cost",
        "configuration": vars(args),
        "with_s": times[True],
        "without_s": times[False],
        "cost": median(shares),
        "certificate": certificate,
    }
    print(f"{title}\n{text}\n")
    if args.write:
        print(f"kept as {report.store('verify_cost', title, text, figures).name}")
    report.last_line(figures)


if __name__ == "__main__":
    main()
