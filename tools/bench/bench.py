"""How fast, how large: this project beside Hugging Face, on one checkpoint and one set of prompts.

    python -m tools.bench.make_checkpoint M /data/M
    python -m tools.bench.bench /data/M --case ragged --write
    python -m tools.bench.bench /data/M --case equal --write
    python -m tools.bench.bench /data/M --contenders fpwap fpwap:layers_per_visit=16 hf-sorted:batch=32

**What is compared.** Every contender leaves the same thing, the residual stream of all layers at each prompt's last
token, and "differs" shows that it did: the largest distance of a captured vector from the reference's, relative to its
length. A percent or two is bf16 in another order of summation; bit-equal is 0.

**The limit.** A token costs two operations for each weight of the linears, whoever computes it; so weights x real
tokens x 2 / matrix rate is a time below which nobody gets, and "share" is how much of it was reached. The matrix rate
is measured in the same run, once a round, under the same check for noise. Padding is not work: what a contender
computes on pads counts against it.

**Noise.** A machine that does other things gives figures about those. Each sample is a process of its own, with the
same number of threads; contenders take turns (A B A B), so that slow drift meets all of them; the median counts. A
sample during which the process got less than `CLEAN` of its threads' time (1.85 seconds of two threads in a second) is
flagged and dropped, and taken again in a further round, ``--more`` times at most. A contender that has nothing but
flagged samples is shown by them and marked: that is contention, or serial work of its own.

**The page cache.** Hot: the checkpoint is read through before each sample. Cold: it is dropped from the cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from . import limits, report
from .contenders import CONTENDERS, Sample, Task

CLEAN = 1.85 / 2
SPREAD = 0.8
"""Standard deviation of the logarithm of ragged lengths."""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """Prompts of random tokens: ``mean`` tokens long, lognormal between bounds, of which a missing one is the mean."""

    prompts: int
    mean: int
    shortest: int | None = None
    longest: int | None = None


CASES = {
    "ragged": Case(prompts=256, mean=128, shortest=16, longest=512),
    "equal": Case(prompts=64, mean=128),
}


def draw(case: Case, vocab: int, seed: int) -> list[np.ndarray]:
    """The prompts, int32; the same for the same seed."""
    random = np.random.default_rng(seed)
    centre = np.log(case.mean) - SPREAD**2 / 2
    lengths = random.lognormal(centre, SPREAD, case.prompts).round()
    lengths = lengths.clip(case.shortest or case.mean, case.longest or case.mean)
    return [random.integers(0, vocab, int(length), dtype=np.int32) for length in lengths]


@dataclass(frozen=True)
class Spec:
    """A contender and its options, as in ``fpwap:layers_per_visit=16,residual=disk``."""

    text: str
    contender: str
    options: Mapping[str, Any] = field(hash=False)

    @classmethod
    def parse(cls, text: str) -> "Spec":
        name, _, rest = text.partition(":")
        if name not in CONTENDERS:
            raise argparse.ArgumentTypeError(f"{name!r} is no contender; there are {', '.join(CONTENDERS)}")
        pairs = [pair.partition("=") for pair in rest.split(",") if pair]
        return cls(text, name, {key: _value(value) for key, _, value in pairs})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class Taken:
    """One sample of one contender; process_s: from starting its process to its end."""

    spec: str
    round: int
    process_s: float
    threads: int
    sample: Sample

    @property
    def cores(self) -> float:
        """Processors that the contender had on average."""
        return self.sample.cpu_s / self.sample.wall_s

    @property
    def clean(self) -> bool:
        return self.cores >= CLEAN * self.threads


@dataclass(frozen=True)
class Rate:
    """A measurement of the matrix rate, operations per second."""

    rate: float
    cores: float
    threads: int

    @property
    def clean(self) -> bool:
        return self.cores >= CLEAN * self.threads


class Failed(Exception):
    """A process that was started ended with an error; the message ends with its own."""


class Bench:
    """Runs contenders, one process after the other, over files in ``folder``."""

    def __init__(self, model: Path, prompts: Sequence[np.ndarray], threads: int, cache: str, folder: Path) -> None:
        self._model, self._threads, self._cache, self._folder = model, threads, cache, folder
        self._env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        offsets = np.cumsum([0, *map(len, prompts)])
        np.savez(folder / "prompts.npz", ids=np.concatenate(prompts), offsets=offsets)

    def take(self, spec: Spec, turn: int) -> tuple[Taken, Tensor]:
        """A sample, and what the contender captured."""
        for shard in self._model.glob("*.safetensors"):
            if self._cache == "cold":
                limits.evict(shard)
            else:
                limits.read(shard)
        task = Task(
            contender=spec.contender,
            options=spec.options,
            model=str(self._model),
            prompts=str(self._folder / "prompts.npz"),
            threads=self._threads,
            answer=str(self._folder / "answer.json"),
            captured=str(self._folder / "captured.safetensors"),
        )
        (self._folder / "task.json").write_text(json.dumps(asdict(task)))
        started = perf_counter()
        self._call([str(Path(__file__).with_name("contenders.py")), str(self._folder / "task.json")], spec.text)
        seconds = perf_counter() - started
        sample = Sample(**json.loads(Path(task.answer).read_text()))
        return Taken(spec.text, turn, seconds, self._threads, sample), load_file(task.captured)["captured"]

    def matrix_rate(self) -> Rate:
        """What this model's matrices are multiplied at, now."""
        only = ["--only", "gemm", "--dtypes", "bfloat16", "--threads", str(self._threads)]
        printed = self._call(["-m", "tools.bench.limits", str(self._model), *only], "limits")
        figures = json.loads(printed.splitlines()[-1])
        return Rate(figures["gemm"]["bfloat16"]["best"], figures["cores"], self._threads)

    def _call(self, arguments: list[str], what: str) -> str:
        done = subprocess.run([sys.executable, *arguments], env=self._env, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"{what} failed\n{done.stdout}{done.stderr}".strip())
        return done.stdout


def distance(captured: Tensor, reference: Tensor) -> float:
    """The largest relative distance of two captured vectors, the last layer aside (Hugging Face norms it)."""
    ours, theirs = captured[:-1].float(), reference[:-1].float()
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max()) if len(ours) else 0.0


def summarise(taken: Sequence[Taken], tokens: int, limit_s: float) -> dict[str, Any]:
    """Medians of the clean samples; of all, if none is clean."""
    clean = [sample for sample in taken if sample.clean]
    counted = clean or taken
    wall = median(t.sample.wall_s for t in counted)
    return {
        "wall_s": wall,
        "process_s": median(t.process_s for t in counted),
        "tokens_per_s": tokens / wall,
        "share_of_limit": limit_s / wall,
        "peak_rss": max(t.sample.peak_rss for t in counted),
        "weights": counted[0].sample.weights,
        "from_disk": median(t.sample.from_disk for t in counted),
        "cores": median(t.cores for t in counted),
        "clean": len(clean),
        "samples": len(taken),
    }


def tabulate(results: dict[str, dict[str, Any]], against: str) -> str:
    head = "contender,wall s,process s,tokens/s,speed,share,peak GB,weights GB,disk GB,cores,clean,differs".split(",")
    rows = []
    for name, r in results.items():
        differs = r.get("differs")
        rows.append(
            (
                name,
                f"{r['wall_s']:.2f}",
                f"{r['process_s']:.2f}",
                f"{r['tokens_per_s']:,.0f}",
                f"{results[against]['wall_s'] / r['wall_s']:.2f}x" if against in results else "-",
                f"{r['share_of_limit']:.3f}",
                f"{r['peak_rss'] / 1e9:.2f}",
                f"{r['weights'] / 1e9:.2f}",
                f"{r['from_disk'] / 1e9:.2f}",
                f"{r['cores']:.2f}",
                f"{r['clean']} of {r['samples']}" + ("" if r["clean"] else " CONTENDED"),
                "-" if differs is None else f"{differs:.4f}",
            )
        )
    return report.table(head, rows)


@dataclass
class Run:
    """What came of all rounds. captured: of each contender's last sample. failed: the error of those that had one."""

    rates: list[Rate] = field(default_factory=list)
    taken: dict[str, list[Taken]] = field(default_factory=lambda: defaultdict(list))
    captured: dict[str, Tensor] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def play(bench: Bench, wanted: Mapping[Spec, int], more: int) -> Run:
    """Rounds until each contender has its wanted number of clean samples, or ``more`` samples than that, or failed."""
    run = Run()
    while left := [
        spec
        for spec, count in wanted.items()
        if spec.text not in run.failed and _missing(run.taken[spec.text], count, more)
    ]:
        run.rates.append(bench.matrix_rate())
        _say(f"round {len(run.rates)}: {run.rates[-1].rate / 1e12:.3f} TFLOP/s", run.rates[-1])
        for spec in left:
            try:
                sample, run.captured[spec.text] = bench.take(spec, len(run.rates))
            except Failed as error:  # the others' hours are not for nothing
                print(f"  {error}", file=sys.stderr)
                run.failed[spec.text] = str(error).splitlines()[-1]
                continue
            run.taken[spec.text].append(sample)
            _say(f"  {spec.text:<24}{sample.sample.wall_s:9.2f} s", sample)
    return run


def _say(what: str, measured: Taken | Rate) -> None:
    print(f"{what}  {measured.cores:.2f} cores{'' if measured.clean else '  contended'}", file=sys.stderr, flush=True)


def _missing(taken: Sequence[Taken], wanted: int, more: int) -> bool:
    """Whether a contender is to be run again: it has too few samples, or too few clean ones and may have more."""
    return len(taken) < wanted or (sum(t.clean for t in taken) < wanted and len(taken) < wanted + more)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--case", choices=CASES, default="ragged")
    for size in fields(Case):
        parser.add_argument(f"--{size.name}", type=int, metavar="N", help="in place of the case's own")
    parser.add_argument("--contenders", nargs="+", type=Spec.parse, default=[Spec.parse(n) for n in CONTENDERS])
    parser.add_argument("--against", help="the contender that speed and differences refer to (hf-sorted, or the last)")
    parser.add_argument("--rounds", type=int, default=3, help="clean samples wanted of each")
    parser.add_argument("--more", type=int, default=2, help="further samples at most, for those that were flagged")
    parser.add_argument("--once", nargs="+", default=[], metavar="CONTENDER", help="one sample of these is enough")
    parser.add_argument("--cache", choices=("hot", "cold"), default="hot")
    parser.add_argument("--threads", type=int, default=report.cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="keep the run under tools/bench/results/")
    args = parser.parse_args()
    names = [spec.text for spec in args.contenders]
    args.against = args.against or next((name for name in names if name.startswith("hf-sorted")), names[-1])
    if lost := {args.against, *args.once} - set(names):
        parser.error(f"{', '.join(sorted(lost))} is not among the contenders {', '.join(names)}")
    return args


def main() -> None:
    args = arguments()
    model, own = args.model.resolve(), asdict(CASES[args.case])
    case = Case(**{name: getattr(args, name) or own[name] for name in own})
    config = json.loads((model / "config.json").read_text())
    prompts = draw(case, config["vocab_size"], args.seed)
    lengths = [len(prompt) for prompt in prompts]
    tokens = sum(lengths)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(model, prompts, args.threads, args.cache, Path(folder))
        run = play(bench, {s: 1 if s.text in args.once else args.rounds for s in args.contenders}, args.more)

    rates = [r.rate for r in run.rates if r.clean] or [r.rate for r in run.rates]
    rate, contended = median(rates), "" if any(r.clean for r in run.rates) else " CONTENDED"
    limit_s = 2 * limits.weights_per_token(model) * tokens / rate
    results = {name: summarise(taken, tokens, limit_s) for name, taken in run.taken.items() if taken}
    if args.against in run.captured:
        for name in set(run.captured) - {args.against}:
            results[name]["differs"] = distance(run.captured[name], run.captured[args.against])

    title = f"{model.name}, {args.case}: {len(prompts)} prompts, {tokens:,} tokens, {args.cache}"
    text = (
        f"{min(lengths)} to {max(lengths)} tokens a prompt, {args.threads} threads, bf16; matrix rate "
        f"{rate / 1e12:.3f} TFLOP/s ({len(rates)} measurements from {min(rates) / 1e12:.3f} to "
        f"{max(rates) / 1e12:.3f}{contended}), so the limit is {limit_s:.2f} s. speed and differs: against "
        f"{args.against}.\n\n{tabulate(results, args.against)}"
    )
    text += "".join(f"\n\nFAILED {name}: {error}" for name, error in run.failed.items())
    figures = {
        "bench": "bench",
        "model": config,
        "case": {"name": args.case, **asdict(case), "tokens": tokens, "seed": args.seed},
        "configuration": {name: getattr(args, name) for name in ("threads", "cache", "rounds", "more", "against")},
        "matrix_rates": [asdict(measured) for measured in run.rates],
        "limit_s": limit_s,
        "results": results,
        "failed": run.failed,
        "samples": [asdict(sample) for taken in run.taken.values() for sample in taken],
    }
    print(f"{title}\n{text}\n")
    if args.write:
        path = report.store(f"bench_{model.name}_{args.case}_{args.cache}", title, text, figures)
        print(f"kept as {path.relative_to(ROOT)}")
    report.last_line(figures)
    sys.exit(bool(run.failed))


if __name__ == "__main__":
    main()
