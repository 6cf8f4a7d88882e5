"""Run a command in a memory control group of a given size: what a machine with less memory would do.

    python tools/bench/memory_cap.py 700MB -- python -m fpwap run ...

The kernel counts the command's own pages, its children's, and the page cache of files that it was the first to read;
what does not fit is reclaimed, and what cannot be reclaimed is killed, with exit status 137. Pages that somebody else
read before are charged to that one: drop a checkpoint from the page cache before a capped run, or the cap holds less
than it says (`bench` does).

Needs to be root, or to own the group that it runs in; control groups of version 1 or 2, no systemd. The new group is a
child of the caller's own, so that limits above stay, and is removed when the command has ended. The last line on stderr
is JSON: the limit, the peak use, how often the limit was hit.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Uncapped(Exception):
    """There is no memory control group to be had here, and why."""


@dataclass(frozen=True)
class Files:
    """What a version of control groups calls things. swap: the limit on swap, or on memory and swap together."""

    limit: str
    swap: str
    peak: str
    hits: str


V1 = Files("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes", "memory.failcnt")
V2 = Files("memory.max", "memory.swap.max", "memory.peak", "memory.events")


def size(text: str) -> int:
    """Bytes of "700MB", "0.7GB", "1GiB" or a number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give bytes, or such as 700MB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def own_group(cgroups: str, mounts: str) -> tuple[Path, Files]:
    """The caller's memory group, from the texts of ``/proc/self/cgroup`` and ``/proc/self/mounts``. Raises Uncapped.

    Version 1 if its memory controller is mounted, since a controller belongs to one version only.
    """
    mounted = [line.split() for line in mounts.splitlines()]
    groups = [line.split(":", 2) for line in cgroups.splitlines()]
    for _, point, kind, options, *_ in mounted:
        if kind == "cgroup" and "memory" in options.split(","):
            return _below(point, next(path for _, names, path in groups if "memory" in names.split(","))), V1
    for _, point, kind, *_ in mounted:
        if kind == "cgroup2":
            return _below(point, next(path for number, _, path in groups if number == "0")), V2
    raise Uncapped("no memory control group is mounted")


def _below(point: str, path: str) -> Path:
    """A group's folder; in a container that sees only its own group the mount is that group."""
    folder = Path(point) / path.lstrip("/")
    return folder if folder.is_dir() else Path(point)


@contextlib.contextmanager
def group(limit: int) -> Iterator[tuple[Path, Files]]:
    """A control group with this limit and without swap, as long as it lasts. Raises Uncapped."""
    parent, files = own_group(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mounts").read_text())
    folder = parent / f"capped-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        raise Uncapped(f"no control group can be made in {parent}: {error.strerror}; run as root") from error
    try:
        if not (folder / files.limit).exists():
            raise Uncapped(f"the groups below {parent} have no memory controller: enable it in cgroup.subtree_control")
        (folder / files.limit).write_text(str(limit))
        with contextlib.suppress(OSError):  # where swap is not accounted for there is no such file
            (folder / files.swap).write_text("0" if files is V2 else str(limit))
        yield folder, files
    finally:
        if (folder / "memory.force_empty").exists():  # else its page cache goes on being charged to the parent
            (folder / "memory.force_empty").write_text("0")
        folder.rmdir()


def figures(folder: Path, files: Files, limit: int) -> dict[str, int]:
    """Bytes of the limit and of the peak, -1 where the kernel keeps none, and how often the limit was hit."""
    peak = folder / files.peak
    hits = (folder / files.hits).read_text().split()
    return {
        "limit": limit,
        "peak": int(peak.read_text()) if peak.exists() else -1,
        "hits": int(hits[hits.index("max") + 1] if "max" in hits else hits[0]),
    }


def run(limit: int, command: Sequence[str]) -> tuple[int, dict[str, int]]:
    """The command's exit status, 128 + n if signal n ended it, and `figures`. Raises Uncapped."""
    with group(limit) as (folder, files):
        enter = f'echo $$ > "{folder / "cgroup.procs"}" && exec "$@"'  # before the command has a page of its own
        child = subprocess.Popen(["/bin/sh", "-c", enter, "sh", *command])
        former = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
        try:
            status = child.wait()
        except KeyboardInterrupt:
            status = child.wait()
        finally:
            signal.signal(signal.SIGTERM, former)
        _end(folder)
        return (status if status >= 0 else 128 - status), figures(folder, files, limit)


def _end(folder: Path) -> None:
    """Kill what the command has left behind in its group: a group that is not empty cannot be removed."""
    while left := (folder / "cgroup.procs").read_text().split():
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("limit", type=size, help="bytes, or such as 700MB")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("which command?")
    try:
        status, found = run(args.limit, command)
    except Uncapped as error:
        raise SystemExit(f"memory_cap: {error}") from error
    print(json.dumps(found), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
