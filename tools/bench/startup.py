"""How long until something is computed: from the call of `Sweep(...).run()` to the first layer's first operation.

    python -m tools.bench.startup /data/M
    python -m tools.bench.startup /data/M --loading stream --write

Each sample is a fresh process. A callback at ``residual_pre`` of layer 0 is the first thing that happens in the first
layer; its first call stops the clock and the run. Three clocks: **call** begins as `Sweep` is constructed, in a process
that has imported `Sweep` and the callbacks, and whatever the package imports later is on it; **imports** is what came
before that; **process** is from starting the interpreter to the same moment, all included. The checkpoint is in the
page cache, and the dataset is small: what a large one costs is `ingest`'s question.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from . import limits, report

PROMPTS, LENGTH = 8, 128
CHILD = f"""
import json, sys, time
began = time.time()
from fpwap import Callback, FpwapError, Sweep
from fpwap.callbacks.common import RawActivations
imported = time.time()


class Reached(Exception):
    pass


class First(Callback):
    target_layers, target_hooks, phase = [0], ("residual_pre",), "read"

    def on_batch(self, layer_idx, hook, acts, sample_ids):
        now = time.time()
        print(json.dumps(dict(call=now - imported, imports=imported - began, process=now - float(sys.argv[2]))))
        raise Reached


prompts = [[(row + column) % 1000 for column in range({LENGTH})] for row in range({PROMPTS})]
options = json.loads(sys.argv[3])
try:
    Sweep(sys.argv[1], prompts, callbacks=[First(), RawActivations(layers="all")], progress=False, **options).run()
except FpwapError as error:
    assert isinstance(error.__cause__, Reached), error
"""
CLOCKS = ("call", "imports", "process")


def sample(model: Path, options: dict[str, object]) -> dict[str, float]:
    """Seconds of each clock, in one process."""
    command = [sys.executable, "-c", CHILD, str(model), str(time.time()), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not done.stdout:
        raise SystemExit(f"startup: the run did not reach the first layer\n{done.stderr}")
    return {clock: float(seconds) for clock, seconds in json.loads(done.stdout).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--loading", default="auto", help="as Sweep has it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="keep the run under tools/bench/results/")
    args = parser.parse_args()
    for shard in args.model.glob("*.safetensors"):
        limits.read(shard)
    options = {"loading": args.loading, "device": args.device}
    samples = [sample(args.model.resolve(), options) for _ in range(args.rounds + 1)][1:]  # the first one warms caches
    rows = []
    for clock in CLOCKS:
        times = [one[clock] for one in samples]
        rows.append((clock, f"{median(times):.2f} s", f"{min(times):.2f} to {max(times):.2f} s"))
    title = f"startup: {args.model.resolve().name}, {args.device}, loading {args.loading}"
    text = report.table(("until the first layer", f"median of {args.rounds}", "all"), rows)
    figures = {"bench": "startup", "configuration": {**options, "rounds": args.rounds}, "samples": samples}
    print(f"{title}\n{text}\n")
    if args.write:
        print(f"kept as {report.store('startup', title, text, figures).name}")
    report.last_line(figures)


if __name__ == "__main__":
    main()
