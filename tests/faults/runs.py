"""Runs of one tiny request that something happens to, each in a process forked from one that has imported everything.

    LD_PRELOAD=shim.so python runs.py kill --variant disk --work FOLDER

kill: at every call that changes the run's folder, before it, in its middle, behind it. errors: a full disk, a broken
one and a short write at every such call, and a disk that is full from there on. random: up to three signals a run, at
any moment. tmpfs: twenty sizes of a file system too small (needs root). flips: a thousand bits of a finished run. After
each the folder must be no result, or a right one; the same run again must end with the bytes of an
undisturbed one and leave nothing else. Prints what it counted as JSON, and what went wrong before that.
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from checkpoints import Variant, write

from fpwap import Callback, Result, Sweep, commits, files, residual, store
from fpwap.callbacks.common import DiffOfMeans, IncrementalPCA, RawActivations
from fpwap.errors import FpwapError, StoreError

LENGTHS = [7, 3, 12, 5, 9, 2, 11, 4]
VARIANTS: dict[str, dict[str, Any]] = {
    "disk": {"residual": "disk", "loading": "stream", "layers_per_visit": 1},
    "ram": {"residual": "ram", "loading": "resident", "layers_per_visit": 2},
    "visit": {"layers_per_visit": 100},
}
MODES = {"before": 1, "torn": 2, "after": 3, "full": 4, "broken": 5, "short": 6, "full for good": 7}
REFUSED, RAISED, PATIENCE = 3, 4, 30


def dataset() -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [{"input_ids": [draw.randrange(1, 60) for _ in range(n)], "label": n % 2} for n in LENGTHS]


def callbacks() -> list[Callback]:
    return [
        RawActivations(),
        RawActivations([1], hook="q", last_token_only=False),
        IncrementalPCA("all", 3, last_token_only=False),
        DiffOfMeans("all", lambda sample: sample["label"]),
    ]


def content(out: Path) -> dict[str, bytes]:
    """All that a run puts out, file by file."""
    return {path.name: path.read_bytes() for part in ("activations", "artifacts") for path in (out / part).iterdir()}


# --- protocols that are wrong, each in one way ----------------------------------------------------------------------


def in_place() -> None:
    """Every group writes over what it reads."""

    class InPlace(residual.OnDisk):
        def turn(self) -> None:
            super().turn()
            self._reading = 0

        def write(self, rows: slice, values: torch.Tensor, name: str = "residual") -> None:
            self._reading = 1
            try:
                super().write(rows, values, name)
            finally:
                self._settle(0)
                self._reading = 0

        def hold(self, durable: Any) -> None:
            pass

    residual.OnDisk = InPlace  # type: ignore[misc]


def early_manifest() -> None:
    """What was put together in memory reaches its file after the manifest."""
    late: list[Callable[[], None]] = []
    plain_commit, plain_finish = store.Store.commit, store.Store.finish

    def commit(self: store.Store, sites: Any) -> None:
        for output in self._outputs.values():
            if output.assembled is not None and output.file.fd >= 0:
                values, start, path = output.assembled.copy(), output.start, output.file.path.with_suffix("")
                late.append(lambda v=values, s=start, p=path: _put_in(p, v, s))  # type: ignore[misc]
                output.assembled[:] = 0
        plain_commit(self, sites)

    def finish(self: store.Store, *given: Any) -> None:
        plain_finish(self, *given)
        for put in late:
            put()

    store.Store.commit, store.Store.finish = commit, finish  # type: ignore[method-assign, assignment]


def _put_in(path: Path, values: Any, start: int) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, values.reshape(-1).data, start)
    os.close(fd)


def commit_before_data() -> None:
    """A record is written before what it speaks of."""
    plain = store.Store.save

    def save(self: store.Store, afterwards: Callable[[], None], file: files.File) -> Any:
        afterwards()
        return plain(self, lambda: None, file)

    store.Store.save = save  # type: ignore[method-assign]


def no_fsync() -> None:
    """Nothing is waited for."""
    os.fsync = os.fdatasync = lambda fd: None


BROKEN = {f.__name__: f for f in (in_place, early_manifest, commit_before_data, no_fsync)}

# --- one run, in a process of its own -------------------------------------------------------------------------------


class Runs:
    """The model, and runs of the request. shim: what stands between them and the system, if anything does."""

    def __init__(self, work: Path, variant: str, broken: str | None = None, shim: Any = None) -> None:
        self.work, self.request, self.broken, self.shim = work, VARIANTS[variant], broken, shim
        self.model = work / "model"
        if not self.model.exists():
            write(Variant(family="llama", config={"num_hidden_layers": 3}), self.model)
        self.said = work / "said"
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        status, _ = self.run(work / "whole")
        assert status == 0, self.said.read_text()
        self.whole = content(work / "whole")

    def sweep(self, out: Path) -> None:
        commits.AT_RISK_S, commits.SHARE = 0.0, float("inf")
        Sweep(
            self.model, dataset(), None, callbacks(), out=out, microbatch_tokens=16, progress=False, **self.request
        ).run()

    def start(self, out: Path, arm: tuple[int, int] = (0, 0), *, count: Path | None = None) -> int:
        """The process of a run."""
        pid = os.fork()
        if pid:
            return pid
        status = RAISED
        try:
            signal.alarm(PATIENCE)
            if self.shim is not None:
                self.shim.shim_arm(str(out).encode(), arm[0], arm[1])
            if self.broken:
                BROKEN[self.broken]()
            self.sweep(out)
            status = 0
            if count is not None:
                count.write_text(str(self.shim.shim_count()))
        except FpwapError as error:
            self.said.write_text(str(error))
            status = REFUSED
        except KeyboardInterrupt:
            status = 130
        except BaseException as error:
            self.said.write_text(repr(error))
        os._exit(status)

    def run(self, out: Path, *given: Any, **more: Any) -> tuple[int, int]:
        """Exit status and signal of a run."""
        return self.end(self.start(out, *given, **more))

    @staticmethod
    def end(pid: int) -> tuple[int, int]:
        _, status = os.waitpid(pid, 0)
        return (0, os.WTERMSIG(status)) if os.WIFSIGNALED(status) else (os.WEXITSTATUS(status), 0)

    def judge(self, out: Path, name: str) -> None:
        """A run in ``out`` has been cut off: it is no result, or a right one, and ends as the undisturbed one did."""
        self.counts["cases"] += 1
        try:
            result = Result.open(out)
            result.verify()
            if content(out) != self.whole:
                self._fail("false complete", name)
        except StoreError as error:
            if (out / "manifest.json").exists() and "lock" not in str(error):
                self._fail("false complete", f"{name}: {error}")
        status = self.run(out)
        if status != (0, 0):
            self._fail("lost", f"{name}: {status} {self.said.read_text() if status[0] else ''}")
        else:
            if content(out) != self.whole:
                self._fail("different", name)
            names = {path.name for path in out.iterdir()}
            if names != {path.name for path in (self.work / "whole").iterdir()}:
                self._fail("leftovers", f"{name}: {sorted(names)}")
        shutil.rmtree(out)

    def _fail(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        self.wrong.append(f"{kind}: {what}")

    def calls(self) -> int:
        """Calls of an undisturbed run that change its folder."""
        self.run(self.work / "counted", count=self.work / "count")
        shutil.rmtree(self.work / "counted")
        return int((self.work / "count").read_text())

    # --- what happens to runs ---

    def kill(self, every: int) -> None:
        for at in range(1, self.calls() + 1, every):
            for how in ("before", "torn", "after"):
                out = self.work / f"{at}_{how}"
                _, signum = self.run(out, (at, MODES[how]))
                self.counts["killed"] += signum == signal.SIGKILL
                if out.exists():
                    self.judge(out, f"{how} call {at}")

    def errors(self, every: int) -> None:
        for at in range(1, self.calls() + 1, every):
            for how in ("full", "broken", "short", "full for good"):
                out = self.work / f"{at}_{how}"
                status, signum = self.run(out, (at, MODES[how]))
                said = self.said.read_text() if status else ""
                self.counts[f"status {status}"] += 1
                if signum:
                    self._fail("died", f"{how} at call {at}: signal {signum}")
                elif status not in (0, REFUSED) or (status and (how == "short" or str(self.work) not in said)):
                    self._fail("not clean", f"{how} at call {at}: {said}")
                if out.exists():
                    self.judge(out, f"{how} at call {at}")

    def random(self, cases: int, seed: int = 0) -> None:
        draw = random.Random(seed)
        began = time.perf_counter()
        self.run(self.work / "timed")
        took = time.perf_counter() - began
        for case in range(cases):
            out = self.work / f"{case}"
            for _ in range(draw.randint(1, 3)):
                signum = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
                pid = self.start(out)
                time.sleep(draw.random() * took)
                os.kill(pid, signum)
                status, by = self.end(pid)
                self.counts[f"{signal.Signals(signum).name}, status {status}, signal {by}"] += 1
                if by and by not in (signum, signal.SIGKILL):
                    self._fail("died", f"case {case}: signal {by}")
            if out.exists():
                self.judge(out, f"case {case}")
            else:
                self.counts["cases"] += 1

    def tmpfs(self) -> None:
        place = self.work / "small"
        place.mkdir()
        for size in range(1, 21):
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={16 * size}k", "tmpfs", place], check=True)
            try:
                status, signum = self.run(place / "out")
                self.counts[f"status {status}"] += 1
                said = self.said.read_text() if status else ""
                if signum or status not in (0, REFUSED) or (status and "free" not in said):
                    self._fail("not clean", f"{size}: {status}, signal {signum}: {said}")
                subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
                self.judge(place / "out", f"{16 * size} kB")
            finally:
                subprocess.run(["umount", place], check=True)

    def flips(self, cases: int, seed: int = 0) -> None:
        draw, out = random.Random(seed), self.work / "whole"
        files = [path for path in sorted(out.rglob("*")) if path.is_file()]
        for case in range(cases):
            path = draw.choice(files)
            plain = path.read_bytes()
            place = draw.randrange(len(plain))
            path.write_bytes(plain[:place] + bytes([plain[place] ^ 1 << draw.randrange(8)]) + plain[place + 1 :])
            self.counts["cases"] += 1
            try:
                Result.open(out).verify()
                self._fail("not found", f"case {case}: {path.name}, byte {place}")
            except StoreError as error:
                if path.name not in str(error):
                    self._fail("not named", f"case {case}: {path.name}: {error}")
            path.write_bytes(plain)
        Result.open(out).verify()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("kill", "errors", "random", "tmpfs", "flips"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variant", choices=VARIANTS, default="disk")
    parser.add_argument("--broken", choices=BROKEN)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--cases", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"]) if "LD_PRELOAD" in os.environ else None
    runs = Runs(options.work, options.variant, options.broken, shim)
    match options.what:
        case "kill":
            runs.kill(options.every)
        case "errors":
            runs.errors(options.every)
        case "random":
            runs.random(options.cases)
        case "tmpfs":
            runs.tmpfs()
        case "flips":
            runs.flips(options.cases)
    for line in runs.wrong[:20]:
        print(line)
    print(json.dumps({"variant": options.variant, "what": options.what, **dict(runs.counts), "wrong": len(runs.wrong)}))


if __name__ == "__main__":
    main()
