"""Puts single faults into copies of the families, one at a time; the conformance suite must turn red for each.

    python tools/seeded_faults.py [FAMILY ...]

The faults stand beside the variants that show them, in ``tests/variants/<family>.py``. A fault that the suite lets pass
is printed, and the exit code is 1. Takes six to twelve seconds a fault and core.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
JOBS = os.cpu_count() or 1
Fault = tuple[str, str, str, str]


def caught(tree: Path, variant: str) -> bool:
    """Whether the suite fails for this variant in a copy of the project, or the family refuses the variant's config."""
    tests = "tests/test_conformance.py::test_padded_has_the_bits_of_hugging_face"
    every = ["-m", "full or not full", "-k", f"{variant}-"]  # some show in one dtype only
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests, *every]
    env = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1) and "ArchError" in done.stdout:
        return True
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode == 1


def tried(fault: Fault, trees: "Queue[Path]") -> tuple[Fault, bool, float]:
    """Puts one fault into a copy of the project that nobody else uses meanwhile."""
    file, old, new, variant = fault
    tree, started = trees.get(), time.monotonic()
    source = tree / "archs" / file
    text = source.read_text()
    try:
        source.write_text(text.replace(old, new))
        return fault, caught(tree, variant), time.monotonic() - started
    finally:
        source.write_text(text)
        trees.put(tree)


def main(families: Sequence[str]) -> int:
    from checkpoints import FAULTS

    chosen = [fault for fault in FAULTS if not families or fault[0].removesuffix(".py") in families]
    for file, old, _, _ in chosen:
        times = (ROOT / "archs" / file).read_text().count(old)
        if times != 1:
            print(f"{file}: {old!r} occurs {times} times and must once", file=sys.stderr)
            return 2
    missed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        trees: Queue[Path] = Queue()
        for job in range(JOBS):
            tree = Path(folder) / str(job)
            tree.mkdir()
            for part in ("archs", "fpwap", "tests", "pyproject.toml"):
                copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
                copy(ROOT / part, tree / part)
            trees.put(tree)
        results = pool.map(lambda fault: tried(fault, trees), chosen)
        for number, ((_, old, new, variant), found, took) in enumerate(results, 1):
            missed += not found
            verdict = "caught" if found else "MISSED"
            print(f"{number:3} {verdict} {took:5.1f} s  {variant}: {old!r} -> {new!r}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
