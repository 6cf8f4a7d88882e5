"""Experts that do not fit: streamed one at a time, read once per chunk, with the bits of resident ones."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import LONGEST, Variant, write
from harness import Keep, differences, keep, prompts, run

from fpwap import Sweep
from fpwap.callbacks.common import RawActivations
from fpwap.checkpoint import Checkpoint
from fpwap.parcels import Layout, lay_out
from fpwap.plan import Plan
from fpwap.prepare import open_model
from fpwap.schedule import Stage, cut

DATASET = prompts([LONGEST] * 90 + [13] * 20 + [5] * 20, seed=8)
WIDE = Variant(family="mixtral", config={"num_local_experts": 64, "intermediate_size": 256, "num_experts_per_tok": 3})
HOOKS = ("router_logits", "expert_ids", "mlp_out", "residual_post", "logits")
ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "packed": {"microbatch_tokens": 240},
    "padded": {"batching": "padded", "microbatch_size": 10},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(WIDE, tmp_path_factory.mktemp("wide"))


def layout(folder: Path) -> Layout:
    model = open_model(str(folder), None)
    return lay_out(Checkpoint.open(folder), model.family, model.config)


def budget(plan: Plan, folder: Path) -> int:
    """Less than the experts of two layers, and enough for one tile of rows."""
    costs = plan.costs
    cost = costs.stages[Stage("layer", 0)]
    memory = 2 * cost.own + cost.expert + 1100 * costs.routed + costs.residual + costs.tables + costs.outputs
    memory += costs.stages[Stage("embed")].memory + costs.logits + costs.libraries
    memory += 2 * (cost.own_scratch + cost.expert_scratch)
    parcel = layout(folder)[Stage("layer", 0)]
    assert memory < 2 * (parcel.size - parcel.own_size)
    return memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batching", ONE_BY_ONE)
def test_streamed_experts_have_the_bits_of_resident_ones(batching: str, dtype: torch.dtype, wide: Path) -> None:
    request: dict[str, Any] = {"dtype": dtype, "device": "cpu", **ONE_BY_ONE[batching]}
    resident = keep(wide, DATASET, Keep(HOOKS), loading="resident", **request)
    plan = Sweep(wide, DATASET, callbacks=[Keep(HOOKS)], loading="resident", **request).preflight()
    memory = budget(plan, wide)
    capped = Sweep(wide, DATASET, callbacks=[Keep(HOOKS)], memory=memory, **request).preflight()
    assert not plan.schedule.chunks
    assert 1 < len(capped.schedule.chunks) < capped.microbatches
    assert not differences(keep(wide, DATASET, Keep(HOOKS), memory=memory, **request), resident)


def test_each_expert_is_read_once_per_chunk(wide: Path) -> None:
    """Three chunks of several microbatches: every byte of experts is moved three times at most, all else once."""
    parcels = layout(wide)
    request: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "microbatch_tokens": 240}
    everywhere = RawActivations(layers="all")
    memory = budget(Sweep(wide, DATASET, callbacks=[everywhere], **request).preflight(), wide)
    plan = Sweep(wide, DATASET, callbacks=[everywhere], memory=memory, **request).preflight()
    read = len(plan.schedule.chunks)
    assert 1 < read < plan.microbatches
    result = run(wide, DATASET, everywhere, memory=memory, **request)
    layers = [Stage("layer", index) for index in range(3)]
    own = sum(parcels[stage].own_size for stage in (*layers, Stage("embed")))
    experts = sum(parcels[stage].size - parcels[stage].own_size for stage in layers)
    moved = result.profile.bytes_moved()["weights"]
    assert own + read * experts * 0.8 < moved <= own + read * experts
    assert f"{read} chunks" in plan.summary()


def test_a_budget_that_holds_the_experts_streams_nothing(wide: Path) -> None:
    plan = Sweep(wide, DATASET, callbacks=[Keep(HOOKS)], memory="2GB", device="cpu").preflight()
    assert not plan.schedule.chunks and "read once" in plan.summary()


def test_dense_models_have_no_chunks(checkpoint: Callable[[str], Path]) -> None:
    plan = Sweep(checkpoint("llama"), DATASET, callbacks=[Keep()], memory="1MB", device="cpu").preflight()
    assert not plan.schedule.chunks


def test_chunks_are_the_largest_that_fit() -> None:
    rows = np.array([5, 5, 5, 5])
    assert cut(rows, 20) == (range(4),)
    assert cut(rows, 19) == (range(3), range(3, 4))
    assert cut(rows, 0) == tuple(range(i, i + 1) for i in range(4))


@pytest.mark.parametrize("memory", ["lots", 0, True, "-1GB", "8XB"])
def test_a_size_that_is_none_is_refused(memory: object, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(Exception, match="memory must be bytes, or a size such as '8GB'"):
        Sweep(checkpoint("llama"), DATASET, callbacks=[Keep()], memory=memory)  # type: ignore[arg-type]


LARGE = {"hidden_size": 1024, "intermediate_size": 1408, "num_local_experts": 16, "num_hidden_layers": 1}
CAPPED = """
import re, sys
from pathlib import Path
from typing import Any
from fpwap import Sweep
from fpwap.callbacks.common import RawActivations

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

def sweep(folder, dataset, **request):
    return Sweep(folder, dataset, callbacks=[RawActivations([-1])], device="cpu", progress=False, **request)

dataset = [[index % 90 + 1] * 24 for index in range(100)]
sweep(sys.argv[3], dataset, dtype="bfloat16").run()  # what the libraries themselves take
before = peak()
capped = sweep(sys.argv[1], dataset, memory=int(sys.argv[2]), microbatch_tokens=240)
capped.run()
print(len(capped.preflight().schedule.chunks), peak() - before)
"""


def test_a_run_stays_below_one_layer_of_experts(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    """In a process of its own, by its peak resident memory: 138 MB of experts, 100 MB allowed."""
    folder = write(Variant(family="mixtral", config=LARGE, dtype=torch.bfloat16), tmp_path)
    parcel = layout(folder)[Stage("layer", 0)]
    experts, memory = parcel.size - parcel.own_size, 100_000_000
    assert experts > 1.3 * memory
    command = [sys.executable, "-c", CAPPED, str(folder), str(memory), str(checkpoint("mixtral"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    chunks_taken, growth = map(int, done.stdout.split())
    assert chunks_taken > 1
    assert growth < memory


@pytest.mark.parametrize("budget_", [{"memory": "100kB"}, {"disk": 1000}])
def test_a_budget_that_is_too_small_is_a_blocker(
    budget_: dict[str, Any], tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    callbacks = [RawActivations(layers="all", last_token_only=False)]
    plan = Sweep(
        checkpoint("llama"), DATASET, callbacks=callbacks, out=tmp_path / "out", device="cpu", **budget_
    ).preflight()
    (blocker,) = plan.blockers
    assert f"and {budget_.get('memory', '1.0 kB').replace('100kB', '100 kB')} may be taken" in blocker
