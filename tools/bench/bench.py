"""How fast, how large: this project beside Hugging Face and the public fpwap, on one checkpoint and one set of prompts.

    python -m tools.bench.make_checkpoint M /data/M
    python -m tools.bench.bench /data/M --case ragged --write
    python -m tools.bench.bench /data/M --case equal --contenders fpwap fpwap:layers_per_visit=16 hf-sorted:batch=32
    python -m tools.bench.bench /data/L --case equal --prompts 8 --cache cold --contenders fpwap:loading=stream hf-disk
    python -m tools.bench.bench /data/M --cache cold --contenders fpwap fpwap:cap=700MB,memory=600MB --against fpwap
    make bench-peers && python -m tools.bench.bench /data/M --case equal --contenders fpwap hf-sorted public

**What is compared.** Every contender leaves the same thing, the residual stream of all layers at each prompt's last
token, and "differs" shows that it did: the largest distance of a captured vector from the reference's, relative to its
length. A percent or two is bf16 in another order of summation; bit-equal is 0. Options behind a contender's name are
its own; ``cap`` is the bench's, the size of a memory control group that the contender runs in (`memory_cap`).

**The limit.** A token costs two operations for each weight of the linears that it meets, whoever computes it; so
weights x real tokens x 2 / matrix rate is a time below which nobody gets. Cold, the bytes of all layers / disk rate is
another one, and the larger of the two counts, as computing and reading may overlap. "share" is how much of it was
reached. Both rates are measured in the same run, once a round, the matrix rate under the same check for noise. Padding
is not work: what a contender computes on pads counts against it.

**Noise.** A machine that does other things gives figures about those. Each sample is a process of its own, with the
same number of threads; contenders take turns (A B A B), so that slow drift meets all of them; the median counts. A
sample is clean if the process got `CLEAN` of its threads' time (1.85 seconds of two threads in a second), or if nobody
else took the rest: a contender that waits for the disk has idle threads without contention. Others are flagged and
dropped, and taken again in a further round, ``--more`` times at most. A contender that has nothing but flagged samples
is shown by them and marked. What a host does to its guests' disks and caches shows in no figure here.

**The page cache.** Hot: the checkpoint is read through before each sample. Cold: it is dropped from the cache.

**Peers.** The public fpwap and accelerate live in an environment of their own, ``build/peers``, which ``make
bench-peers`` makes with the same torch and transformers; where it is missing, their samples fail and say so.
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
from typing import Any, TypeVar

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from . import limits, memory_cap, report
from .contenders import CONTENDERS, PEERS, Sample, Task

CLEAN = 1.85 / 2
SPREAD = 0.8
"""Standard deviation of the logarithm of ragged lengths."""
ROOT = Path(__file__).parents[2]
PEER_PYTHON = ROOT / "build" / "peers" / "bin" / "python"
DTYPES = {"bf16": "bfloat16", "f32": "float32", "f16": "float16"}
CONFIGURATION = ("dtype", "device", "threads", "cache", "rounds", "more", "against")
KILLED = (-9, 137)
DISK_GB = 2.0
"""Bytes of one measurement of the disk rate, at most."""


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
    """A contender and its options, as in ``fpwap:layers_per_visit=16,residual=disk``; cap: bytes that it may take."""

    text: str
    contender: str
    options: Mapping[str, Any] = field(hash=False)
    cap: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Spec":
        name, _, rest = text.partition(":")
        if name not in CONTENDERS:
            raise argparse.ArgumentTypeError(f"{name!r} is no contender; there are {', '.join(CONTENDERS)}")
        pairs = [pair.partition("=") for pair in rest.split(",") if pair]
        options = {key: _value(value) for key, _, value in pairs}
        cap = options.pop("cap", None)
        return cls(text, name, options, None if cap is None else memory_cap.size(str(cap)))


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
    def foreign(self) -> float:
        """Processors that others had meanwhile, on average."""
        return self.sample.foreign_s / self.sample.wall_s

    @property
    def clean(self) -> bool:
        return self.cores >= CLEAN * self.threads or self.foreign <= (1 - CLEAN) * self.threads


@dataclass(frozen=True)
class Rate:
    """A measurement of the matrix rate, operations per second, and of the disk rate, bytes per second; 0: not taken."""

    rate: float
    disk: float
    cores: float
    threads: int
    device: str = "cpu"

    @property
    def clean(self) -> bool:
        return self.device != "cpu" or self.cores >= CLEAN * self.threads


Measured = TypeVar("Measured", Taken, Rate)


class Failed(Exception):
    """A process that was started ended with an error; the message ends with its own."""


@dataclass(frozen=True)
class Setting:
    """What is the same for all samples. peers: the Python of contenders that need packages of their own."""

    model: Path
    dtype: str
    device: str
    threads: int
    cache: str
    peers: Path


def add_setting(parser: argparse.ArgumentParser, cache: str = "hot") -> None:
    """The arguments that make a `Setting`."""
    parser.add_argument("--cache", choices=("hot", "cold"), default=cache)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cpu", help="that computes, the same for all")
    parser.add_argument("--threads", type=int, default=report.cores())
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="of make bench-peers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="keep the run under tools/bench/results/")


def setting(args: argparse.Namespace, model: Path) -> Setting:
    """Of `add_setting`'s arguments."""
    return Setting(
        model=model.resolve(),
        dtype=DTYPES[args.dtype],
        device=args.device,
        threads=args.threads,
        cache=args.cache,
        peers=args.peer_python.absolute(),  # not resolved: a link's target is outside its environment
    )


class Bench:
    """Runs contenders, one process after the other, over files in ``folder``."""

    def __init__(self, given: Setting, prompts: Sequence[np.ndarray], folder: Path) -> None:
        self._setting, self._folder = given, folder
        threads = str(given.threads)
        self._env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        offsets = np.cumsum([0, *map(len, prompts)])
        np.savez(folder / "prompts.npz", ids=np.concatenate(prompts), offsets=offsets)

    def take(self, spec: Spec, turn: int) -> tuple[Taken, Tensor]:
        """A sample, and what the contender captured."""
        given = self._setting
        for shard in given.model.glob("*.safetensors"):
            if given.cache == "cold":
                limits.evict(shard)
            else:
                limits.read(shard)
        task = Task(
            contender=spec.contender,
            options=spec.options,
            model=str(given.model),
            prompts=str(self._folder / "prompts.npz"),
            dtype=given.dtype,
            device=given.device,
            threads=given.threads,
            cold=given.cache == "cold",
            answer=str(self._folder / "answer.json"),
            captured=str(self._folder / "captured.safetensors"),
        )
        (self._folder / "task.json").write_text(json.dumps(asdict(task)))
        peer = spec.contender in PEERS and given.peers.exists()
        command = [str(given.peers) if peer else sys.executable, str(ROOT / "tools/bench/contenders.py")]
        if spec.cap is not None:
            command = [sys.executable, str(ROOT / "tools/bench/memory_cap.py"), str(spec.cap), "--", *command]
        env = {name: value for name, value in self._env.items() if name != "PYTHONPATH"} if peer else self._env
        started = perf_counter()
        done = self._call([*command, str(self._folder / "task.json")], spec.text, env)
        seconds = perf_counter() - started
        sample = Sample(**json.loads(Path(task.answer).read_text()))
        if spec.cap is not None:
            sample.rest["cap"] = json.loads(done.stderr.splitlines()[-1])
        return Taken(spec.text, turn, seconds, given.threads, sample), load_file(task.captured)["captured"]

    def rounds(self, specs: Sequence[Spec], count: int) -> dict[str, list[Taken]]:
        """Samples of each by turns, told on the way, without what they captured."""
        found: dict[str, list[Taken]] = {spec.text: [] for spec in specs}
        for turn in range(1, count + 1):
            for spec in specs:
                sample, _ = self.take(spec, turn)
                found[spec.text].append(sample)
                _say(f"{self._setting.model.name:<12}{spec.text:<36}{sample.sample.wall_s:9.2f} s", sample)
        return found

    def rate(self) -> Rate:
        """What this model's matrices are multiplied at, now; for cold runs also what its file is read at."""
        given = self._setting
        command = [sys.executable, "-m", "tools.bench.limits", str(given.model), "--dtypes", given.dtype]
        command += ["--threads", str(given.threads), "--device", given.device, "--only", "gemm"]
        if given.cache == "cold":
            command += ["disk", "--direct", "--gb", str(DISK_GB)]
        figures = json.loads(self._call(command, "limits", self._env).stdout.splitlines()[-1])
        disk = max((way["rate"] for way in figures.get("disk", {}).values()), default=0.0)
        gemm = figures["gemm"][given.dtype]["best"]
        return Rate(gemm, disk, figures["cores"], given.threads, given.device)

    def _call(self, command: list[str], what: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            killed = f"{what} was killed by signal {abs(done.returncode) % 128}" if done.returncode in KILLED else ""
            raise Failed(f"{what} failed\n{done.stdout}{done.stderr}\n{killed}".strip())
        return done


def distance(captured: Tensor, reference: Tensor) -> float:
    """The largest relative distance of two captured vectors, the last layer aside (Hugging Face norms it)."""
    ours, theirs = captured[:-1].float(), reference[:-1].float()
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max()) if len(ours) else 0.0


@dataclass(frozen=True)
class Limit:
    """Seconds below which nobody gets: of computing, and of reading, 0 where nothing has to be read."""

    compute_s: float
    disk_s: float

    @classmethod
    def of(cls, model: Path, tokens: int, rates: Sequence[Rate]) -> "Limit":
        """By the medians of the rates, of the clean ones if there are any."""
        rate, disk = median(r.rate for r in counted(rates)), median(r.disk for r in rates)
        compute = 2 * limits.weights_per_token(model) * tokens / rate
        return cls(compute, limits.layers_bytes(model) / disk if disk else 0.0)

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.disk_s)

    def __str__(self) -> str:
        if not self.disk_s:
            return f"the limit is {self.compute_s:.2f} s"
        return f"the limit is {self.seconds:.2f} s (computing {self.compute_s:.2f}, reading {self.disk_s:.2f})"


def counted(measured: Sequence[Measured]) -> Sequence[Measured]:
    """The clean ones; all, if none is clean."""
    return [one for one in measured if one.clean] or measured


def summarise(taken: Sequence[Taken], tokens: int, limit_s: float) -> dict[str, Any]:
    """Medians of the clean samples; of all, if none is clean. Peaks are the largest of all samples."""
    chosen = counted(taken)
    wall = median(t.sample.wall_s for t in chosen)
    return {
        "wall_s": wall,
        "process_s": median(t.process_s for t in chosen),
        "tokens_per_s": tokens / wall,
        "share_of_limit": limit_s / wall,
        "peak_rss": max(t.sample.peak_rss for t in taken),
        "peak_device": max(t.sample.peak_device for t in taken),
        "weights": chosen[0].sample.weights,
        "from_disk": median(t.sample.from_disk for t in chosen),
        "cores": median(t.cores for t in chosen),
        "foreign": median(t.foreign for t in chosen),
        "clean": sum(t.clean for t in taken),
        "samples": len(taken),
    }


def spoken(rates: Sequence[Rate]) -> str:
    """The rates for a reader."""
    chosen = [rate.rate / 1e12 for rate in counted(rates)]
    contended = "" if any(rate.clean for rate in rates) else " CONTENDED"
    told = (
        f"matrix rate {median(chosen):.3f} TFLOP/s ({len(chosen)} measurements from {min(chosen):.3f} to "
        f"{max(chosen):.3f}{contended})"
    )
    disks = [rate.disk / 1e9 for rate in rates if rate.disk]
    return f"{told}, disk rate {median(disks):.2f} GB/s ({min(disks):.2f} to {max(disks):.2f})" if disks else told


def spoken_cap(figures: Sequence[Mapping[str, int]]) -> str:
    """What a capped contender took of its memory group, page cache included, for a reader."""
    limit, peak = figures[0]["limit"], max(one["peak"] for one in figures)
    return f"{peak / 1e6:,.0f} MB of its group's {limit / 1e6:,.0f} MB at the peak, page cache included"


def tabulate(results: dict[str, dict[str, Any]], against: str) -> str:
    head = ["contender", "wall s", "process s", "tokens/s", "speed", "share", "peak GB", "device GB", "weights GB"]
    head += ["disk GB", "cores", "clean", "differs"]
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
                f"{r['peak_device'] / 1e9:.2f}",
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
        run.rates.append(rate := bench.rate())
        disk = f", disk {rate.disk / 1e9:.2f} GB/s" if rate.disk else ""
        _say(f"round {len(run.rates)}: {rate.rate / 1e12:.3f} TFLOP/s{disk}", rate)
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
    parser.add_argument("--contenders", nargs="+", type=Spec.parse, help="all, those in need of a peer Python if any")
    parser.add_argument("--against", help="the contender that speed and differences refer to (hf-sorted, or the last)")
    parser.add_argument("--rounds", type=int, default=3, help="clean samples wanted of each")
    parser.add_argument("--more", type=int, default=2, help="further samples at most, for those that were flagged")
    parser.add_argument("--once", nargs="+", default=[], metavar="CONTENDER", help="one sample of these is enough")
    add_setting(parser)
    args = parser.parse_args()
    has_peers = args.peer_python.exists()
    args.contenders = args.contenders or [Spec.parse(name) for name in CONTENDERS if has_peers or name not in PEERS]
    if args.cache == "hot" and any(spec.cap for spec in args.contenders):
        parser.error("pages that were read outside a cap do not count in it: --cache cold with cap=")
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
        bench = Bench(setting(args, model), prompts, Path(folder))
        run = play(bench, {s: 1 if s.text in args.once else args.rounds for s in args.contenders}, args.more)

    limit = Limit.of(model, tokens, run.rates)
    results = {name: summarise(taken, tokens, limit.seconds) for name, taken in run.taken.items() if taken}
    if args.against in run.captured:
        for name in set(run.captured) - {args.against}:
            results[name]["differs"] = distance(run.captured[name], run.captured[args.against])

    title = f"{model.name}, {args.case}: {len(prompts)} prompts, {tokens:,} tokens, {args.dtype}, {args.cache}"
    text = (
        f"{min(lengths)} to {max(lengths)} tokens a prompt, {args.threads} threads, {args.device}; "
        f"{spoken(run.rates)}, so {limit}. speed and differs: against {args.against}."
        f"\n\n{tabulate(results, args.against)}"
    )
    capped = {
        name: [one.sample.rest["cap"] for one in own] for name, own in run.taken.items() if "cap=" in name and own
    }
    text += "".join(f"\n\n{name}: {spoken_cap(taken)}" for name, taken in capped.items())
    text += "".join(f"\n\nFAILED {name}: {error}" for name, error in run.failed.items())
    figures = {
        "bench": "bench",
        "model": config,
        "case": {"name": args.case, **asdict(case), "tokens": tokens, "seed": args.seed},
        "configuration": {name: getattr(args, name) for name in CONFIGURATION},
        "rates": [asdict(measured) for measured in run.rates],
        "limit": {**asdict(limit), "seconds": limit.seconds},
        "results": results,
        "failed": run.failed,
        "samples": [asdict(sample) for taken in run.taken.values() for sample in taken],
    }
    print(f"{title}\n{text}\n")
    if args.write:
        path = report.store(f"bench_{model.name}_{args.case}_{args.dtype}_{args.cache}", title, text, figures)
        print(f"kept as {path.relative_to(ROOT)}")
    report.last_line(figures)
    sys.exit(bool(run.failed))


if __name__ == "__main__":
    main()
