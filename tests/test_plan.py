"""The plan: what budgets choose and what they never choose, what a way takes, how long, and what a reader sees.

The search is looked at on invented costs, any that could be; whole plans on tiny checkpoints, and on hollow ones, whose
shards are headers with nothing behind them, as large as real models.
"""

import dataclasses
import json
import re
import struct
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import torch
from harness import prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from fpwap import Sweep, identity, machine, rates
from fpwap.callbacks.common import RawActivations
from fpwap.costs import DIGESTS, Costs, Maths, Pace, StageCost, Way, needs, slots, steps_up_to
from fpwap.errors import ModelError, RequestError
from fpwap.outbox import RING
from fpwap.plan import AS_FAST, AS_SOON_S, Known, Plan, make_plan
from fpwap.prepare import learn
from fpwap.rates import Rates
from fpwap.schedule import Schedule, Stage, cut, group_stages
from fpwap.ways import Budgets, Wanted

CPU = torch.device("cpu")
KB, MB, GB = 10**3, 10**6, 10**9


@pytest.fixture(autouse=True)
def unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans by the conservative rates, whatever machine this is."""
    monkeypatch.setenv(rates.CACHE, str(tmp_path / "rates"))


# --- invented requests ----------------------------------------------------------------------------------------------


def stage_cost(
    memory: int, experts: int = 0, matrix: float = 1e9, states: int = 0, copied: int = 0, **more: int
) -> StageCost:
    return StageCost(
        stored=memory,
        experts=experts,
        memory=memory,
        own=memory - experts,
        mapped=memory - copied,
        copied=copied,
        own_copied=min(copied, memory - experts),
        expert=max(1, experts // 4) if experts else 0,
        maths=Maths(matrix=matrix, touched=matrix / 1000, attention=matrix / 1000, passes=matrix / 1000, calls=3),
        states=states,
        **more,
    )


def costs(
    stages: Mapping[Stage, StageCost], rows: list[int], *, device: bool = False, width: int = 1000, **more: Any
) -> Costs:
    found = np.array(rows, dtype=np.int64)
    plain: dict[str, Any] = {
        "wanted": np.minimum(found, 2),
        "height": None,
        "vocabulary": 5000 if Stage("head") in stages else 0,
        "microbatch": 3 * width * max(rows),
        "logits": 10_000 if Stage("head") in stages else 0,
        "routed": 5 * width if any(stage.kind == "layer" and cost.experts for stage, cost in stages.items()) else 0,
        "tables": 100,
        "outputs": 2000,
        "commits": len(stages),
        "reference": 0,
        "by_rows": False,
        "tokens": sum(rows),
    }
    return Costs(stages=stages, rows=found, width=width, on_device=device, **plain | more)


def known(costs: Costs, hot: float = 1.0) -> Known:
    return Known(
        model="invented",
        family="Llama",
        commit=None,
        layers=sum(stage.kind == "layer" for stage in costs.stages),
        last="its end",
        dtype=torch.float32,
        device=CPU,
        attention="sdpa",
        batching="packed",
        threads=2,
        prompts=len(costs.rows),
        tokens=costs.tokens,
        rows=int(costs.rows.sum()),
        longest=int(costs.rows.max()),
        microbatches=len(costs.rows),
        microbatch="some tokens",
        height=costs.height,
        sparse_height=None,
        hot=hot,
    )


def decide(costs: Costs, budgets: Budgets, wanted: Wanted | None = None, hot: float = 1.0) -> Plan:
    return make_plan(known(costs, hot), costs, rates.conservative(CPU), budgets, wanted or Wanted())


PLENTY = Budgets(memory=10**15, device=10**15, disk=10**15)


@st.composite
def requests(draw: st.DrawFn) -> Costs:
    """Dense and routed models, with and without a head, on a CPU or beside a device."""
    layers, routed = draw(st.integers(1, 7)), draw(st.booleans())
    size = st.integers(1, 10**6)
    stages = {Stage("embed"): stage_cost(draw(size), matrix=0)}
    for layer in range(layers):
        memory = draw(size)
        experts = draw(st.integers(0, memory - 1)) if routed else 0
        matrix, states = draw(st.sampled_from([1e6, 1e9, 1e12])), draw(st.sampled_from([0, 0, 1000]))
        copied = draw(st.sampled_from([0, memory]))
        stages[Stage("layer", layer)] = stage_cost(memory, experts, matrix, states, copied)
    if draw(st.booleans()):
        stages[Stage("norm")] = stage_cost(10, matrix=0)
        head = draw(size)
        stages[Stage("head")] = stage_cost(head, head)
    rows = draw(st.lists(st.integers(1, 2000), min_size=1, max_size=30))
    return costs(stages, rows, device=draw(st.booleans()), height=draw(st.sampled_from([None, 16])))


budgets = st.builds(
    Budgets,
    memory=st.sampled_from([0, RING]).flatmap(lambda least: st.integers(least + 10**4, least + 10**8)),
    device=st.integers(RING + 10**4, RING + 10**8),
    disk=st.sampled_from([0, 10**5, 10**6, 10**8]),
)
wishes = st.builds(
    Wanted,
    loading=st.sampled_from([None, None, "resident", "stream"]),
    tier=st.sampled_from([None, None, "ram", "disk"]),
    size=st.sampled_from([None, None, 1, 2, 100]),
)
shares = st.sampled_from([0.0, 1.0])


@settings(max_examples=100, deadline=None)
@given(requests(), budgets, wishes, shares)
def test_a_feasible_plan_stays_within_its_budgets(costs: Costs, most: Budgets, wanted: Wanted, hot: float) -> None:
    plan = decide(costs, most, wanted, hot)
    if not plan.feasible:
        return
    assert plan.memory_bytes <= most.memory
    assert plan.device_bytes <= most.device or not costs.on_device
    assert plan.disk_bytes <= most.disk
    if wanted.loading is None:
        assert plan.memory_bytes + plan.mapped_bytes <= most.memory
    assert (plan.memory_bytes, plan.device_bytes, plan.disk_bytes) == needs(costs, way_of(plan)).totals


def way_of(plan: Plan) -> Way:
    return Way(loading=plan.loading, tier=plan.tier, ring=plan.ring, schedule=plan.schedule, pooled=plan.pooled_bytes)


@settings(max_examples=100, deadline=None)
@given(requests(), budgets, wishes, shares)
def test_a_plan_says_everything_once(costs: Costs, most: Budgets, wanted: Wanted, hot: float) -> None:
    """Feasible or not: every stage in one group, every microbatch in one wave and chunk, what was asked for kept."""
    plan = decide(costs, most, wanted, hot)
    schedule, every = plan.schedule, list(range(len(costs.rows)))
    assert [stage for group in schedule.groups for stage in group] == list(costs.stages)
    assert [index for wave in schedule.waves for index in wave] == every
    for kinds, chunks in (("layer", schedule.chunks), ("head", schedule.head_chunks)):
        assert bool(chunks) == any(stage.kind == kinds for stage in schedule.streamed)
        assert not chunks or [index for chunk in chunks for index in chunk] == every
    for group in range(len(schedule.groups)):
        seen = [index for wave in schedule.waves for visit in schedule.visits(wave, group) for index in visit]
        assert seen == every
    head = {Stage("head")} & schedule.streamed
    assert not head or not any(head & set(group) and Stage("layer", 0) in group for group in schedule.groups)
    assert plan.ring >= max(map(len, schedule.groups))
    assert wanted.loading in (None, plan.loading)
    assert wanted.tier in (None, plan.tier)
    layers = max(sum(stage.kind == "layer" for stage in group) for group in schedule.groups)
    assert wanted.size is None or layers == min(wanted.size, plan.layers)
    assert plan.loading == "stream" or costs.on_device or hot >= 0.9 or wanted.loading == "resident"
    assert sum(plan.phases.values()) == pytest.approx(plan.predicted_s)
    assert min(plan.phases.values()) >= 0
    assert plan.feasible == (not plan.blockers)
    assert all(str(word) in plan.summary() for word in (*plan.blockers, *plan.warnings))


def test_an_unfinished_run_keeps_its_order_and_takes_what_there_is() -> None:
    """Also an order that nobody would choose, like five layers a visit. Ring, loading and what is pooled may change."""
    layers = {Stage("layer", layer): stage_cost(MB, pooled=MB) for layer in range(7)}
    request = costs({Stage("embed"): stage_cost(KB, matrix=0), **layers}, [1000] * 4)
    schedule = Schedule(group_stages(range(7), norm=False, head=False, size=5), (range(4),))
    before = Way(loading="stream", tier="disk", ring=8, schedule=schedule, pooled=5 * MB)
    less = dataclasses.replace(PLENTY, memory=needs(request, before).totals[0] - 2 * MB)
    words = known(request), request, rates.conservative(CPU)
    plan = make_plan(*words, less, Wanted(), before)
    assert plan.feasible
    assert (plan.schedule, plan.tier) == (schedule, "disk")
    assert plan.ring < 8 or plan.pooled_bytes < 5 * MB
    assert make_plan(*words, PLENTY, Wanted(loading="resident"), before).loading == "resident"


@pytest.mark.parametrize("size", [1, 4])
def test_what_is_read_piece_by_piece_takes_the_disk_from_what_is_read_ahead(size: int) -> None:
    """No time is below that in which the disk gives all bytes."""
    layers = {Stage("layer", layer): stage_cost(20 * GB, 10 * GB, matrix=1e6) for layer in range(4)}
    request = costs({Stage("embed"): stage_cost(KB, matrix=0), **layers}, [1000] * 4)
    streamed = Schedule(
        group_stages(range(4), norm=False, head=False, size=size), (range(4),), (range(4),), frozenset(layers)
    )
    pace = Pace(request, rates.conservative(CPU), "float32", hot=0.0)
    times = pace.times(Way(loading="stream", tier="ram", ring=10, schedule=streamed))
    assert times.totals["disk"] == pytest.approx(80 * GB / rates.conservative(CPU).disk_read, rel=1e-3)
    assert times.totals["disk"] <= times.total <= 1.1 * times.totals["disk"]


@settings(max_examples=100, deadline=None)
@given(requests(), budgets, st.sampled_from(["memory", "device", "disk"]), st.integers(1, 10**8), wishes, shares)
def test_more_budget_never_makes_it_slower(
    costs: Costs, most: Budgets, name: str, more: int, wanted: Wanted, hot: float
) -> None:
    """But for the percent and the moment within which the smaller memory is taken."""
    wanted = dataclasses.replace(wanted, loading=None)
    less = decide(costs, most, wanted, hot)
    richer = decide(costs, dataclasses.replace(most, **{name: getattr(most, name) + more}), wanted, hot)
    if less.feasible:
        assert richer.feasible
        assert richer.predicted_s <= AS_FAST * less.predicted_s * (1 + 1e-9) + AS_SOON_S


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(0, 200))
def test_cuts_cover_everything_and_are_as_long_as_can_be(sizes: list[int], limit: int) -> None:
    parts = cut(np.array(sizes), limit)
    assert [index for part in parts for index in part] == list(range(len(sizes)))
    for part in parts:
        taken = sum(sizes[part.start : part.stop])
        assert taken <= limit or len(part) == 1
        assert part.stop == len(sizes) or taken + sizes[part.stop] > limit


@given(st.lists(st.integers(0, 100), min_size=1, max_size=9), st.integers(2, 12), st.integers(1, 6))
def test_a_ring_is_as_large_as_what_its_slots_will_hold(held: list[int], ring: int, waves: int) -> None:
    largest = [0] * ring
    for index, size in enumerate(held * waves):
        largest[index % ring] = max(largest[index % ring], size)
    assert slots(held, ring, waves) == sum(largest)


@given(st.integers(1, 5000))
def test_steps_go_up_to_the_end(most: int) -> None:
    steps = steps_up_to(most)
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, most)
    assert len(steps) < 2 * most.bit_length() + 2


# --- what is chosen -------------------------------------------------------------------------------------------------


def dense(layers: int = 6, memory: int = MB, matrix: float = 1e12) -> dict[Stage, StageCost]:
    return {Stage("embed"): stage_cost(KB, matrix=0)} | {
        Stage("layer", layer): stage_cost(memory, matrix=matrix) for layer in range(layers)
    }


def test_what_is_hot_and_fits_is_resident_in_one_visit() -> None:
    plan = decide(costs(dense(), [10] * 5), PLENTY)
    assert (plan.loading, len(plan.schedule.groups), plan.residual_rows) == ("resident", 1, 0)
    assert "nowhere" in plan.summary()


def test_what_is_cold_or_does_not_fit_is_streamed() -> None:
    assert decide(costs(dense(), [10] * 5), PLENTY, hot=0.5).loading == "stream"
    tight = Budgets(memory=4 * MB, device=0, disk=10**9)
    plan = decide(costs(dense(), [10] * 5), tight)
    assert (plan.loading, plan.ring) == ("stream", 2)
    assert "streamed past the page cache, 2 stages in memory at a time" in plan.summary()


def test_little_is_resident_that_costs_no_time() -> None:
    """The smallest memory within a percent of the fastest, however much there is."""
    plan = decide(costs(dense(), [10] * 5), PLENTY, hot=0)
    assert (len(plan.schedule.groups), plan.ring) == (6, 2)
    assert plan.memory_bytes < 3 * MB


def test_layers_stand_together_where_the_residual_stream_is_slow() -> None:
    """Ten times as many bytes of rows as of weights, on the disk: the traffic is divided by layers per visit."""
    wide = costs(dense(matrix=1e8), [100] * 50, width=20 * KB)
    one, many = (decide(wide, PLENTY, Wanted(tier="disk", size=size), hot=0) for size in (1, None))
    assert len(many.schedule.groups) < len(one.schedule.groups)
    assert many.predicted_s < 0.7 * one.predicted_s
    assert one.bound in ("residual", "disk")


def test_a_stream_that_fits_nowhere_goes_in_waves() -> None:
    request = costs(dense(), [100] * 64, width=10 * KB)
    tight = Budgets(memory=15 * MB, device=0, disk=10 * KB)
    plan = decide(request, tight, Wanted(size=1), hot=0)
    assert plan.feasible
    waves = len(plan.schedule.waves)
    assert 1 < waves < 64
    assert plan.weights_bytes == waves * sum(cost.stored for cost in request.stages.values())
    unsaved, warning = plan.warnings
    assert plan.again().warnings == plan.warnings, "said once"
    assert "cannot be gone on with" in unsaved
    assert f"{waves} waves" in warning
    assert "128 MB of free disk make it one" in warning
    assert len(plan.again(budgets=dataclasses.replace(tight, disk=200 * MB)).schedule.waves) == 1


def test_a_large_head_is_streamed_in_a_group_of_its_own() -> None:
    stages = dense() | {Stage("norm"): stage_cost(10), Stage("head"): stage_cost(50 * MB, 50 * MB)}
    request = costs(stages, [10] * 8, height=16)
    plan = decide(request, Budgets(memory=20 * MB, device=0, disk=GB), hot=0)
    assert plan.feasible
    assert plan.schedule.streamed == {Stage("head")}
    assert plan.schedule.groups[-1] == (Stage("norm"), Stage("head"))
    assert plan.schedule.head_chunks == (range(8),)
    assert "the head (50.0 MB)" in plan.summary()
    assert decide(request, PLENTY, hot=0).schedule.streamed == frozenset()


def test_chunks_of_a_routed_layer_are_whole_tiles() -> None:
    """Room for 45 rows in tiles of 16: chunks of two tiles, whose experts are read once each."""
    stages = {Stage("embed"): stage_cost(KB), Stage("layer", 0): stage_cost(10 * MB, 9 * MB)}
    request = costs(stages, [8] * 12, height=16)
    way = Way(
        loading="stream",
        tier="ram",
        ring=2,
        schedule=Schedule(group_stages([0], norm=False, head=False, size=1, apart=True), (range(12),)),
    )
    held = needs(request, dataclasses.replace(way, schedule=dataclasses.replace(way.schedule, streamed=LAYER)))
    rest = sum(held.memory.values()) - held.memory["a microbatch's tensors"] + request.tables
    plan = decide(request, Budgets(memory=rest + 45 * request.routed, device=0, disk=GB), hot=0)
    assert plan.feasible
    assert plan.schedule.chunks == (range(4), range(4, 8), range(8, 12))
    assert plan.weights_bytes == KB + MB + 3 * 9 * MB
    assert plan.phases["load"] > 3 * 9 * MB / plan.rates.disk_read - plan.phases["forward"]


LAYER = frozenset({Stage("layer", 0)})


def test_a_stream_on_disk_is_there_twice() -> None:
    request = costs(dense(), [10] * 5)
    plan = decide(request, PLENTY, Wanted(tier="disk", size=1))
    assert plan.disk_bytes == request.outputs + 2 * request.residual


def test_beside_a_device_the_stream_lies_as_near_as_it_fits() -> None:
    request = costs(dense(memory=10 * MB), [100] * 50, device=True, width=10 * KB)
    room = {"memory": GB, "disk": GB}
    for device, memory, tier in ((90 * MB, GB, "device"), (45 * MB, GB, "ram"), (45 * MB, 60 * MB, "disk")):
        most = Budgets(**{**room, "memory": memory + RING}, device=device + RING)
        plan = decide(request, most, Wanted(loading="stream", size=1))
        assert (plan.tier, plan.feasible, len(plan.schedule.waves)) == (tier, True, 1)
    assert decide(request, PLENTY).loading == "resident"
    pinned = decide(request, PLENTY, Wanted(loading="stream", tier="ram", size=1)).needs.memory
    assert pinned["the residual stream"] == 2**26, "pinned memory comes in powers of two: 50 MB take 67"


def test_a_plan_decided_again_is_the_same_plan() -> None:
    plan = decide(costs(dense(), [10] * 5), Budgets(memory=4 * MB, device=0, disk=GB))
    assert plan.again() == plan
    assert plan.again(wanted=Wanted(size=3)).schedule.groups != plan.schedule.groups


@pytest.mark.parametrize(
    ("most", "words"),
    [
        (
            Budgets(memory=MB, device=0, disk=GB),
            r"of RAM are needed and 1.0 MB may be taken \(memory=\); most of it is",
        ),
        (Budgets(memory=GB, device=0, disk=1), r"2.0 kB of disk are needed and 1 B may be taken: free 2.0 kB"),
    ],
)
def test_what_does_not_fit_is_said_with_the_number(most: Budgets, words: str) -> None:
    (blocker,) = decide(costs(dense(), [10] * 5), most).blockers
    assert re.search(words, blocker)


def test_device_memory_that_does_not_suffice_is_said() -> None:
    plan = decide(costs(dense(), [10] * 5, device=True), Budgets(memory=GB, device=MB, disk=GB))
    assert any(
        "of device memory are needed and 1.0 MB may be taken (device_memory=)" in words for words in plan.blockers
    )


def test_states_of_all_layers_are_alive_where_a_layer_ends_in_the_last_wave() -> None:
    stages = {stage: dataclasses.replace(cost, states=1000, files=2) for stage, cost in dense().items()}
    request = costs(stages, [100] * 64, width=10 * KB, prompts=10)
    tight = Budgets(memory=15 * MB, device=0, disk=10 * KB)
    one, many = decide(request, PLENTY, Wanted(size=1), hot=0), decide(request, tight, Wanted(size=1), hot=0)
    assert len(one.schedule.waves) == 1 < len(many.schedule.waves)
    assert one.needs.memory["callbacks' state"] == 2 * 1000, "the embedding and the first layer"
    assert many.needs.memory["callbacks' state"] == 7 * 1000
    assert (one.needs.memory["outputs"], many.needs.memory["outputs"]) == (DIGESTS * 10 * 4, DIGESTS * 10 * 14)


def test_outputs_are_put_together_in_what_memory_is_left() -> None:
    """2 GB of them in a budget of 20 MB: what is not put together is written row by row."""
    stages = {stage: dataclasses.replace(cost, pooled=300 * MB) for stage, cost in dense().items()}
    request = costs(stages, [10] * 5, outputs=7 * 300 * MB)
    tight = decide(request, Budgets(memory=20 * MB, device=0, disk=10 * GB), hot=0)
    assert tight.feasible
    assert 0 < tight.pooled_bytes <= 20 * MB
    assert tight.memory_bytes <= 20 * MB
    assert decide(request, PLENTY, Wanted(size=1), hot=0).pooled_bytes == 600 * MB, "two stages are under way"
    assert decide(request, PLENTY, Wanted(size=6), hot=0).pooled_bytes == 2**30
    each_token = costs(dense(), [10] * 5, outputs=7 * 300 * MB)
    assert decide(each_token, PLENTY, hot=0).pooled_bytes == 0


def test_files_that_may_be_open_limit_a_visit() -> None:
    stages = {stage: dataclasses.replace(cost, files=100) for stage, cost in dense().items()}
    request = costs(stages, [10] * 5, shards=10)
    few = dataclasses.replace(PLENTY, files=300)
    plan = decide(request, few)
    assert plan.feasible and len(plan.schedule.groups) > 1
    assert len(decide(request, PLENTY).schedule.groups) == 1
    (blocker,) = decide(request, few, Wanted(size=6)).blockers
    assert re.search(r"774 files are open at once.* and 300 may be .*: lower layers_per_visit", blocker)
    (blocker,) = decide(request, dataclasses.replace(PLENTY, files=200)).blockers
    assert "capture fewer layers or hooks" in blocker


@pytest.mark.parametrize(
    ("wanted", "device", "words", "never"),
    [
        (Wanted(), False, "as few at a time as can be", "layers_per_visit"),
        (Wanted(size=1), False, "as few at a time as can be", "layers_per_visit"),
        (Wanted(size=3), False, "lower layers_per_visit", "loading"),
        (Wanted(loading="resident"), True, "loading='stream' holds", "layers_per_visit"),
    ],
)
def test_advice_is_what_was_not_tried(wanted: Wanted, device: bool, words: str, never: str) -> None:
    request = costs(dense(memory=100 * MB), [10] * 5, device=device)
    plan = decide(request, Budgets(memory=GB if device else 50 * MB, device=RING + 90 * MB, disk=GB), wanted, hot=0)
    (blocker,) = plan.blockers
    assert words in blocker and never not in blocker


@pytest.mark.parametrize(("tier", "words"), [("ram", "residual='disk' moves it out"), (None, "more free disk")])
def test_advice_for_the_residual_stream(tier: Any, words: str) -> None:
    request = costs(dense(), [5000], width=10 * KB, microbatch=1000)
    (*_, blocker) = decide(request, Budgets(memory=20 * MB, device=0, disk=10 * KB), Wanted(tier=tier, size=1)).blockers
    assert words in blocker or "fewer prompts" in blocker
    disk = decide(request, Budgets(memory=GB, device=0, disk=10 * KB), Wanted(tier="disk", size=1)).blockers
    assert "leave residual='disk' out" in disk[0]


# --- how long -------------------------------------------------------------------------------------------------------


def times(request: Costs, size: int, ring: int, **changes: float) -> Any:
    layers = [stage.layer for stage in request.stages if stage.layer is not None]
    groups = group_stages(layers, norm=False, head=False, size=size)
    way = Way(loading="stream", tier="ram", ring=ring, schedule=Schedule(groups, (range(len(request.rows)),)))
    rate = rates.conservative(CPU).measured("float32", date.today(), call_s=1e-12, **changes)
    return Pace(request, rate, "float32", 0.0).times(way)


def test_reading_hides_behind_the_maths_but_for_the_first() -> None:
    """Layers of 1 s of reading: with 2 s of maths only the first is waited for, with 0.5 s every one."""
    slow, fast = (costs(dense(memory=GB, matrix=s * 1.5e11), [10] * 100) for s in (2, 0.5))
    work = {s: times(request, 1, 3).totals["matrix"] for s, request in ((2, slow), (0.5, fast))}
    assert times(slow, 1, 3).phases["load"] == pytest.approx(1, abs=0.01)
    assert times(fast, 1, 3).phases["load"] == pytest.approx(6 - work[0.5] * 5 / 6, abs=0.05)
    assert times(slow, 1, 3).bound == "matrix"
    assert times(fast, 1, 3).bound == "disk"


def test_a_group_is_read_ahead_as_far_as_the_ring_reaches() -> None:
    request = costs(dense(memory=GB, matrix=2 * 1.5e11), [10] * 100)
    short, long = times(request, 2, 3), times(request, 2, 5)
    assert short.phases["load"] > long.phases["load"] + 1
    assert long.phases["load"] == pytest.approx(2, abs=0.1), "the first group"


def test_twice_the_rate_is_half_the_time() -> None:
    request = costs(dense(memory=GB, matrix=1e9), [10] * 100)
    one, two = (times(request, 1, 2, disk_read=rate) for rate in (1e9, 2e9))
    assert two.phases["load"] == pytest.approx(one.phases["load"] / 2, rel=0.05)
    assert two.weights_s == one.weights_s / 2


# --- whole plans ----------------------------------------------------------------------------------------------------

DATA = prompts([20, 13, 13, 9, 9, 1, 1, 1])
BUDGETS: list[dict[str, Any]] = [
    {},
    {"memory": "8MB"},
    {"memory": "8MB", "residual": "disk", "loading": "stream"},
    {"layers_per_visit": 2, "loading": "stream"},
    {"memory": 1},
    {"disk": 1},
]


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_budgets_never_choose_the_partition(checkpoint: Callable[[str], Path], batching: Any) -> None:
    ready = [
        Sweep(
            checkpoint("llama"), DATA, callbacks=[RawActivations()], batching=batching, device="cpu", **budget
        )._prepared
        for budget in BUDGETS
    ]
    tables = [[part.rows for part in one.table.microbatches] for one in ready]
    assert all(table == tables[0] for table in tables)
    shown = [(p.plan.height, p.plan.microbatch, p.plan.microbatches, p.plan.sparse_height) for p in ready]
    assert len(set(shown)) == 1
    assert not ready[-1].plan.feasible and not ready[-2].plan.feasible


def test_the_embedding_counts_by_the_ids_that_occur(checkpoint: Callable[[str], Path]) -> None:
    few, many = (
        Sweep(checkpoint("llama"), [ids], callbacks=[RawActivations()], device="cpu").preflight()
        for ids in ([7, 7, 3], list(range(1, 60)))
    )
    assert few.by_rows and not many.by_rows
    sizes = [plan.costs.stages[Stage("embed")] for plan in (few, many)]
    assert sizes[0].stored == sizes[1].stored * 2 // 97
    assert sizes[0].memory < sizes[1].memory


def test_a_notebook_sees_a_table(checkpoint: Callable[[str], Path]) -> None:
    plan = Sweep(checkpoint("llama"), DATA, callbacks=[RawActivations()], device="cpu").preflight()
    shown = plan._repr_html_()
    assert shown.startswith("<table>") and shown.count("<tr>") == shown.count("</tr>") > 8
    assert "&#x27;residual_post&#x27;" in shown and "<pre>" not in shown
    for label in ("model", "weights", "memory", "time", "feasible"):
        assert f">{label}</th>" in shown


def test_device_memory_of_a_cpu_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match="device_memory is an accelerator's"):
        Sweep(checkpoint("llama"), DATA, callbacks=[RawActivations()], device="cpu", device_memory="1KB").preflight()


def learned(plan: Plan, monkeypatch: pytest.MonkeyPatch, *, whole: bool = True) -> list[Rates]:
    """What a run of this plan that took long teaches."""
    found: list[Rates] = []
    monkeypatch.setattr(rates, "save", lambda rates, device: found.append(rates))
    monkeypatch.setattr(machine, "crowded", lambda: False)
    profile = Mock(on_device=lambda: {"forward": 1e4}, bytes_moved=dict, reading_s=0.0)
    learn(plan, profile, whole=whole)
    return found


def test_waiting_for_experts_teaches_nothing_of_products(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Sweep(checkpoint("llama"), DATA, callbacks=[RawActivations()], device="cpu").preflight()
    apart = dataclasses.replace(plan.schedule, streamed=LAYER, chunks=(range(plan.microbatches),))
    assert learned(plan, monkeypatch)
    assert not learned(dataclasses.replace(plan, schedule=apart), monkeypatch)


def test_a_layer_that_was_left_early_teaches_nothing_of_products(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for hook, whole in (("attn_out", False), ("residual_post", True), ("logits", True)):
        sweep = Sweep(checkpoint("llama"), DATA, callbacks=[RawActivations(hook=hook)], device="cpu")
        plan, targets = sweep.preflight(), sweep._prepared.targets
        assert targets.ends_a_stage == whole
        assert bool(learned(plan, monkeypatch, whole=targets.ends_a_stage)) == whole


# --- hollow checkpoints ---------------------------------------------------------------------------------------------


def llama(
    layers: int, hidden: int = 256, width: int = 512, vocab: int = 32_000
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Config, and tensor name -> shape."""
    config = {"model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": width}
    config |= {"num_hidden_layers": layers, "num_attention_heads": hidden // 64, "torch_dtype": "bfloat16"}
    tensors: dict[str, list[int]] = {"model.embed_tokens.weight": [vocab, hidden]}
    for layer in range(layers):
        below = f"model.layers.{layer}."
        tensors |= {f"{below}{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
        tensors |= {f"{below}self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"}
        tensors |= {f"{below}mlp.{name}_proj.weight": [width, hidden] for name in ("gate", "up")}
        tensors[f"{below}mlp.down_proj.weight"] = [hidden, width]
    return config, tensors | {"model.norm.weight": [hidden], "lm_head.weight": [vocab, hidden]}


def hollow(folder: Path, config: dict[str, Any], tensors: dict[str, list[int]], shards: int) -> Path:
    """Shards with their headers, and holes for the rest: as large as they say, and empty."""
    folder.mkdir()
    names, places = list(tensors), {}
    per = -(-len(names) // shards)
    for number in range(-(-len(names) // per)):
        header, end = {}, 0
        for name in names[number * per : (number + 1) * per]:
            begin, end = end, end + 2 * int(np.prod(tensors[name]))
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [begin, end]}
            places[name] = f"model-{number:05}.safetensors"
        text = json.dumps(header).encode()
        with open(folder / f"model-{number:05}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers of nine tensors, nine tensors a shard."""
    return hollow(tmp_path_factory.mktemp("hollow") / "model", *llama(12), shards=13)


def test_weights_are_counted_from_headers(shards: Path) -> None:
    plan = Sweep(shards, DATA, callbacks=[RawActivations(hook="logits")], device="cpu").preflight()
    _, tensors = llama(12)
    layer = sum(2 * int(np.prod(shape)) for name, shape in tensors.items() if ".layers.0." in name)
    assert plan.costs.stages[Stage("layer", 5)].stored == layer
    assert plan.costs.stages[Stage("head")].stored == 2 * 32_000 * 256
    assert plan.loading == "stream", "nobody has read these files"
    assert f"a layer is {layer / MB:.1f} MB" in plan.summary()


def test_masks_of_windows_count(tmp_path: Path) -> None:
    """From the window's length on, in squares of a power of two, beside what sdpa makes of one."""
    config, tensors = llama(2)
    config |= {"model_type": "mistral", "sliding_window": 500, "num_key_value_heads": 4}
    folder = hollow(tmp_path / "model", config, tensors, shards=1)
    short, long = (
        Sweep(folder, prompts([length, 9]), callbacks=[RawActivations()], device="cpu", microbatch_tokens=1024)
        .preflight()
        .costs.tables
        for length in (499, 900)
    )
    rows = 401 * (2 * 8 + 2 * 64 * 4)
    assert long - short == rows + 1024**2 + 2 * 1024**2


def test_shards_past_the_last_wanted_layer_may_be_missing(shards: Path, tmp_path: Path) -> None:
    def plan(folder: Path, layer: int) -> Plan:
        return Sweep(folder, DATA, callbacks=[RawActivations([layer])], device="cpu").preflight()

    folder = tmp_path / "some"
    folder.mkdir()
    for path in shards.iterdir():
        if path.name < "model-00003" or path.suffix == ".json":
            (folder / path.name).hardlink_to(path)
    assert plan(folder, 1).weights_bytes == plan(shards, 1).weights_bytes
    assert len(plan(folder, 1).files) == 3
    with pytest.raises(ModelError, match=r"model-00003.safetensors is missing; .* names it"):
        plan(folder, 3)


def test_a_run_is_known_by_the_shards_that_it_reads(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama_gqa")
    first, last = (
        Sweep(folder, DATA, callbacks=[RawActivations([layer])], device="cpu", progress=False) for layer in (0, -1)
    )
    shards = first.run().manifest["model"]["shards"]
    assert [folder / shard for shard in shards] == list(first.preflight().files)
    assert len(shards) < len(last.preflight().files)


def test_verifying_makes_no_other_run_of_it(tmp_path: Path) -> None:
    """Hugging Face reads the head beside the final norm, which is the run's last stage."""
    request: dict[str, Any] = {"callbacks": [RawActivations(hook="final_norm")], "device": "cpu"}
    folder, shown = hollow(tmp_path / "model", *llama(2), shards=21), []
    for verify in (False, True):
        sweep = Sweep(folder, DATA, verify=verify, **request)
        found = identity.identity(sweep._request, sweep._prepared, sweep._callbacks)
        shown.append((found["model"]["shards"], len(sweep.preflight().files)))
    assert shown[0][0] == shown[1][0]
    assert shown[0][1] < shown[1][1]


def test_where_the_config_names_no_dtype_the_request_may(shards: Path, tmp_path: Path) -> None:
    """Else the first tensor of all shards has to say it."""
    folder = tmp_path / "some"
    folder.mkdir()
    for path in shards.iterdir():
        if path.name < "model-00003":
            (folder / path.name).hardlink_to(path)
    (folder / "model.safetensors.index.json").hardlink_to(shards / "model.safetensors.index.json")
    config = json.loads((shards / "config.json").read_text())
    del config["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    request: dict[str, Any] = {"callbacks": [RawActivations([1])], "device": "cpu"}
    assert len(Sweep(folder, DATA, dtype="bfloat16", **request).preflight().files) == 3
    with pytest.raises(ModelError, match=r"model-00003.safetensors is missing"):
        Sweep(folder, DATA, **request).preflight()


def test_what_is_there_past_the_last_layer_is_checked_all_the_same(shards: Path, tmp_path: Path) -> None:
    config, tensors = llama(4)
    tensors["model.layers.3.mlp.up_proj.weight"] = [512, 255]
    folder = hollow(tmp_path / "wrong", config, tensors, shards=6)
    with pytest.raises(ModelError, match=r"layers\.3\.mlp\.up_proj\.weight has shape"):
        Sweep(folder, DATA, callbacks=[RawActivations([0])], device="cpu").preflight()


def test_a_model_larger_than_all_memory_has_a_plan(tmp_path: Path) -> None:
    """Wider than Llama 3.1 405B in its keys and values, in 24 GB."""
    folder = hollow(tmp_path / "huge", *llama(126, 16_384, 53_248, 128_256), shards=191)
    thousand = prompts([256] * 100)
    plan = Sweep(folder, thousand, callbacks=[RawActivations([-1])], device="cpu", memory="24GB").preflight()
    assert plan.loading == "stream"
    assert plan.feasible
    assert 900 * GB < plan.weights_bytes < 950 * GB
    stages = plan.costs.stages
    assert plan.memory_bytes < 3 * stages[Stage("layer", 0)].stored
    assert plan.break_even_tokens > 0


def test_one_file_may_be_larger_than_the_machine(tmp_path: Path) -> None:
    """For torch, safetensors maps a whole file so that the system asks whether all of it would fit."""
    room = psutil.virtual_memory().total + psutil.swap_memory().total
    layers = 1 + room // (6 * GB)
    folder = hollow(tmp_path / "huge", *llama(layers, 16_384, 53_248, 128_256), shards=1)
    (shard,) = folder.glob("*.safetensors")
    assert shard.stat().st_size > room
    assert Sweep(folder, DATA, callbacks=[RawActivations([-1])], device="cpu").preflight().feasible


def test_memory_of_other_control_groups_is_not_taken(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "rooms", lambda: [12 * MB])
    plan = Sweep(checkpoint("llama"), DATA, callbacks=[RawActivations()], device="cpu").preflight()
    assert plan.memory_free == 12 * MB
    with pytest.raises(RequestError, match="may be taken"):
        Sweep(checkpoint("llama"), DATA, callbacks=[RawActivations()], device="cpu", memory=KB, progress=False).run()
