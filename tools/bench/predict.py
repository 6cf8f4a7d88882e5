"""What the plan said beside what the clock said: calibrated by one run of one checkpoint, looked at on others.

    python -m tools.bench.predict /data/S /data/M /data/X --dtype f32
    python -m tools.bench.predict /data/M /data/L --cache cold --options loading=stream --write

A run corrects the rates that its machine is kept with, in the user's cache. Here that cache is a folder of its own,
empty at first: the first checkpoint is run once with the conservative rates, which is its line "conservative", and what
was learned from that run is what every later plan is made with, the first checkpoint's again included. What later runs
learn is thrown away, so that no line has seen its own checkpoint but the first's. "ratio" is predicted / measured.

The dataset of the calibrating run is the case's; ``--cases`` are run on every checkpoint, so that a calibration by
equal prompts is also looked at on ragged ones. It must be long enough to learn from (seconds, not tenths).
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from . import bench, report

HEAD = ("checkpoint", "rates", "case", "tokens", "predicted s", "measured s", "ratio", "clean")


@dataclass(frozen=True)
class Line:
    """One checkpoint and dataset, in seconds. rates: where the plan's come from."""

    model: str
    rates: str
    case: str
    tokens: int
    predicted_s: float
    measured_s: float
    clean: int
    samples: int

    @property
    def ratio(self) -> float:
        return self.predicted_s / self.measured_s

    @property
    def row(self) -> tuple[str, ...]:
        return (
            self.model,
            self.rates,
            self.case,
            f"{self.tokens:,}",
            f"{self.predicted_s:.2f}",
            f"{self.measured_s:.2f}",
            f"{self.ratio:.2f}",
            f"{self.clean} of {self.samples}",
        )


def line(args: argparse.Namespace, model: Path, case: str, cache: Path, learned: Path | None) -> Line:
    """Runs a case on a checkpoint: once to learn, or in rounds that each begin with what was ``learned``."""
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    size = replace(bench.CASES[case], prompts=args.prompts, **({"mean": args.mean} if args.mean else {}))
    drawn = bench.draw(size, vocab, args.seed)
    spec = bench.Spec.parse(f"fpwap:{args.options}")
    taken: list[bench.Taken] = []
    with tempfile.TemporaryDirectory(prefix="predict-") as folder:
        runs = bench.Bench(bench.setting(args, model), drawn, Path(folder))
        for _ in range(1 if learned is None else args.rounds):
            if learned is not None:
                shutil.copy(learned, cache / "rates.json")
            taken += runs.rounds([spec], 1)[spec.text]
    samples = [one.sample for one in bench.counted(taken)]
    return Line(
        model=model.name,
        rates="conservative" if learned is None else f"{args.models[0].name}'s",
        case=case,
        tokens=sum(map(len, drawn)),
        predicted_s=median(sample.rest["predicted_s"] for sample in samples),
        measured_s=median(sample.wall_s for sample in samples),
        clean=sum(one.clean for one in taken),
        samples=len(taken),
    )


def lines(args: argparse.Namespace, cache: Path) -> Iterator[Line]:
    """The calibrating run, then every checkpoint and case, each with what that run has left in ``cache``."""
    yield line(args, args.models[0], args.cases[0], cache, None)
    if not (cache / "rates.json").exists():
        raise SystemExit("predict: the first run was too short to learn from: more --prompts")
    learned = cache / "learned.json"
    shutil.copy(cache / "rates.json", learned)
    for model in args.models:
        for case in args.cases:
            yield line(args, model, case, cache, learned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of checkpoints; the first calibrates")
    parser.add_argument("--cases", nargs="+", choices=bench.CASES, default=["equal", "ragged"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--mean", type=int, help="tokens of a prompt, in place of the case's own")
    parser.add_argument("--options", default="", help="of Sweep, as in loading=stream,memory=1GB")
    parser.add_argument("--rounds", type=int, default=3)
    bench.add_setting(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="predict-") as cache:
        os.environ["FPWAP_CACHE"] = cache
        found = list(lines(args, Path(cache)))
    tried = [one for one in found if one.rates != "conservative"]
    worst = max(tried, key=lambda one: max(one.ratio, 1 / one.ratio))
    title = f"predict: calibrated by {args.models[0].name}, {args.prompts} prompts, {args.dtype}, {args.cache}"
    text = report.table(HEAD, [one.row for one in found])
    text += f"\n\nfarthest from 1 with rates that were measured: {worst.ratio:.2f} ({worst.model}, {worst.case})"
    configuration = {name: getattr(args, name) for name in ("cases", "prompts", "mean", "options", "rounds", "dtype")}
    figures = {
        "bench": "predict",
        "configuration": {**configuration, "threads": args.threads, "cache": args.cache, "device": args.device},
        "lines": [{**asdict(one), "ratio": one.ratio} for one in found],
    }
    print(f"{title}\n{text}\n")
    if args.write:
        print(f"kept as {report.store('predict', title, text, figures).name}")
    report.last_line(figures)


if __name__ == "__main__":
    main()
