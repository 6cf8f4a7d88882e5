"""Runs that are killed, starved of disk, interrupted and cut from power; a sample here, all of it by ``make faults``.

`runs` and `power` say what happens and what has to hold. Each broken protocol has to be caught by one of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FULL = pytest.mark.faults


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", path, HERE / "shim.c", "-ldl"], check=True)
    return path


def play(program: str, *words: object, work: Path, shim: Path | None = None) -> dict[str, Any]:
    """What it counted. "wrong" is how many cases did not end as they should."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if shim is None else {"LD_PRELOAD": str(shim)})
    command = [sys.executable, str(HERE / program), *map(str, words), "--work", str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    print(done.stdout)
    counted: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert counted["cases"] > 0
    return counted


@pytest.mark.parametrize(
    ("variant", "every"),
    [("disk", 97), *(pytest.param(name, 1, marks=FULL) for name in ("disk", "ram", "visit"))],
)
def test_killed_at_any_call(variant: str, every: int, shim: Path, tmp_path: Path) -> None:
    counted = play("runs.py", "kill", "--variant", variant, "--every", every, work=tmp_path, shim=shim)
    assert counted["wrong"] == 0
    assert counted["killed"] >= 0.9 * counted["cases"]


@pytest.mark.parametrize(
    ("variant", "every"),
    [("ram", 127), *(pytest.param(name, 1, marks=FULL) for name in ("disk", "ram", "visit"))],
)
def test_a_full_disk_a_broken_one_and_short_writes(variant: str, every: int, shim: Path, tmp_path: Path) -> None:
    counted = play("runs.py", "errors", "--variant", variant, "--every", every, work=tmp_path, shim=shim)
    assert counted["wrong"] == 0
    assert counted["status 3"] > counted["cases"] / 2


@pytest.mark.parametrize(
    ("variant", "cases"), [("ram", 3), *(pytest.param(name, 500, marks=FULL) for name in ("disk", "ram", "visit"))]
)
def test_signals_at_any_moment(variant: str, cases: int, tmp_path: Path) -> None:
    assert play("runs.py", "random", "--variant", variant, "--cases", cases, work=tmp_path)["wrong"] == 0


@pytest.mark.parametrize(
    ("variant", "every"),
    [("disk", 99), *(pytest.param(name, 1, marks=FULL) for name in ("disk", "ram", "visit"))],
)
def test_power_cuts(variant: str, every: int, tmp_path: Path) -> None:
    assert play("power.py", "--variant", variant, "--every", every, work=tmp_path)["wrong"] == 0


@FULL
def test_twenty_file_systems_too_small(tmp_path: Path) -> None:
    """Needs root, for mount."""
    counted = play("runs.py", "tmpfs", "--variant", "disk", work=tmp_path)
    assert (counted["cases"], counted["wrong"]) == (20, 0)


@FULL
def test_a_thousand_flipped_bits(tmp_path: Path) -> None:
    counted = play("runs.py", "flips", "--cases", 1000, work=tmp_path)
    assert (counted["cases"], counted["wrong"]) == (1000, 0)


@pytest.mark.parametrize(
    ("broken", "program", "variant", "every"),
    [
        ("no_fsync", "power.py", "disk", 60),
        pytest.param("commit_before_data", "power.py", "disk", 20, marks=FULL),
        pytest.param("in_place", "runs.py", "disk", 13, marks=FULL),
        pytest.param("early_manifest", "runs.py", "ram", 13, marks=FULL),
    ],
)
def test_a_broken_protocol_is_caught(
    broken: str, program: str, variant: str, every: int, shim: Path, tmp_path: Path
) -> None:
    words = ("kill",) if program == "runs.py" else ()
    request = ("--variant", variant, "--every", every, "--broken", broken)
    found = play(program, *words, *request, work=tmp_path, shim=shim if words else None)
    assert found["wrong"] > 0
