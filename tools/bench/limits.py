"""What this machine could do at best: the rates that a sweep is measured against.

    python -m tools.bench.limits MODEL
    python -m tools.bench.limits MODEL --only gemm --dtypes bfloat16

**Matrix rate.** A dense model costs two operations per weight of its linears and token. All the rest (norms, rotary
embedding, activations, attention over short prompts) is small in operations, so tokens x weights x 2 / rate is the time
that nothing which computes the same can go below. The linears of one layer are multiplied in turn, as a forward does
it, so that weights come from memory if they are larger than the cache; into outputs that exist, so that no page is
touched for the first time; at several heights (rows), of which the best is the limit.

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
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch

from . import report
from .contenders import from_disk

HEIGHTS = (1024, 2048, 4096)
LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
COPIED = 1 << 28
READ = 1 << 24
"""Bytes of one read call."""
MOST_READ = 1 << 32


class Linear(NamedTuple):
    """One matrix of a layer, by its shape as it is stored."""

    name: str
    out: int
    into: int


def linears(model: Path) -> list[list[Linear]]:
    """The matrices of every layer, from the headers of the shards: whatever has two dimensions is multiplied."""
    layers: dict[int, list[Linear]] = {}
    for shard in sorted(model.glob("*.safetensors")):
        with open(shard, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, info in header.items():
            found = LAYER.search(name)
            if found and len(info["shape"]) == 2:
                layers.setdefault(int(found[1]), []).append(Linear(name[found.end() :], *info["shape"]))
    if not layers:
        raise SystemExit(f"limits: {model} holds no safetensors files with layers")
    return [layers[index] for index in sorted(layers)]


def weights_per_token(model: Path) -> int:
    """Weights that a token is multiplied with on its way through all layers."""
    return sum(linear.out * linear.into for layer in linears(model) for linear in layer)


def gemm(layer: list[Linear], height: int, dtype: torch.dtype, seconds: float) -> list[float]:
    """Median seconds of ``[height, in] @ [in, out]`` for each linear of a layer, multiplied in turn."""
    weights = [torch.randn(linear.out, linear.into).to(dtype) for linear in layer]
    inputs = {into: torch.randn(height, into).to(dtype) for into in {linear.into for linear in layer}}
    outputs = {out: torch.empty(height, out, dtype=dtype) for out in {linear.out for linear in layer}}
    times: list[list[float]] = [[] for _ in layer]

    def once(keep: bool) -> None:
        for linear, weight, own in zip(layer, weights, times, strict=True):
            started = perf_counter()
            torch.mm(inputs[linear.into], weight.t(), out=outputs[linear.out])
            if keep:
                own.append(perf_counter() - started)

    once(keep=False)
    until = perf_counter() + seconds
    while len(times[0]) < 3 or perf_counter() < until:
        once(keep=True)
    return [median(own) for own in times]


def gemm_rates(model: Path, dtype: torch.dtype, seconds: float) -> Iterator[tuple[int, Linear | None, float]]:
    """(height, linear, operations per second), distinct shapes only; linear None: a whole layer."""
    layer = linears(model)[0]
    for height in HEIGHTS:
        times = gemm(layer, height, dtype, seconds)
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


def read(path: Path, *, direct: bool = False, most: int | None = None) -> tuple[int, float]:
    """Reads a file once, in large pieces into one reused buffer: the bytes and the seconds."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    size, done = min(os.fstat(fd).st_size, most or sys.maxsize), 0
    buffer = mmap.mmap(-1, READ)  # aligned to pages, as direct reads want it
    try:
        started = perf_counter()
        while done < size:
            got = os.preadv(fd, [buffer], done)
            assert got > 0, "the file became shorter"
            done += got
        return done, perf_counter() - started
    finally:
        os.close(fd)


def disk_rates(path: Path) -> Iterator[tuple[str, float, float]]:
    """(way of reading, bytes per second, share of them that the disk was asked for)."""
    for way, cold, direct in (("cold, buffered", True, False), ("cold, direct", True, True), ("hot", False, False)):
        if not cold:
            read(path, most=MOST_READ)
        rates, shares = [], []
        for _ in range(3):
            if cold:
                evict(path)
            before = from_disk()
            try:
                size, seconds = read(path, direct=direct, most=MOST_READ)
            except OSError as error:
                print(f"{way}: not on this file system ({error.strerror})")
                break
            rates.append(size / seconds)
            shares.append((from_disk() - before) / size)
        if rates:
            yield way, median(rates), median(shares)


def measure(model: Path, parts: list[str], dtypes: list[str], seconds: float) -> dict[str, Any]:
    """All the rates, printed as tables on the way."""
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "weights_per_token": weights_per_token(model)}
    if "gemm" in parts:
        figures["gemm"] = {}
        rows = []
        wall, cpu = perf_counter(), process_time()
        for name in dtypes:
            layers: dict[int, float] = {}
            for height, linear, rate in gemm_rates(model, getattr(torch, name), seconds):
                what = f"{linear.out} x {linear.into}" if linear else "**layer**"
                rows.append((name, str(height), what, f"{rate / 1e12:.3f}"))
                if linear is None:
                    layers[height] = rate
            figures["gemm"][name] = {"best": max(layers.values()), "by_height": layers}
        figures["cores"] = (process_time() - cpu) / (perf_counter() - wall)
        print(report.table(("dtype", "rows", "matrix", "TFLOP/s"), rows))
        print(f"\n{figures['cores']:.2f} cores of {figures['threads']} threads\n")
    rates = []
    if "copy" in parts:
        figures["copy"] = copy_rate(seconds)
        rates.append(("copy", f"{figures['copy'] / 1e9:.2f}", "-"))
    if "disk" in parts:
        largest = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        figures["disk"] = {}
        for way, rate, share in disk_rates(largest):
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
    parser.add_argument("--seconds", type=float, default=1.0, help="of each matrix height, and of copying")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report.last_line(measure(args.model, args.only, args.dtypes, args.seconds))


if __name__ == "__main__":
    main()
