"""Power cuts, at the level of files: what a disk may hold of a run at any moment.

    python power.py --variant disk --work FOLDER

One run's calls that change its folder are recorded with their bytes. A file is sure to hold what was in it at its last
sync, a folder the names that it had at its own; of what came later each write, and each name, may or may not have
reached the disk, in any order; but a file that is renamed has one of its names. So at every call three disks are made:
nothing that was not synced is there ("lost"); all names are, and no such bytes ("names"); some of both ("some"). From
each the same run has to end as it should.
"""

import argparse
import json
import os
import pickle
import random
import signal
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from runs import BROKEN, VARIANTS, Runs

ADVERSARIES = ("lost", "names", "some")
Call = tuple[Any, ...]
"""The name of what was done, its path below the run's folder, and what it was done with."""


class Recorder:
    """Takes down what is done to a folder by ``os``, one call at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = str(folder), list[Call]()
        self._lock = threading.RLock()

    def _below(self, what: Any) -> str | None:
        path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
        inside = path == self.folder or path.startswith(self.folder + "/")
        return path[len(self.folder) + 1 :] if inside else None

    def watch(self) -> None:
        """From now on, for good."""
        for name in (
            "open",
            "pwrite",
            "ftruncate",
            "posix_fallocate",
            "fsync",
            "fdatasync",
            "unlink",
            "mkdir",
            "rmdir",
        ):
            setattr(os, name, self._watched(name, getattr(os, name)))
        rename = os.rename

        def renamed(old: Any, new: Any) -> None:
            with self._lock:
                rename(old, new)
                if (below := self._below(new)) is not None:
                    self.calls.append(("rename", self._below(old), below))

        os.rename = renamed  # type: ignore[assignment]

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(what: Any, *given: Any, **more: Any) -> Any:
            with self._lock:
                below = self._below(what)
                fresh = name == "open" and below is not None and not os.path.exists(what)
                done = real(what, *given, **more)
                if below is None or (name == "open" and not fresh):
                    return done
                match name:
                    case "pwrite":
                        data, at = given
                        self.calls.append(("write", below, at, bytes(data)[:done]))
                    case "ftruncate":
                        self.calls.append(("size", below, given[0], False))
                    case "posix_fallocate":
                        self.calls.append(("size", below, sum(given), True))
                    case "fsync" | "fdatasync":
                        folder = stat.S_ISDIR(os.fstat(what).st_mode)
                        self.calls.append(("sync folder" if folder else "sync", below))
                    case _:
                        self.calls.append((name, below))
                return done

        return call


@dataclass
class File:
    """durable: at the last sync; fresh: what was done since."""

    durable: bytearray = field(default_factory=bytearray)
    fresh: list[Call] = field(default_factory=list)

    def after(self, calls: Sequence[Call]) -> bytes:
        data = bytearray(self.durable)
        for name, _, at, more in calls:
            if name == "write":
                data.extend(bytes(max(0, at + len(more) - len(data))))
                data[at : at + len(more)] = more
            elif more:  # reserved
                data.extend(bytes(max(0, at - len(data))))
            else:
                data = data[:at] + bytes(max(0, at - len(data)))
        return bytes(data)


class Disk:
    """A folder as its calls leave it; None stands for a folder."""

    def __init__(self) -> None:
        self.names: dict[str, File | None] = {}
        self.durable: dict[str, File | None] = {}

    def take(self, call: Call) -> None:
        name, path, *more = call
        match name:
            case "open":
                self.names[path] = File()
            case "mkdir":
                self.names[path] = None
            case "unlink" | "rmdir":
                del self.names[path]
            case "rename":
                self.names[more[0]] = self.names.pop(path)
            case "write" | "size":
                self._file(path).fresh.append(call)
            case "sync":
                file = self._file(path)
                file.durable, file.fresh = bytearray(file.after(file.fresh)), []
            case "sync folder":
                gone = [child for child in self.durable if os.path.dirname(child) == path and child]
                for child in gone:
                    del self.durable[child]
                there = {child: file for child, file in self.names.items() if os.path.dirname(child) == path}
                self.durable.update(there)

    def _file(self, path: str) -> File:
        found = self.names[path]
        assert found is not None
        return found

    def put(self, folder: Path, adversary: str, draw: random.Random) -> None:
        """What may be found after a cut, in a new folder."""
        names = dict(self.durable if adversary == "lost" else self.names)
        if adversary == "some":
            for path in {*self.durable, *self.names}:
                found = draw.choice((self.durable, self.names))
                names.pop(path, None)
                if path in found:
                    names[path] = found[path]
            for path, file in self.durable.items():  # a rename is one step: the file has its old name or its new one
                there, kept = (any(file is one for one in some.values()) for some in (self.names, names))
                if file is not None and there and not kept:
                    names[path] = file
        folder.mkdir()
        for path, file in sorted(names.items()):
            if not (folder / path).parent.is_dir():
                continue  # lost with its folder
            if file is None:
                (folder / path).mkdir(exist_ok=True)
            else:
                fresh = [call for call in file.fresh if adversary == "some" and draw.random() < 0.5]
                (folder / path).write_bytes(file.after(fresh))


def recorded(runs: Runs) -> list[Call]:
    """The calls of an undisturbed run."""
    out, found = runs.work / "recorded", runs.work / "calls"
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        recorder = Recorder(out)
        if runs.broken:
            BROKEN[runs.broken]()
        recorder.watch()
        if runs.broken == "no_fsync":
            BROKEN["no_fsync"]()
        runs.sweep(out)
        found.write_bytes(pickle.dumps(recorder.calls))
        os._exit(0)
    assert runs.end(pid) == (0, 0)
    calls: list[Call] = pickle.loads(found.read_bytes())
    return calls


def cuts(calls: Sequence[Call], every: int) -> Iterator[tuple[int, Disk]]:
    disk = Disk()
    for at, call in enumerate(calls):
        if at and at % every == 0:
            yield at, disk
        if call[1] or call[0] == "sync folder":  # the run's folder itself is there
            disk.take(call)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variant", choices=VARIANTS, default="disk")
    parser.add_argument("--broken", choices=BROKEN)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    runs = Runs(options.work, options.variant, options.broken)
    calls, draw = recorded(runs), random.Random(0)
    runs.broken = None  # whoever goes on is sound
    for at, disk in cuts(calls, options.every):
        for adversary in ADVERSARIES:
            out = runs.work / f"{at}_{adversary}"
            disk.put(out, adversary, draw)
            runs.judge(out, f"{adversary}, cut before call {at}: {calls[at][:2]}")
    for line in runs.wrong[:20]:
        print(line)
    print(json.dumps({"variant": options.variant, "calls": len(calls), **dict(runs.counts), "wrong": len(runs.wrong)}))


if __name__ == "__main__":
    main()
