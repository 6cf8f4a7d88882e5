"""A run that is cut off goes on from its last commit and ends with the bytes of an undisturbed one.

Here by an exception amid the loop, in one process, at every visit of every layout; `tests/faults` kills processes.
"""

import json
import os
import random
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Variant, write
from late import Late
from test_engine import LENGTHS, STEP, WAYS, callbacks, content, dataset
from torch import Tensor

from fpwap import Callback, Result, Sweep, commits, engine
from fpwap.callbacks.base import LayerArtifact
from fpwap.callbacks.common import RawActivations
from fpwap.costs import Way
from fpwap.errors import CallbackError, RequestError, StoreError
from fpwap.plan import Plan, make_plan
from fpwap.schedule import Point, Schedule, Stage, Step, group_stages

Checkpoint = Callable[[str], Path]
LAYOUTS = {**WAYS, "on the device": {"loading": "stream", "residual": "device", "layers_per_visit": 1}}


class Cut(Exception):
    """Where the power went."""


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Ends runs before a visit; None: no more. The list is of visits so far."""
    plain = engine._visit
    at: dict[str, int | None] = {"last": None}
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


@pytest.fixture
def eager(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit after every visit, however slow the disk is: else none is due while one is on its way."""
    plain = commits.Commits._due

    def due(self: commits.Commits) -> bool:
        wait([self._last] if self._last is not None else [])
        return plain(self)

    monkeypatch.setattr(commits.Commits, "_due", due)


def sweep(folder: Path, out: Path, **request: Any) -> Result:
    wished = {"dtype": "float32", "progress": False, **STEP, **request}
    return Sweep(folder, dataset(), None, wished.pop("callbacks", None) or callbacks(folder), out=out, **wished).run()


def interrupted(folder: Path, out: Path, cut: Callable[[int | None], list[int]], last: int, **request: Any) -> None:
    cut(last)
    with pytest.raises(Cut):
        sweep(folder, out, **request)
    cut(None)


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
        interrupted(folder, out, cut, last, **request)
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


@pytest.mark.parametrize("kind", ["waves", "experts", "head"])
def test_what_is_cut_into_pieces(
    kind: str,
    tmp_path: Path,
    eager: None,
    cut: Callable[[int | None], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The dataset in waves; experts, or the head, in turns for chunks of it."""
    variant = Variant(family="mixtral") if kind == "experts" else Variant(family="llama", config={"vocab_size": 9000})
    folder = write(variant, tmp_path / "model")

    def wanted(*given: Any) -> Plan:
        plan = make_plan(*given)
        layers, batches = range(plan.layers), range(len(plan.costs.rows))
        halves = batches[: len(batches) // 2], batches[len(batches) // 2 :]
        apart = kind != "waves"
        groups = group_stages(layers, norm=True, head=True, size=1, apart=apart)
        schedule = Schedule(groups, halves if kind == "waves" else (batches,))
        if kind == "experts":
            streamed = frozenset(Stage("layer", layer) for layer in layers)
            schedule = replace(schedule, streamed=streamed, chunks=halves)
        if kind == "head":
            schedule = replace(schedule, streamed=frozenset({Stage("head")}), head_chunks=halves)
        return replace(plan, schedule=schedule, loading="stream", ring=3, tier="disk" if kind == "head" else "ram")

    monkeypatch.setattr("fpwap.prepare.make_plan", wanted)
    monkeypatch.setattr("fpwap.weights.PIECE", 1 << 12)
    done = cut(None)
    whole = content(sweep(folder, tmp_path / "whole"))
    for last in range(1, len(done), 2):
        out = tmp_path / f"{last}"
        interrupted(folder, out, cut, last)
        assert content(sweep(folder, out)) == whole


def test_cut_again_and_again(
    checkpoint: Checkpoint, tmp_path: Path, eager: None, cut: Callable[[int | None], list[int]]
) -> None:
    """Every visit in a run of its own, by turns in memory and on disk as far as the first one left it open."""
    folder, out = checkpoint("gpt2"), tmp_path / "out"
    request = {"residual": "disk", "layers_per_visit": 1}
    whole = content(sweep(folder, tmp_path / "whole", **request))
    runs = 0
    while not (out / "manifest.json").exists():
        runs += 1
        cut(1)
        try:
            sweep(folder, out, **request)
        except Cut:
            assert runs < 100
    assert runs > 10
    assert content(Result.open(out)) == whole


def test_the_order_of_the_unfinished_run_is_kept_and_memory_may_be_less(
    checkpoint: Checkpoint, tmp_path: Path, eager: None, cut: Callable[[int | None], list[int]]
) -> None:
    folder, out = checkpoint("llama"), tmp_path / "out"
    whole = content(sweep(folder, tmp_path / "whole"))
    interrupted(folder, out, cut, 6, loading="stream", residual="disk", layers_per_visit=2)
    before = records(out)[0]["way"]["schedule"]
    asked: list[dict[str, Any]] = []
    plain = Plan.like

    def like(plan: Plan, way: Any) -> Plan:
        found = plain(plan, way)
        asked.append({"schedule": found.schedule.to_json(), "tier": found.tier, "loading": found.loading})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "like", like)
        result = sweep(folder, out, loading="resident", residual="ram", layers_per_visit=1, memory="200MB")
    assert asked == [{"schedule": before, "tier": "disk", "loading": "resident"}]
    assert content(result) == whole


def test_only_weights_of_unfinished_layers_are_read_again(
    checkpoint: Checkpoint, tmp_path: Path, eager: None, cut: Callable[[int | None], list[int]]
) -> None:
    folder = checkpoint("llama")
    request = {"loading": "stream", "residual": "ram", "layers_per_visit": 1, "callbacks": [RawActivations()]}
    done = cut(None)
    result = sweep(folder, tmp_path / "whole", **request)
    every, visits = result.profile.bytes_moved()["weights"], len(done)
    out = tmp_path / "out"
    interrupted(folder, out, cut, visits - 1, **request)
    left = {stage for step in steps(records(out)) for stage in range(step.group, step.group + 1)}
    assert len(left) == 1, "it was in the last layer"
    again = sweep(folder, out, **request).profile.bytes_moved()["weights"]
    layer = sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 3
    assert 0 < again < layer < every


class Counts(Callback):
    """Keeps what it saw, and can or cannot say it."""

    target_layers = (0,)

    def on_sweep_start(self, ctx: Any) -> None:
        self._seen: list[int] = []

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
        self._seen += sample_ids.tolist()

    def on_layer_end(self, layer_idx: int | None) -> LayerArtifact:
        return LayerArtifact("seen", {"ids": torch.tensor(self._seen)})


class Says(Counts):
    def state_dict(self, layer: int | None, hook: str) -> dict[str, Any]:
        return {"seen": list(self._seen)}

    def load_state_dict(self, layer: int | None, hook: str, state: Any) -> None:
        self._seen = list(state["seen"])


class Public(Callback):
    """Counts in a public attribute, which is its identity."""

    target_layers = (0,)
    count = 0

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
        self.count += len(sample_ids)


def test_a_callback_that_says_its_state_goes_on(
    checkpoint: Checkpoint, tmp_path: Path, eager: None, cut: Callable[[int | None], list[int]]
) -> None:
    folder, out = checkpoint("llama"), tmp_path / "out"
    whole = content(sweep(folder, tmp_path / "whole", callbacks=[Says()]))
    interrupted(folder, out, cut, 2, callbacks=[Says()])
    assert records(out)
    assert content(sweep(folder, out, callbacks=[Says()])) == whole


@pytest.mark.parametrize("callback", [Counts, Public])
@pytest.mark.parametrize("residual", ["ram", "disk"])
def test_a_callback_that_does_not_is_told_at_start_and_begun_again(
    callback: type[Callback],
    residual: str,
    checkpoint: Checkpoint,
    tmp_path: Path,
    eager: None,
    cut: Callable[[int | None], list[int]],
) -> None:
    folder, out = checkpoint("llama"), tmp_path / "out"
    request = {"residual": residual, "layers_per_visit": 1}
    told = rf"cannot be gone on with|{callback.__name__} changes its public attribute"
    with pytest.warns(UserWarning, match=told):
        interrupted(folder, out, cut, 3, callbacks=[callback()], **request)
    assert not records(out)
    with pytest.warns(UserWarning, match=told):
        sweep(folder, out, callbacks=[callback()], **request)


@pytest.mark.parametrize("residual", ["ram", "disk"])
def test_a_flipped_bit_of_what_was_committed_is_found_and_named(
    residual: str, checkpoint: Checkpoint, tmp_path: Path, eager: None, cut: Callable[[int | None], list[int]]
) -> None:
    """In records, state and residual slots; what is in an open output is covered by the digests of its prompts."""
    folder, out = checkpoint("llama"), tmp_path / "out"
    request = {"residual": residual, "layers_per_visit": 1}
    interrupted(folder, out, cut, 6, **request)
    last = records(out)[-1]
    slots = {out / file["file"]: file["ends"][-1] for file in last["residual"]["files"]}
    files = [*(out / "scratch" / "commits").glob("*.json"), out / last["state"]["file"], *slots, out / "run.json"]
    assert len(files) >= 4
    draw = random.Random(1)
    for path in files:
        plain = path.read_bytes()
        committed = len(plain) if path not in slots else len(plain) // sum(LENGTHS) * slots[path]
        for _ in range(8):
            place, bit = draw.randrange(committed), draw.randrange(8)
            path.write_bytes(plain[:place] + bytes([plain[place] ^ 1 << bit]) + plain[place + 1 :])
            with pytest.raises(StoreError, match=rf"{path.name}|{out}"):
                sweep(folder, out, **request)
            path.write_bytes(plain)
    for path in slots:
        size = path.stat().st_size
        os.truncate(path, size - 1)
        with pytest.raises(StoreError, match=rf"{path.name} has {size - 1} bytes, not {size}.*resume='never'"):
            sweep(folder, out, **request)
        os.truncate(path, size)
    with pytest.raises(StoreError):
        sweep(folder, out, **request)
    sweep(folder, out, resume="never", **request)


def test_resume_never_and_require(
    checkpoint: Checkpoint, tmp_path: Path, eager: None, cut: Callable[[int | None], list[int]]
) -> None:
    folder, out = checkpoint("llama"), tmp_path / "out"
    with pytest.raises(StoreError, match="holds no run to go on with"):
        sweep(folder, out, resume="require")
    assert not out.exists()
    with pytest.raises(RequestError, match="needs the out="):
        Sweep(folder, dataset(), None, callbacks(folder), resume="require")
    whole = content(sweep(folder, tmp_path / "whole"))
    interrupted(folder, out, cut, 5)
    done = cut(None)
    assert content(sweep(folder, out, resume="require")) == whole
    assert len(done) < 16
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    interrupted(folder, out, cut, 5)
    done = cut(None)
    assert content(sweep(folder, out, resume="never")) == whole
    assert len(done) == 16


@pytest.fixture
def moved(
    checkpoint: Checkpoint,
    tmp_path: Path,
    eager: None,
    cut: Callable[[int | None], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Path, Path]:
    """A checkpoint, and a run of it that was interrupted on another processor than it will go on with."""
    folder, out = checkpoint("llama"), tmp_path / "out"
    interrupted(folder, out, cut, 5)
    monkeypatch.setattr("platform.machine", lambda: "abacus")
    return folder, out


def test_another_environment_is_refused_unless_it_is_allowed_by_name(
    moved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = moved
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "BEADS")
    with pytest.raises(StoreError) as caught:
        sweep(folder, out)
    rows = [line.split() for line in str(caught.value).splitlines()[1:]]
    assert [row[0] for row in rows[1:]] == ["environment.processor", "environment.cpu_capability"]
    assert rows[1][-2:] == ["abacus", "allow=['processor']"]
    with pytest.raises(StoreError, match=r"allow=\['processor'\]"):
        sweep(folder, out, allow=["cpu_capability"])
    result = sweep(folder, out, allow=["cpu_capability", "processor"])
    assert result.manifest["environment"]["processor"] != "abacus"
    assert result.manifest["ended_in"]["processor"] == "abacus"
    with pytest.raises(RequestError, match="allow lists some of torch"):
        sweep(folder, out, allow=["model"])


def test_a_run_that_is_begun_again_is_of_the_environment_that_it_is_run_in(moved: tuple[Path, Path]) -> None:
    folder, out = moved
    result = sweep(folder, out, resume="never", allow=["processor"])
    assert json.loads((out / "run.json").read_text())["identity"]["environment"]["processor"] == "abacus"
    assert result.manifest["environment"]["processor"] == "abacus"
    assert "ended_in" not in result.manifest
    Result.open(out).verify()


@pytest.mark.parametrize("way", ["ram", "disk"])
def test_what_is_committed_is_not_given_up_for_want_of_room(
    way: str, checkpoint: Checkpoint, tmp_path: Path, eager: None, cut: Callable[[int | None], list[int]]
) -> None:
    """The disk has room for the run by now, and none for commits."""
    folder, out = checkpoint("llama"), tmp_path / "out"
    request: dict[str, Any] = {"loading": "stream", "residual": way, "layers_per_visit": 1}
    interrupted(folder, out, cut, 10, **request)
    before = len(records(out))
    asked: dict[str, Any] = {"dtype": "float32", **STEP, **request}
    plan = Sweep(folder, dataset(), None, callbacks(folder), out=out, **asked).preflight()
    less: dict[str, Any] = {**request, "disk": plan.disk_bytes + 1000}
    tight = Sweep(folder, dataset(), None, callbacks(folder), out=out, **asked | less).preflight()
    assert tight.feasible and tight.unsaved is not None
    interrupted(folder, out, cut, 2, **less)
    assert len(records(out)) >= before > 0
    done = cut(None)
    sweep(folder, out, **request)
    assert len(done) < 16


@pytest.mark.parametrize("way", ["ram", "disk"])
def test_damage_is_advised_upon_as_what_it_is(
    way: str, checkpoint: Checkpoint, tmp_path: Path, eager: None, cut: Callable[[int | None], list[int]]
) -> None:
    folder, out = checkpoint("llama"), tmp_path / "out"
    request: dict[str, Any] = {"loading": "stream", "residual": way, "layers_per_visit": 1}
    interrupted(folder, out, cut, 10, **request)
    for path in out.glob("scratch/residual.*"):
        raw = bytearray(path.read_bytes())
        raw[50] ^= 1
        path.write_bytes(raw)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"its digest differs; resume='never' begins the run again$") as caught:
            sweep(folder, out, **request)
        assert any(frame.name == "read_back" for frame in caught.traceback)
    sweep(folder, out, resume="never", **request)


class SaysInNumpy(Says):
    def state_dict(self, layer: int | None, hook: str) -> dict[str, Any]:
        return {"seen": [np.int64(sample) for sample in self._seen]}


class SaysASet(Says):
    def state_dict(self, layer: int | None, hook: str) -> dict[str, Any]:
        return {"seen": set(self._seen)}


def test_a_state_may_hold_scalars_of_numpy_and_what_it_may_not_hold_is_said_at_once(
    checkpoint: Checkpoint, tmp_path: Path, eager: None, cut: Callable[[int | None], list[int]]
) -> None:
    folder = checkpoint("llama")
    whole = content(sweep(folder, tmp_path / "whole", callbacks=[SaysInNumpy()]))
    interrupted(folder, tmp_path / "one", cut, 2, callbacks=[SaysInNumpy()])
    assert content(sweep(folder, tmp_path / "one", callbacks=[SaysInNumpy()])) == whole
    done = cut(None)
    with pytest.MonkeyPatch.context() as never:
        never.setattr(commits.Commits, "_due", lambda self: False)
        with pytest.raises(CallbackError, match="a state is tensors and JSON, not set"):
            sweep(folder, tmp_path / "two", callbacks=[SaysASet()], residual="ram")
    assert len(done) == 1


class Parts:
    """What `Commits` speaks to, of a run in which nothing lies on a disk; a commit costs ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.now, self.at, self.seconds = 0.0, list[float](), seconds
        self.records: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **more: {} if name == "state" else []

    def settle(self) -> None:
        self.at.append(self.now)
        self.now += self.seconds

    def save(self, job: Any, file: Any) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done


@pytest.mark.parametrize(
    ("seconds", "interval"),
    [(0.01, 41.6), (0.5, 293.9), (1.5, 509.1), (5.0, 600.0), (7.0, 700.0)],
    ids=["cheap", "dear", "dearer", "ten minutes", "a hundredth"],
)
def test_how_often_is_what_it_costs(seconds: float, interval: float, tmp_path: Path) -> None:
    """sqrt(2 x cost x a day), at most ten minutes, at most a hundredth of the time."""
    (tmp_path / "scratch" / "commits").mkdir(parents=True)
    parts: Any = Parts(seconds)
    parts.folder = tmp_path
    way = Way(loading="resident", tier="ram", ring=2, schedule=Schedule(((Stage("embed"),),), (range(9),)))
    made = commits.Commits(
        journal=parts,
        store=parts,
        taps=parts,
        residual=parts,
        callbacks=[],
        way=way,
        flush=lambda: None,
        expected_s=seconds,
        clock=lambda: parts.now,
    )
    step = Step(0, 0, range(1), True, False, Point(0, 0, 1))
    while len(parts.at) < 4:
        made.after(step, 0)
        parts.now += 0.5
    first, *others = parts.at
    assert first == pytest.approx(interval, abs=0.6)
    for before, after in pairwise([first, *others]):
        assert after - before - seconds == pytest.approx(interval, abs=0.6)


def test_a_run_that_is_compared_is_compared_from_its_beginning(
    checkpoint: Checkpoint, tmp_path: Path, eager: None, cut: Callable[[int | None], list[int]]
) -> None:
    """Also where one that was not has left commits: they are of the same identity."""
    folder, out = checkpoint("llama"), tmp_path / "out"
    request = {"callbacks": [RawActivations()], "layers_per_visit": 1}
    done = cut(None)
    whole = content(sweep(folder, tmp_path / "whole", **request))
    visits = len(done)
    interrupted(folder, out, cut, 6, **request)
    assert records(out)
    with pytest.raises(RequestError, match="resume='require' cannot be had: verify=True follows a run"):
        sweep(folder, out, verify=True, resume="require", **request)
    assert records(out)
    done = cut(None)
    result = sweep(folder, out, verify=True, **request)
    assert len(done) == visits
    assert result.manifest["certificate"]["layers"] == [0, 1, 2]
    assert "if it is interrupted, it is begun again" in result.manifest["plan"]
    assert content(result) == whole
