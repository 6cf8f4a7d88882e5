"""Measures how fast this machine is at what one plan does: `fpwap plan --calibrate`, a few seconds.

Matrix products and attention of the model's own shapes at the plan's height, the element-wise passes between them,
reads of its shards past the page cache, a write, and copies to and from a device. Rates are counted as `fpwap.costs`
counts them, so that what is added up there gives the time back. Nothing of a request is decided or changed here.
"""

import contextlib
import mmap
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.ops import rms_norm

from .device import Device, open_device, pages
from .plan import Plan, Shapes
from .rates import Rates, cache_file, save

BUDGET_S = 0.5
"""Of one measurement."""
SLOW_S = 1.0
"""A product that takes longer is cut along its outputs."""
BLOCK, READ = 2**23, 2**30
"""Bytes of one read, and that are read at most."""
SHORT, LONG = 8, 512
"""Lengths of prompts between which attention is measured."""
ROWS = 1024
"""Rows of a product in padded mode."""


@torch.no_grad()
def calibrate(plan: Plan) -> Rates:
    """The rates of this machine with what was measured for the plan's shapes; kept for the plans to come.

    A plan without a layer has no shapes, and leaves the rates as they are.
    """
    device = open_device(plan.device)
    if plan.shapes is None:
        return plan.rates
    name = str(plan.dtype).removeprefix("torch.")
    passes = _passes(plan, plan.shapes, device)
    found = {"passes": passes, "matrix": _matrix(plan, plan.shapes, device, passes)}
    found["call_s"], found["attention"] = _attention(plan, plan.shapes, device, passes)
    found["cached"] = _cached()
    read, written = _read([path for path in plan.files if path.is_file()]), _written()
    found |= {"disk_read": read} if read else {}
    found |= {"disk_write": written} if written else {}
    if device.asynchronous:
        found["to_device"], found["from_device"] = _copies(device)
    rates = plan.rates.measured(name, date.today(), **found)
    save(rates, plan.device)
    return rates


def took(device: Device, work: Callable[[], object], share: float = 1.0) -> float:
    """Seconds of one call, the median of as many as a share of the budget allows, after a first one."""
    budget = share * BUDGET_S
    samples: list[float] = []
    work()
    device.compute.record().synchronize()
    end = perf_counter() + budget
    while len(samples) < 3 or perf_counter() < end:
        started = perf_counter()
        work()
        device.compute.record().synchronize()
        samples.append(perf_counter() - started)
        if samples[-1] > budget:
            break
    return statistics.median(samples)


def _passes(plan: Plan, shapes: Shapes, device: Device) -> float:
    """Bytes per second of a norm, a sum and an activation, a tile high, counted as `fpwap.prepare` does."""
    hidden, inner = shapes.hidden, shapes.inner
    rows, itemsize = plan.height or ROWS, plan.dtype.itemsize
    x, w = _draw(plan, rows, hidden), _draw(plan, hidden)
    gate, up = _draw(plan, rows, inner), _draw(plan, rows, inner)

    def between() -> Tensor:
        F.silu(gate).mul_(up)
        return x + rms_norm(x, w, 1e-6)

    wide = max(1, torch.float32.itemsize // itemsize)
    return rows * itemsize * ((3 + 5 * wide) * hidden + 5 * inner) / took(device, between)


def _matrix(plan: Plan, shapes: Shapes, device: Device, passes: float) -> float:
    """Flop per second of a layer's products, beside the passes over their operands."""
    rows, itemsize = plan.height or ROWS, plan.dtype.itemsize
    flop = seconds = 0.0
    for out, width in shapes.products:
        x = _draw(plan, rows, width)
        probe = _draw(plan, min(out, 128), width)
        each = took(device, partial(F.linear, x, probe), 0.0) / len(probe)
        out = min(out, max(len(probe), int(SLOW_S / each) // 64 * 64))
        weight = _draw(plan, out, width)
        touched = itemsize * (out * width + rows * (out + width))
        measured = took(device, partial(F.linear, x, weight))
        flop += 2.0 * rows * out * width
        seconds += max(measured / 4, measured - touched / passes)
    return flop / seconds


def _attention(plan: Plan, shapes: Shapes, device: Device, passes: float) -> tuple[float, float]:
    """Seconds of one call for a short prompt, and flop per second for a long one."""
    heads, kv_heads, width, values = shapes.attention

    def prompt(length: int) -> float:
        q = _draw(plan, 1, length, heads, width).transpose(1, 2)
        k = _draw(plan, 1, length, kv_heads, width).transpose(1, 2)
        v = _draw(plan, 1, length, kv_heads, values).transpose(1, 2)
        out = torch.empty(1, heads, length, values, dtype=plan.dtype, device=plan.device)

        def call() -> None:
            parts = q.clone(), k.clone(), v.clone()
            grouped = heads != kv_heads
            out.copy_(F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=grouped))

        copied = 2 * length * plan.dtype.itemsize * (heads * (width + values) + kv_heads * (width + values))
        return max(1e-6, took(device, call, 0.5) - copied / passes)

    short, long = prompt(SHORT), prompt(LONG)
    flop = LONG**2 * heads * (width + values)
    return short, flop / max(long / 4, long - short)


def _draw(plan: Plan, *shape: int) -> Tensor:
    """Numbers that are neither zero nor denormal."""
    return torch.empty(*shape, dtype=plan.dtype).uniform_(0.5, 1.5).to(plan.device)


def _cached() -> float:
    """Bytes per second of reading what is in memory."""
    source, out = torch.ones(2**26, dtype=torch.uint8), torch.empty(2**26, dtype=torch.uint8)
    return len(source) / took(open_device(torch.device("cpu")), lambda: out.copy_(source), 0.2)


def _read(files: Sequence[Path]) -> float | None:
    """Bytes per second past the page cache; None where that cannot be had."""
    buffer, done, started = mmap.mmap(-1, BLOCK), 0, perf_counter()
    for path in files:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except (OSError, AttributeError):
            return None
        try:
            for start in range(0, os.fstat(fd).st_size, BLOCK):
                done += os.preadv(fd, [buffer], start)
                if done >= READ or perf_counter() - started > 4 * BUDGET_S:
                    return done / (perf_counter() - started)
        except OSError:
            return None
        finally:
            os.close(fd)
    return done / (perf_counter() - started) if done >= BLOCK else None


def _written() -> float | None:
    """Bytes per second of a file that is on the disk afterwards, beside the file of rates."""
    block = bytes(BLOCK)
    with contextlib.suppress(OSError):
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_file().parent) as file:
            started = perf_counter()
            for _ in range(16):
                file.write(block)
            file.flush()
            os.fdatasync(file.fileno())
            return 16 * BLOCK / (perf_counter() - started)
    return None


def _copies(device: Device) -> tuple[float, float]:
    """Bytes per second from pinned memory to the device, and back."""
    host, there = device.pinned(2**26), device.memory(2**26)
    host.copy_(pages(len(host)))
    to = took(device, lambda: device.compute.copy(there, host), 0.4)
    back = took(device, lambda: device.compute.copy(host, there), 0.4)
    return len(host) / to, len(host) / back
