"""What is not computed is not paid for: the last token's residual stream after one middle layer, and after all layers.

    python -m tools.bench.proportion /data/M --dtype f32

A sweep ends with the last layer that is wanted, so layer 8 of 16 ought to cost the first nine layers' share of all, and
weights, time and bytes written should all show it. "in proportion" is that share; "excess" is how much longer it took
than that, which is what does not depend on the number of layers: start, embedding, closing. Both kinds of run take
turns, and the median of the clean ones counts.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

from . import bench, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--layer", type=int, help="in place of the middle one")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--mean", type=int, default=128, help="tokens of every prompt")
    parser.add_argument("--options", default="", help="of Sweep, as in loading=stream,memory=1GB")
    parser.add_argument("--rounds", type=int, default=3)
    bench.add_setting(parser)
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    layers = config["num_hidden_layers"]
    layer = layers // 2 if args.layer is None else args.layer
    drawn = bench.draw(bench.Case(prompts=args.prompts, mean=args.mean), config["vocab_size"], args.seed)
    specs = [bench.Spec.parse(f"fpwap:{own}{args.options}") for own in ("", f"capture={layer},")]
    with tempfile.TemporaryDirectory(prefix="proportion-") as folder:
        runs = bench.Bench(bench.setting(args, args.model), drawn, Path(folder)).rounds(specs, args.rounds)
    every, one = (runs[spec.text] for spec in specs)
    share = (layer + 1) / layers
    walls = [median(taken.sample.wall_s for taken in bench.counted(own)) for own in (every, one)]
    clean = [f"{sum(taken.clean for taken in own)} of {len(own)} clean" for own in (every, one)]
    weights = [own[0].sample.weights for own in (every, one)]
    excess = walls[1] - share * walls[0]
    rows = [
        ("all layers", f"{walls[0]:.2f} s", f"{weights[0] / 1e9:.3f} GB", clean[0]),
        (f"layer {layer} alone", f"{walls[1]:.2f} s", f"{weights[1] / 1e9:.3f} GB", clean[1]),
        ("measured", f"{walls[1] / walls[0]:.3f}", f"{weights[1] / weights[0]:.3f}", ""),
        ("in proportion", f"{share:.3f}", f"{share:.3f}", f"{layer + 1} of {layers} layers"),
        ("excess", f"{excess:.2f} s", "", f"{100 * excess / walls[1]:.1f} % of the shorter run"),
    ]
    tokens = sum(map(len, drawn))
    title = f"proportion: {args.model.resolve().name}, {len(drawn)} prompts, {tokens:,} tokens, {args.dtype}"
    text = report.table(("captured", "wall", "weights", ""), rows)
    configuration = {name: getattr(args, name) for name in ("prompts", "mean", "options", "rounds", "dtype", "threads")}
    figures = {
        "bench": "proportion",
        "configuration": configuration | {"cache": args.cache, "device": args.device, "layer": layer},
        "wall_s": walls,
        "weights": weights,
        "measured": walls[1] / walls[0],
        "proportion": share,
    }
    print(f"{title}\n{text}\n")
    if args.write:
        print(f"kept as {report.store('proportion', title, text, figures).name}")
    report.last_line(figures)


if __name__ == "__main__":
    main()
