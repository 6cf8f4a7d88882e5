"""A run that is cut off goes on from its last commit and ends with the bytes of an undisturbed one.

Here by an exception amid the loop, in one process, at every visit of every layout; `tests/faults` kills processes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from late import Late
from test_engine import STEP, WAYS, callbacks, content, dataset

from fpwap import Result, Sweep, commits, engine
from fpwap.errors import StoreError

Checkpoint = Callable[[str], Path]
LAYOUTS = {**WAYS, "on the device": {"loading": "stream", "residual": "device", "layers_per_visit": 1}}


class Cut(Exception):
    """Where the power went."""


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit after every visit."""
    monkeypatch.setattr(commits, "AT_RISK_S", 0.0)
    monkeypatch.setattr(commits, "SHARE", float("inf"))


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Ends runs before a visit; None: no more. The list is of visits so far."""
    plain, at = engine._visit, {"last": None}
    done: list[int] = []

    def visit(*given: Any) -> None:
        if at["last"] is not None and len(done) == at["last"]:
            raise Cut
        done.append(len(done))
        plain(*given)

    def after(last: int | None) -> list[int]:
        at["last"] = last
        done.clear()
        return done

    monkeypatch.setattr(engine, "_visit", visit)
    return after


def sweep(folder: Path, out: Path, **request: Any) -> Result:
    wished = {"dtype": "float32", "progress": False, **STEP, **request}
    return Sweep(folder, dataset(), None, wished.pop("callbacks", None) or callbacks(folder), out=out, **wished).run()


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted((out / "scratch" / "commits").glob("*.json"))]


def steps(found: list[dict[str, Any]]) -> list[Step]:
    """What is left behind the last record."""
    schedule = Schedule.from_json(found[0]["way"]["schedule"])
    return list(schedule.steps(Point(*found[-1]["point"])))


@pytest.mark.parametrize("way", list(LAYOUTS))
def test_cut_at_every_visit(
    way: str,
    checkpoint: Checkpoint,
    tmp_path: Path,
    eager: None,
    cut: Callable[[int | None], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint("llama")
    if way == "on the device":
        monkeypatch.setattr("fpwap.sweep.open_device", lambda asked: Late(1))
    request = LAYOUTS[way]
    done = cut(None)
    whole = content(sweep(folder, tmp_path / "whole", **request))
    visits = len(done)
    assert visits >= 4
    for last in range(1, visits):
        out = tmp_path / f"{last}"
        cut(last)
        with pytest.raises(Cut):
            sweep(folder, out, **request)
        with pytest.raises(StoreError, match="no finished run"):
            Result.open(out)
        found = records(out)
        left = len(steps(found)) if found else visits
        done = cut(None)
        result = sweep(folder, out, **request)
        assert len(done) == left, "what was committed is not done again"
        assert content(result) == whole
        assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
        result.verify()
