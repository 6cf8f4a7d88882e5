"""Whole sweeps, every way in which a plan may lay them out: the bytes are the same.

Also on a device whose copies run late and out of order (`late.Late`), which is what tells a missing wait.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Variant, write
from harness import prompts, run
from late import Late

from fpwap import Callback, Result, Sweep
from fpwap.callbacks.common import DiffOfMeans, IncrementalPCA, RawActivations, SteerInBasis
from fpwap.device import open_device
from fpwap.plan import Plan, make_plan
from fpwap.schedule import Schedule, Stage, group_stages

Checkpoint = Callable[[str], Path]
LENGTHS = [17, 5, 29, 17, 3, 40, 11, 5, 17, 24, 9, 31]
MODELS = ("llama", "gpt2", "mixtral")
STEP = {"microbatch_tokens": 64, "device": "cpu"}


def dataset() -> list[dict[str, Any]]:
    return [{"input_ids": row, "label": place % 2} for place, row in enumerate(prompts(LENGTHS, seed=3))]


def callbacks(folder: Path) -> list[Callback]:
    """Every kind: rows per prompt and per token, statistics, a write in the middle, logits."""
    config = json.loads((folder / "config.json").read_text())
    width = config.get("hidden_size") or config["n_embd"]
    return [
        RawActivations(),
        RawActivations(hook="residual_pre", last_token_only=False),
        IncrementalPCA("all", 3, last_token_only=False),
        DiffOfMeans([0], lambda sample: sample["label"]),
        SteerInBasis(torch.arange(width) / width, alpha=0.5, layers=[1]),
        RawActivations(hook="logits", positions=[0, -1]),
    ]


def sweep(folder: Path, some: slice = slice(None), **request: Any) -> Result:
    return run(folder, dataset(), *callbacks(folder)[some], **{"dtype": "float32", **STEP, **request})


def content(result: Result) -> dict[str, bytes]:
    """All that a run puts out, file by file."""
    found = [path for part in ("activations", "artifacts") for path in (result.path / part).iterdir()]
    return {path.name: path.read_bytes() for path in found}


WAYS: dict[str, dict[str, Any]] = {
    "resident": {"loading": "resident"},
    "streamed, in RAM": {"loading": "stream", "residual": "ram", "layers_per_visit": 1},
    "streamed, two together": {"loading": "stream", "residual": "ram", "layers_per_visit": 2},
    "streamed, all together": {"loading": "stream", "layers_per_visit": 100},
    "streamed, on disk": {"loading": "stream", "residual": "disk", "layers_per_visit": 1},
    "resident, on disk": {"loading": "resident", "residual": "disk", "layers_per_visit": 2},
}


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> Callable[[str], dict[str, bytes]]:
    known: dict[str, dict[str, bytes]] = {}

    def of(name: str) -> dict[str, bytes]:
        if name not in known:
            known[name] = content(sweep(checkpoint(name), loading="resident"))
        return known[name]

    return of


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "resident"])
def test_every_way_leaves_the_same_bytes(
    way: str, model: str, expected: Callable[[str], dict[str, bytes]], checkpoint: Checkpoint
) -> None:
    assert content(sweep(checkpoint(model), **WAYS[way])) == expected(model)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", [*WAYS, "on the device"])
def test_a_device_whose_copies_come_late_leaves_the_same_bytes(
    way: str,
    model: str,
    expected: Callable[[str], dict[str, bytes]],
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wished = WAYS.get(way, {"loading": "stream", "residual": "device", "layers_per_visit": 1})
    for seed in range(4):
        device = Late(seed)
        monkeypatch.setattr("fpwap.sweep.open_device", lambda asked, device=device: device)
        assert content(sweep(checkpoint(model), **wished)) == expected(model)
        device.finish()


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_in_slices_leaves_the_same_bytes(
    dtype: str, seed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9,000 words in three slices, for two chunks of the dataset; seed: on a late device."""
    folder = write(Variant(family="llama", config={"vocab_size": 9000}), tmp_path)
    whole = content(sweep(folder, dtype=dtype, loading="resident"))

    def sliced(*given: Any) -> Plan:
        plan = make_plan(*given)
        groups = group_stages(range(plan.layers), norm=True, head=True, size=1, apart=True)
        some = len(plan.costs.rows) // 2
        chunks = range(some), range(some, len(plan.costs.rows))
        schedule = Schedule(groups, plan.schedule.waves, streamed=frozenset({Stage("head")}), head_chunks=chunks)
        return replace(plan, schedule=schedule, loading="stream", ring=3)

    monkeypatch.setattr("fpwap.prepare.make_plan", sliced)
    monkeypatch.setattr("fpwap.weights.PIECE", 1 << 12)
    if seed is not None:
        device = Late(seed)
        monkeypatch.setattr("fpwap.sweep.open_device", lambda asked: device)
    assert content(sweep(folder, dtype=dtype)) == whole


def test_the_head_is_whole_where_bits_depend_on_its_rows(checkpoint: Checkpoint) -> None:
    """At natural height, however small the budget is."""
    few: dict[str, Any] = {"batching": "padded", "microbatch_size": 1, "memory": "1MB", "device": "cpu"}
    plan = Sweep(checkpoint("llama"), dataset(), callbacks=[RawActivations(hook="logits")], **few).preflight()
    assert Stage("head") not in plan.schedule.streamed


@pytest.mark.parametrize("model", MODELS)
def test_waves_leave_the_same_bytes(model: str, checkpoint: Checkpoint) -> None:
    """A budget in which the residual stream of a part of the dataset fits, on no tier all of it."""
    folder, raw = checkpoint(model), slice(2)  # statistics of all layers, which waves keep, take more than the stream
    wish: dict[str, Any] = {"dtype": "float32", "loading": "stream", "residual": "ram", "layers_per_visit": 1, **STEP}

    def plan(memory: int | None = None) -> Plan:
        return Sweep(folder, dataset(), callbacks=callbacks(folder)[raw], memory=memory, **wish).preflight()

    most = plan().memory_bytes
    tried = ((memory, plan(memory)) for memory in range(most, 0, -(1 << 12)))
    memory, made = next((memory, made) for memory, made in tried if len(made.schedule.waves) > 1 or not made.feasible)
    assert made.feasible
    whole, parts = sweep(folder, raw, **wish), sweep(folder, raw, memory=memory, **wish)
    assert content(whole) == content(parts)
    again = len(made.schedule.waves)
    assert parts.profile.bytes_moved()["weights"] > 0.9 * again * whole.profile.bytes_moved()["weights"]


@pytest.mark.parametrize("model", MODELS)
def test_statistics_go_on_from_wave_to_wave(
    model: str,
    expected: Callable[[str], dict[str, bytes]],
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every callback, three waves, one layer at a time."""

    def in_waves(*given: Any) -> Plan:
        plan = make_plan(*given)
        groups = group_stages(range(plan.layers), norm=True, head=True, size=1)
        waves = range(1), range(1, 3), range(3, len(plan.costs.rows))
        return replace(plan, schedule=Schedule(groups, waves), loading="stream", ring=3, tier="ram")

    monkeypatch.setattr("fpwap.prepare.make_plan", in_waves)
    assert content(sweep(checkpoint(model))) == expected(model)


def test_the_device_of_a_run_is_opened_by_its_name() -> None:
    assert not open_device(torch.device("cpu")).asynchronous
