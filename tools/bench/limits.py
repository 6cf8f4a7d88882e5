"""What this machine could do at best: the rates that a sweep is measured against.

    python -m tools.bench.limits MODEL
    python -m tools.bench.limits MODEL --only gemm --dtypes float32
    python -m tools.bench.limits MODEL --only disk --direct

**Matrix rate.** A dense model costs two operations per weight of its linears and token. All the rest (norms, rotary
embedding, activations, attention over short prompts) is small in operations, so tokens x weights x 2 / rate is the time
that nothing which computes the same can go below. The linears of one layer are multiplied in turn, as a forward does
it, so that weights come from memory if they are larger than the cache; into outputs that exist, so that no page is
touched for the first time; at several heights (rows), of which the best is the limit. Of experts, as many are
multiplied as see a token.

**Copy rate.** What goes through memory at least once more than it has to: bytes copied per second, each of them read
once and written once.

**Disk rate.** Cold: the pages of the model's largest shard are dropped from the page cache before each pass
(``posix_fadvise``); "fetched" is the share of bytes that the kernel then really got from storage. Buffered reads go
through the page cache; direct ones go past it (``O_DIRECT``). Hot: the same bytes again, copied out of the page cache.
A host below a virtual machine may cache too, and nothing here can tell.

Medians of repeated calls. A rate taken beside other work is that of half a machine: "cores" is how many processors the
matrices had on average, and below 1.85 of two threads it says nothing about the limit.
"""

import argparse
import json
import mmap
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch

from . import report
from .contenders import from_disk

HEIGHTS = (1024, 2048, 4096)
LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
EXPERT = re.compile(r"experts\.(\d+)\.")
SCALES = "_scale_inv"
"""What names of quantised weights' scales end with: two dimensions, and no matrices."""
COPIED = 1 << 28
READ = 1 << 24
"""Bytes of one read call."""
AT_ONCE = 4
"""Reads under way, where there are several."""
DIRECT = "cold, direct"
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
"""What configs call the number of experts that see a token."""


class Linear(NamedTuple):
    """One matrix of a layer, by its shape as it is stored."""

    name: str
    out: int
    into: int


class Stored(NamedTuple):
    """One tensor of a layer. layer: its index. name: behind the layer's."""

    layer: int
    name: str
    shape: tuple[int, ...]
    size: int


def stored(model: Path) -> list[Stored]:
    """The tensors of all layers, from the headers of the shards. Exits if there are none."""
    found = []
    for shard in sorted(model.glob("*.safetensors")):
        with open(shard, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, info in header.items():
            if layer := LAYER.search(name):
                begin, end = info["data_offsets"]
                found.append(Stored(int(layer[1]), name[layer.end() :], tuple(info["shape"]), end - begin))
    if not found:
        raise SystemExit(f"limits: {model} holds no safetensors files with layers")
    return found


def linears(model: Path) -> list[list[Linear]]:
    """The matrices of every layer that a token meets: whatever has two dimensions, and of experts the first few."""
    config = json.loads((model / "config.json").read_text())
    chosen = next((config[key] for key in CHOSEN if config.get(key)), 0)
    layers: dict[int, list[Linear]] = {}
    for tensor in stored(model):
        expert = EXPERT.search(tensor.name)
        if tensor.name.endswith(SCALES) or len(tensor.shape) != 2:
            continue
        if expert is None or int(expert[1]) < chosen:
            layers.setdefault(tensor.layer, []).append(Linear(tensor.name, *tensor.shape))
    return [layers[index] for index in sorted(layers)]


def weights_per_token(model: Path) -> int:
    """Weights that a token is multiplied with on its way through all layers."""
    return sum(linear.out * linear.into for layer in linears(model) for linear in layer)


def layers_bytes(model: Path) -> int:
    """Bytes of all layers, experts included: what a run that captures at all layers has to read at least."""
    return sum(tensor.size for tensor in stored(model))


@dataclass
class Busy:
    """Seconds of processors and of the wall while something was measured; what prepares it is left out."""

    cpu_s: float = 0.0
    wall_s: float = 0.0

    @contextmanager
    def clock(self) -> Iterator[None]:
        wall, cpu = perf_counter(), process_time()
        yield
        self.wall_s, self.cpu_s = self.wall_s + perf_counter() - wall, self.cpu_s + process_time() - cpu

    @property
    def cores(self) -> float:
        return self.cpu_s / self.wall_s


def gemm(layer: list[Linear], height: int, dtype: torch.dtype, seconds: float, busy: Busy, device: str) -> list[float]:
    """Median seconds of ``[height, in] @ [in, out]`` for each linear of a layer, multiplied in turn."""
    weights = [torch.randn(linear.out, linear.into).to(device, dtype) for linear in layer]
    inputs = {into: torch.randn(height, into).to(device, dtype) for into in {linear.into for linear in layer}}
    outputs = {out: torch.empty(height, out, dtype=dtype, device=device) for out in {linear.out for linear in layer}}
    times: list[list[float]] = [[] for _ in layer]

    def once(keep: bool) -> None:
        for linear, weight, own in zip(layer, weights, times, strict=True):
            started = perf_counter()
            torch.mm(inputs[linear.into], weight.t(), out=outputs[linear.out])
            if device != "cpu":
                torch.accelerator.synchronize()
            if keep:
                own.append(perf_counter() - started)

    once(keep=False)
    until = perf_counter() + seconds
    with busy.clock():
        while len(times[0]) < 3 or perf_counter() < until:
            once(keep=True)
    return [median(own) for own in times]


def gemm_rates(
    model: Path, dtype: torch.dtype, seconds: float, busy: Busy, device: str
) -> Iterator[tuple[int, Linear | None, float]]:
    """(height, linear, operations per second), distinct shapes only; linear None: a whole layer."""
    layer = linears(model)[-1]  # the first may be of another kind
    for height in HEIGHTS:
        times = gemm(layer, height, dtype, seconds, busy, device)
        costs = [2.0 * height * linear.out * linear.into for linear in layer]
        seen: set[tuple[int, int]] = set()
        for linear, cost, time in zip(layer, costs, times, strict=True):
            if linear[1:] not in seen:
                yield height, linear, cost / time
            seen.add(linear[1:])
        yield height, None, sum(costs) / sum(times)


def copy_rate(seconds: float) -> float:
    """Bytes copied per second, from memory to memory that was touched before, by all threads."""
    source = torch.ones(COPIED // 4)
    target = torch.zeros_like(source)
    return COPIED / _repeated(lambda: target.copy_(source), seconds)


def _repeated(call: Callable[[], object], seconds: float) -> float:
    call()
    times: list[float] = []
    until = perf_counter() + seconds
    while len(times) < 3 or perf_counter() < until:
        started = perf_counter()
        call()
        times.append(perf_counter() - started)
    return median(times)


def evict(path: Path) -> None:
    """Drop a file's clean pages from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path, *, direct: bool = False, most: int | None = None, at_once: int = 1) -> tuple[int, float]:
    """Reads a file once, in large pieces into one reused buffer a thread: the bytes and the seconds."""
    size = min(path.stat().st_size, most or sys.maxsize)
    share = -(-size // at_once // READ) * READ  # whole pieces, as direct reads want their places
    started = perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        parts = [pool.submit(_read, path, direct, at, min(at + share, size)) for at in range(0, size, share)]
        done = sum(part.result() for part in parts)
    return done, perf_counter() - started


def _read(path: Path, direct: bool, at: int, until: int) -> int:
    """Bytes read from ``at`` to ``until``, or to the end of the piece in which that lies."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    buffer, begin = mmap.mmap(-1, READ), at  # aligned to pages, as direct reads want it
    try:
        while at < until:
            got = os.preadv(fd, [buffer], at)
            assert got > 0, "the file became shorter"
            at += got
        return at - begin
    finally:
        os.close(fd)


def disk_rates(path: Path, most: int, only_direct: bool) -> Iterator[tuple[str, float, float]]:
    """(way of reading, bytes per second, share of them that the disk was asked for). most: bytes of each pass."""
    ways: dict[str, dict[str, Any]] = {
        "cold, buffered": {},
        DIRECT: {"direct": True},
        f"{DIRECT}, {AT_ONCE} at once": {"direct": True, "at_once": AT_ONCE},
        "hot": {},
    }
    for way, how in ways.items():
        if only_direct and not how:
            continue
        if way == "hot":
            read(path, most=most)
        rates, shares = [], []
        for _ in range(3):
            if way != "hot":
                evict(path)
            before = from_disk()
            try:
                size, seconds = read(path, most=most, **how)
            except OSError as error:
                print(f"{way}: not on this file system ({error.strerror})")
                break
            rates.append(size / seconds)
            shares.append((from_disk() - before) / size)
        if rates:
            yield way, median(rates), median(shares)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All the rates, printed as tables on the way."""
    model, parts, dtypes, seconds = args.model, args.only, args.dtypes, args.seconds
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "weights_per_token": weights_per_token(model)}
    if "gemm" in parts:
        figures["gemm"] = {}
        rows, busy = [], Busy()
        for name in dtypes:
            layers: dict[int, float] = {}
            for height, linear, rate in gemm_rates(model, getattr(torch, name), seconds, busy, args.device):
                what = f"{linear.out} x {linear.into}" if linear else "**layer**"
                rows.append((name, str(height), what, f"{rate / 1e12:.3f}"))
                if linear is None:
                    layers[height] = rate
            figures["gemm"][name] = {"best": max(layers.values()), "by_height": layers}
        figures["cores"] = busy.cores
        print(report.table(("dtype", "rows", "matrix", "TFLOP/s"), rows))
        print(f"\n{figures['cores']:.2f} cores of {figures['threads']} threads\n")
    rates = []
    if "copy" in parts:
        figures["copy"] = copy_rate(seconds)
        rates.append(("copy", f"{figures['copy'] / 1e9:.2f}", "-"))
    if "disk" in parts:
        largest = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        figures["disk"] = {}
        for way, rate, share in disk_rates(largest, int(args.gb * 1e9), args.direct):
            figures["disk"][way] = {"rate": rate, "fetched": share}
            rates.append((f"disk {way}", f"{rate / 1e9:.2f}", f"{100 * share:.0f} %"))
    if rates:
        print(report.table(("bytes", "GB/s", "fetched"), rates), end="\n\n")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a checkpoint: its shapes, and its files to read")
    parser.add_argument("--only", nargs="+", choices=("gemm", "copy", "disk"), default=["gemm", "copy", "disk"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=report.cores())
    parser.add_argument("--device", default="cpu", help="that multiplies")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each matrix height, and of copying")
    parser.add_argument("--direct", action="store_true", help="of the disk, only reads past the page cache")
    parser.add_argument("--gb", type=float, default=4.0, help="bytes of one pass over the disk, at most")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report.last_line(measure(args))


if __name__ == "__main__":
    main()
