"""One block of a Llama, in variants: tile heights, the MLP in one piece or by tiles, sums in place.

    python -m tools.bench.block --dtype float32 --write

What a sweep does most of the time is this. "Bits" says whether a variant computes those of the first; "share" is the
time of the block's matrix products alone, over the variant's. Variants take turns, medians count; seconds are of the
processors that the process had, which other work on the machine disturbs less than the clock on the wall.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor

from archs import llama
from archs.batch import Batch, Group
from archs.contract import Tap, no_tap
from fpwap.machine import kept_pages

from . import report
from .make_checkpoint import SHAPES, Shape, config

Block = Callable[[Tensor], Tensor]


class _Looking:
    """A tap for which the middle of the MLP has to exist as a whole."""

    def __call__(self, hook: str, value: Tensor, group: Group | None = None) -> Tensor:
        return value

    def wants(self, hook: str) -> bool:
        return hook == "mlp_hidden"


class _InPlace:
    """A tap that adds the branch to the stream where the branch lies, instead of into new memory."""

    def __call__(self, hook: str, value: Tensor, group: Group | None = None) -> Tensor:
        branch: Tensor = value.as_subclass(_Added) if hook in ("attn_out", "mlp_out") else value
        return branch

    def wants(self, hook: str) -> bool:
        return False


class _Added(torch.Tensor):
    """``x + this`` is computed in this tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [value.as_subclass(Tensor) if isinstance(value, cls) else value for value in args]
        if func in (torch.Tensor.add, torch.Tensor.__add__) and isinstance(args[1], cls):
            added: Tensor = plain[1].add_(plain[0])
            return added
        made: Tensor = func(*plain, **(kwargs or {}))
        return made


def weights(shape: Shape, dtype: torch.dtype) -> llama.Layer:
    def draw(*size: int) -> Tensor:
        return torch.randn(*size).mul_(math.sqrt(1 / size[-1])).to(dtype)

    queries, keys, hidden = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    matrices = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    matrices |= {"gate": (shape.mlp, hidden), "up": (shape.mlp, hidden), "down": (hidden, shape.mlp)}
    fields: dict[str, Any] = {name: draw(*size) for name, size in matrices.items()}
    fields |= {name: 1 + 0.1 * draw(hidden) for name in ("attn_norm", "mlp_norm")}
    fields |= dict.fromkeys(f"{name}_bias" for name in matrices)
    return llama.Layer(**fields)


def products(w: Any, rows: int, height: int) -> Callable[[], None]:
    """The block's matrix products and nothing else, into memory that exists."""
    matrices = [w.q, w.k, w.v, w.o, w.gate, w.up, w.down]
    inputs = {m.shape[1]: torch.randn(height, m.shape[1]).to(m.dtype) for m in matrices}
    outputs = {m.shape[0]: torch.empty(height, m.shape[0], dtype=m.dtype) for m in matrices}

    def run() -> None:
        for _ in range(rows // height):
            for m in matrices:
                torch.mm(inputs[m.shape[1]], m.t(), out=outputs[m.shape[0]])

    return run


def variants(shape: Shape, rows: int, length: int, heights: Sequence[int], w: Any) -> Iterator[tuple[str, Block]]:
    c = llama.FAMILY.config(config(shape))
    group = Group(0, rows // length, length, length)
    ids, positions = torch.zeros(rows, dtype=torch.int64), torch.arange(length).repeat(rows // length)

    def block(height: int | None, tap: Tap) -> Block:
        batch = Batch(ids, positions, (group,), height)
        return lambda x: llama.block(x, w, c, 0, batch, tap)

    for height in heights:
        yield f"tiles of {height:,}", block(height, no_tap)
    yield f"MLP as a whole, {heights[0]:,}", block(heights[0], _Looking())
    yield f"sums in place, {heights[0]:,}", block(heights[0], _InPlace())
    yield "natural height", block(None, no_tap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("S", "M", "L"), default="M")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--heights", type=int, nargs="+", default=[1024, 256, 512, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=report.cores())
    parser.add_argument("--write", action="store_true", help="keep the run under tools/bench/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype, shape = getattr(torch, args.dtype), SHAPES[args.shape]
    with torch.no_grad(), kept_pages():
        w = weights(shape, dtype)
        x = torch.randn(args.rows, shape.hidden).to(dtype)
        contenders = dict(variants(shape, args.rows, args.length, args.heights, w))
        gemms = products(w, args.rows, args.heights[0])
        expected = next(iter(contenders.values()))(x)
        same = {name: torch.equal(block(x), expected) for name, block in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in ("products", *contenders)}
        for _ in range(args.rounds):
            for name in times:
                started = process_time()
                gemms() if name == "products" else contenders[name](x)
                times[name].append(process_time() - started)
    middle = {name: median(taken) for name, taken in times.items()}
    rows = [
        (
            name,
            f"{middle[name]:.3f}",
            f"{min(times[name]):.3f} to {max(times[name]):.3f}",
            f"{middle['products'] / middle[name]:.3f}",
            "-" if name == "products" else "yes" if same[name] else "no",
        )
        for name in times
    ]
    text = report.table(("variant", "cpu s", "from, to", "share", "bits of the first"), rows)
    title = f"one block of {args.shape}, {args.dtype}, {args.rows:,} rows of {args.length}-token prompts"
    figures = {
        "bench": "block",
        "configuration": {
            name: getattr(args, name) for name in ("shape", "dtype", "rows", "length", "rounds", "threads")
        },
        "cpu_s": times,
        "same_bits": same,
    }
    print(f"{title}\n{text}\n")
    if args.write:
        print(f"kept as {report.store(f'block_{args.shape}_{args.dtype}', title, text, figures).name}")
    report.last_line(figures)


if __name__ == "__main__":
    main()
