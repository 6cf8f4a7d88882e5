"""Puts single faults into copies of the families, one at a time; the conformance suite must turn red for each.

    python tools/seeded_faults.py [FAMILY ...]

The faults stand beside the variants that show them, in ``tests/variants/<family>.py``. A fault that the suite lets pass
is printed, and the exit code is 1. Takes about five seconds a fault.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def caught(tree: Path, variant: str) -> bool:
    """Whether the suite fails for this variant in a copy of the project."""
    tests = "tests/test_conformance.py::test_padded_has_the_bits_of_hugging_face"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests, "-k", f"{variant}-"]
    env = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}"}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode == 1


def main(families: Sequence[str]) -> int:
    from checkpoints import FAULTS

    chosen = [fault for fault in FAULTS if not families or fault[0].removesuffix(".py") in families]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in ("archs", "fpwap", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, tree / part)
        for number, (file, old, new, variant) in enumerate(chosen, 1):
            source = tree / "archs" / file
            text = source.read_text()
            if text.count(old) != 1:
                print(f"{file}: {old!r} occurs {text.count(old)} times", file=sys.stderr)
                return 2
            started = time.monotonic()
            source.write_text(text.replace(old, new))
            found = caught(tree, variant)
            source.write_text(text)
            missed += not found
            verdict = "caught" if found else "MISSED"
            print(
                f"{number:3} {verdict} {time.monotonic() - started:5.1f} s  {variant}: {old!r} -> {new!r}", flush=True
            )
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
