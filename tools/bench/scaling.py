"""Wall time and peak memory over the number of prompts and over the number of layers, with what the plan said of them.

    python -m tools.bench.scaling --write
    python -m tools.bench.scaling --options loading=stream --prompts 16 32 64 128 --layers 2 4 8 16 --write

Every point is a process of its own. Over prompts the model is the same, and what ought to grow is time, and memory by
the residual stream alone; over layers the prompts are the same, and streamed weights ought not to show in memory at
all. Beside the median of the clean samples stand the plan's time and memory, made with whatever rates the machine had
when it ran (`predict` is about those). Checkpoints are made for this, in the shape of S unless another is named, and
removed. With ``--write`` two pictures lie beside the table.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from . import bench, make_checkpoint, report

HEAD = ("over", "layers", "prompts", "tokens", "wall s", "plan s", "tokens/s", "peak GB", "plan GB", "clean")


@dataclass(frozen=True)
class Point:
    """One size, and what came of it: seconds, bytes. over: what it is a point of."""

    over: str
    layers: int
    prompts: int
    tokens: int
    wall_s: float
    predicted_s: float
    peak_rss: int
    memory_bytes: int
    clean: int
    samples: int

    @property
    def row(self) -> tuple[str, ...]:
        return (
            self.over,
            str(self.layers),
            f"{self.prompts:,}",
            f"{self.tokens:,}",
            f"{self.wall_s:.2f}",
            f"{self.predicted_s:.2f}",
            f"{self.tokens / self.wall_s:,.0f}",
            f"{self.peak_rss / 1e9:.3f}",
            f"{self.memory_bytes / 1e9:.3f}",
            f"{self.clean} of {self.samples}",
        )


def point(args: argparse.Namespace, model: Path, over: str, layers: int, prompts: int) -> Point:
    """Runs one size."""
    case = bench.Case(prompts=prompts, mean=args.mean)
    drawn = bench.draw(case, make_checkpoint.SHAPES[args.shape].vocab, args.seed)
    spec = bench.Spec.parse(f"fpwap:{args.options}")
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        runs = bench.Bench(bench.setting(args, model), drawn, Path(folder)).rounds([spec], args.rounds)
    taken = runs[spec.text]
    samples = [one.sample for one in bench.counted(taken)]
    return Point(
        over=over,
        layers=layers,
        prompts=prompts,
        tokens=sum(map(len, drawn)),
        wall_s=median(sample.wall_s for sample in samples),
        predicted_s=median(sample.rest["predicted_s"] for sample in samples),
        peak_rss=max(one.sample.peak_rss for one in taken),
        memory_bytes=max(sample.rest["memory_bytes"] for sample in samples),
        clean=sum(one.clean for one in taken),
        samples=len(taken),
    )


def points(args: argparse.Namespace) -> Iterator[Point]:
    """Over prompts at the most layers, then over layers at the fewest prompts; what both share is run once."""
    deepest, fewest = max(args.layers), min(args.prompts)
    with tempfile.TemporaryDirectory(prefix="scaling-", dir=args.folder) as folder:
        for layers in sorted(args.layers):
            model = Path(folder) / f"{args.shape}-{layers}"
            shape = replace(make_checkpoint.SHAPES[args.shape], layers=layers)
            make_checkpoint.write(model, shape, dtype=args.dtype, threads=args.threads)
            at_fewest = point(args, model, "layers", layers, fewest)
            yield at_fewest
            if layers == deepest:
                yield replace(at_fewest, over="prompts")
                for prompts in sorted(args.prompts)[1:]:
                    yield point(args, model, "prompts", layers, prompts)


def draw(found: Sequence[Point], title: str, path: Path) -> None:
    """Time and memory, measured and planned, over prompts and over layers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    for column, over in enumerate(("prompts", "layers")):
        own = [one for one in found if one.over == over]
        sizes = [getattr(one, over) for one in own]
        lines: Mapping[str, tuple[Sequence[float], Sequence[float]]] = {
            "wall time, s": ([one.wall_s for one in own], [one.predicted_s for one in own]),
            "peak memory, GB": ([one.peak_rss / 1e9 for one in own], [one.memory_bytes / 1e9 for one in own]),
        }
        for place, (label, (measured, planned)) in zip(axes[:, column], lines.items(), strict=True):
            place.plot(sizes, measured, "o-", label="measured")
            what = "planned, beside Python and torch" if "memory" in label else "planned"
            place.plot(sizes, planned, "--", label=what)
            place.set(xlabel=over, ylabel=label, ylim=(0, None), xlim=(0, None))
            place.legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=make_checkpoint.SHAPES, default="S")
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 32, 64, 128])
    parser.add_argument("--mean", type=int, default=64, help="tokens of every prompt")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--options", default="", help="of Sweep, as in loading=stream,memory=1GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the checkpoints, in place of the system's temporary one")
    bench.add_setting(parser)
    args = parser.parse_args()
    found = sorted(points(args), key=lambda one: (one.over, one.prompts, one.layers))
    title = f"scaling: {args.shape} in {args.dtype}, prompts of {args.mean} tokens, {args.cache}"
    title += f", {args.options}" if args.options else ""
    text = report.table(HEAD, [one.row for one in found])
    text += "\n\npeak: of the whole process, Python and torch included; plan: what the run allocates, without maps."
    configuration = {name: value for name, value in vars(args).items() if name not in ("folder", "peer_python")}
    figures: dict[str, Any] = {"bench": "scaling", "configuration": configuration, "points": list(map(asdict, found))}
    print(f"{title}\n{text}\n")
    if args.write:
        path = report.store("scaling", title, f"{text}\n\n![scaling]({{name}}.png)", figures)
        path.write_text(path.read_text().replace("{name}", path.stem, 1))
        draw(found, title, path.with_suffix(".png"))
        print(f"kept as {path.name} and {path.with_suffix('.png').name}")
    report.last_line(figures)


if __name__ == "__main__":
    main()
