"""What all benchmarks say in the same way: the machine, the versions, a table, a file per run.

Knows no figures and measures nothing.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("fpwap", "torch", "transformers", "safetensors", "numpy")


def machine() -> dict[str, Any]:
    """The processor, what of it this process may use, memory and kernel; no names of hosts or folders."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpu.splitlines())}
    matrix = {"amx_bf16", "avx512_bf16", "avx512f", "avx2"} & set(lines.get("flags", "").split())
    return {
        "processor": lines.get("model name") or platform.processor() or platform.machine(),
        "instructions": sorted(matrix),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"commit": _commit()}


def _commit() -> str:
    """The commit that is measured, with a "+" if the working tree has other code than that."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cores() -> int:
    return len(os.sched_getaffinity(0))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown that is also aligned for who reads it in a terminal: words to the left, figures to the right."""
    cells = [list(head), *map(list, rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])} |"

    rule = "|" + "|".join(f":{'-' * (w + 1)}" if i == 0 else f"{'-' * (w + 1)}:" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def last_line(figures: Mapping[str, Any]) -> None:
    """The one JSON line that ends what a benchmark prints."""
    sys.stdout.flush()
    print(json.dumps(figures), flush=True)


def store(name: str, title: str, text: str, figures: Mapping[str, Any]) -> Path:
    """Keep a run as ``results/DATE_NAME.md``: a table for the reader, then all of its figures as JSON."""
    now = datetime.now(UTC)
    path = RESULTS / f"{now:%Y-%m-%d_%H%M%S}_{name}.md"
    facts = [("machine", machine()), ("versions", versions())]
    lines = [f"- {key}: {', '.join(f'{k} {_plain(v)}' for k, v in values.items())}" for key, values in facts]
    record = json.dumps({"date": f"{now:%Y-%m-%dT%H:%M:%SZ}", **dict(facts), **figures}, indent=1)
    path.parent.mkdir(exist_ok=True)
    body = [f"# {title}", f"- date: {now:%Y-%m-%d %H:%M} UTC\n" + "\n".join(lines), text, f"```json\n{record}\n```"]
    path.write_text("\n\n".join(body) + "\n")
    return path


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
