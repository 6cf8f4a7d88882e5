"""The pure parts of the benchmarks: checkpoints, limits, caps, tables. No test here measures anything."""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fpwap import Sweep
from fpwap.callbacks.common import RawActivations
from tools.bench import bench, contenders, limits, make_checkpoint, memory_cap, paper, report, scaling
from tools.bench.contenders import Sample
from tools.bench.make_checkpoint import Parameter, Shape

DENSE = Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, mlp=96, vocab=100, tied=False)
ROUTED = replace(DENSE, mlp=32, experts=6, chosen=2, tied=True)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("shape", [DENSE, ROUTED], ids=["dense", "routed"])
def test_a_checkpoint_is_what_a_sweep_reads(tmp_path: Path, shape: Shape, dtype: str) -> None:
    make_checkpoint.write(tmp_path / "model", shape, dtype=dtype)
    result = Sweep(tmp_path / "model", PROMPTS, callbacks=[RawActivations(layers="all")], progress=False).run()
    last = torch.as_tensor(result.activations(layer=shape.layers - 1)).float()
    assert last.shape == (2, 64)
    assert 0.5 < last.std() < 5


def test_a_tensor_does_not_depend_on_shards_or_threads(tmp_path: Path) -> None:
    make_checkpoint.write(tmp_path / "one", DENSE)
    make_checkpoint.write(tmp_path / "many", DENSE, shard_bytes=10000, threads=3)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_another_seed_or_name_is_another_tensor(tmp_path: Path) -> None:
    make_checkpoint.write(tmp_path / "a", DENSE)
    make_checkpoint.write(tmp_path / "b", DENSE, seed=1)
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert not any(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.layers.0.mlp.up_proj.weight"], a["model.layers.1.mlp.up_proj.weight"])


def test_values_have_the_scale_that_was_asked_for() -> None:
    pool = make_checkpoint.Pool(seed=0)
    wanted = Parameter("x", (1500, 1000), mean=1.0, std=0.1, dtype="F32")
    pieces = pool.pieces(wanted)
    assert len(pieces) == 2
    values = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.float32)
    assert values.numel() == 1500 * 1000
    assert values.mean().item() == pytest.approx(1, abs=1e-3)
    assert values.std().item() == pytest.approx(0.1, abs=1e-3)


def test_a_hollow_checkpoint_can_be_planned_and_takes_no_room(tmp_path: Path) -> None:
    shape = replace(make_checkpoint.SHAPES["L"], layers=4)
    size = make_checkpoint.write(tmp_path / "model", shape, hollow=True, shard_bytes=10**9)
    files = list((tmp_path / "model").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) > size > 10**9
    assert sum(path.stat().st_blocks for path in files) < 1000
    plan = Sweep(tmp_path / "model", PROMPTS, callbacks=[RawActivations()], progress=False).preflight()
    assert plan.layers == 4


def test_a_shape_has_both_numbers_of_experts_or_none() -> None:
    with pytest.raises(ValueError, match="0 of 6 experts"):
        replace(DENSE, experts=6)
    with pytest.raises(ValueError, match="7 of 6 experts"):
        replace(DENSE, experts=6, chosen=7)


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="exists: remove it"):
        make_checkpoint.write(tmp_path, DENSE)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(2, 200))
def test_shards_hold_every_tensor_once_in_order(rows: list[int], most: int) -> None:
    wanted = [Parameter(str(index), (count,)) for index, count in enumerate(rows)]
    shards = make_checkpoint.split(wanted, most)
    assert [parameter for shard in shards for parameter in shard] == wanted
    assert all(len(shard) == 1 or sum(p.size for p in shard) <= most for shard in shards)
    for shard, after in pairwise(shards):
        assert sum(p.size for p in shard) + after[0].size > most


# --- limits ---------------------------------------------------------------------------------------------------------


def test_a_token_meets_the_matrices_of_its_layers_and_experts(tmp_path: Path) -> None:
    make_checkpoint.write(tmp_path / "dense", DENSE)
    make_checkpoint.write(tmp_path / "routed", ROUTED)
    attention = 64 * 64 * 2 + 32 * 64 * 2
    assert limits.weights_per_token(tmp_path / "dense") == 2 * (attention + 3 * 64 * 96)
    assert limits.weights_per_token(tmp_path / "routed") == 2 * (attention + 6 * 64 + 2 * 3 * 64 * 32)


def test_all_bytes_of_layers_are_read_and_no_others(tmp_path: Path) -> None:
    make_checkpoint.write(tmp_path / "model", ROUTED, dtype="f32")
    expected = sum(t.nbytes for name, t in tensors(tmp_path / "model").items() if ".layers." in name)
    assert limits.layers_bytes(tmp_path / "model") == expected


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_file_is_read_whole_and_once(tmp_path: Path, at_once: int) -> None:
    (tmp_path / "file").write_bytes(bytes(5 * limits.READ + 1234))
    done, seconds = limits.read(tmp_path / "file", at_once=at_once)
    assert done == 5 * limits.READ + 1234
    assert seconds > 0


def rate(gemm: float, disk: float = 0.0, cores: float = 2.0) -> bench.Rate:
    return bench.Rate(gemm, disk, cores, threads=2)


def test_the_limit_is_the_slower_of_computing_and_reading(tmp_path: Path) -> None:
    make_checkpoint.write(tmp_path / "model", DENSE)
    weights, size = limits.weights_per_token(tmp_path / "model"), limits.layers_bytes(tmp_path / "model")
    hot = bench.Limit.of(tmp_path / "model", 10, [rate(1e6), rate(1e5, cores=1.0)])
    assert (hot.seconds, hot.disk_s) == (20 * weights / 1e6, 0.0)
    cold = bench.Limit.of(tmp_path / "model", 10, [rate(1e12, disk=100.0)])
    assert cold.seconds == cold.disk_s == size / 100


# --- contenders -----------------------------------------------------------------------------------------------------


def task(folder: Path, shape: Shape, **changed: Any) -> contenders.Task:
    make_checkpoint.write(folder / "model", shape, dtype="f32")
    drawn = bench.draw(bench.Case(prompts=5, mean=6, shortest=2, longest=12), shape.vocab, seed=0)
    np.savez(folder / "prompts.npz", ids=np.concatenate(drawn), offsets=np.cumsum([0, *map(len, drawn)]))
    given = contenders.Task(
        contender="",
        options={},
        model=str(folder / "model"),
        prompts=str(folder / "prompts.npz"),
        dtype="float32",
        device="cpu",
        threads=1,
        cold=False,
        answer="",
        captured="",
    )
    return replace(given, **changed)


@pytest.mark.parametrize("shape", [DENSE, ROUTED], ids=["dense", "routed"])
def test_contenders_leave_the_same_thing(tmp_path: Path, shape: Shape) -> None:
    given, ours, theirs, cold = task(tmp_path, shape), Sample(), Sample(), Sample()
    reference = contenders.hf_sorted(given, theirs, batch=2)
    assert reference.shape == (2, 5, 64)
    for captured in (contenders.fpwap(given, ours), contenders.hf_order(replace(given, cold=True), cold, batch=3)):
        assert bench.distance(captured, reference) < 1e-5
    assert min(ours.wall_s, theirs.wall_s, cold.wall_s) > 0
    assert ours.weights > 0 and ours.rest["predicted_s"] > 0 and ours.rest["memory_bytes"] > 0
    one = contenders.fpwap(given, Sample(), capture=0)
    assert bench.distance(torch.cat((one, one)), torch.cat((reference[:1], reference[:1]))) < 1e-5


def test_rows_that_changed_places_are_far_from_each_other(tmp_path: Path) -> None:
    captured = contenders.fpwap(task(tmp_path, DENSE), Sample())
    assert bench.distance(captured.flip(1), captured) > 0.1


def test_a_package_that_is_missing_or_another_is_said_in_one_sentence() -> None:
    with pytest.raises(SystemExit, match="needs nobody and this Python has none: make bench-peers"):
        contenders.demand("nobody")
    with pytest.raises(SystemExit, match=r"needs fpwap 0\.1\.8 and this Python has 0\.1\.0"):
        contenders.demand("fpwap", "0.1.8")


# --- samples and tables ---------------------------------------------------------------------------------------------


def taken(wall: float, cpu: float, foreign: float) -> bench.Taken:
    return bench.Taken("fpwap", 1, wall + 1, 2, Sample(wall_s=wall, cpu_s=cpu, foreign_s=foreign, peak_rss=int(wall)))


@pytest.mark.parametrize(
    ("cpu", "foreign", "clean"),
    [(1.9, 0.1, True), (1.9, 5.0, True), (0.4, 0.1, True), (1.0, 1.0, False)],
    ids=["had both threads", "on a larger machine", "waited alone", "shared"],
)
def test_a_sample_is_clean_with_its_threads_or_alone(cpu: float, foreign: float, clean: bool) -> None:
    assert taken(1.0, cpu, foreign).clean is clean


def test_contended_samples_do_not_count_unless_there_are_no_others() -> None:
    slow, fast = taken(10.0, 10.0, 10.0), taken(4.0, 7.9, 0.1)
    assert bench.summarise([slow, fast, slow], tokens=8, limit_s=2.0) | {"cores": 0, "foreign": 0} == {
        "wall_s": 4.0,
        "process_s": 5.0,
        "tokens_per_s": 2.0,
        "share_of_limit": 0.5,
        "peak_rss": 10,
        "peak_device": 0,
        "weights": 0,
        "from_disk": 0,
        "cores": 0,
        "foreign": 0,
        "clean": 1,
        "samples": 3,
    }
    assert bench.summarise([slow, slow], tokens=8, limit_s=2.0)["wall_s"] == 10


def test_options_of_a_contender_are_read_and_a_cap_is_not_one() -> None:
    spec = bench.Spec.parse("fpwap:loading=stream,layers_per_visit=4,verify=false,cap=700MB")
    assert spec.options == {"loading": "stream", "layers_per_visit": 4, "verify": False}
    assert spec.cap == 700 * 10**6
    with pytest.raises(argparse.ArgumentTypeError, match="is no contender"):
        bench.Spec.parse("nobody")


def test_prompts_are_the_same_for_the_same_seed_and_within_bounds() -> None:
    case = bench.Case(prompts=50, mean=40, shortest=8, longest=100)
    first, again = (bench.draw(case, 30, seed=3) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    lengths = [len(prompt) for prompt in first]
    assert min(lengths) >= 8 and max(lengths) <= 100 and len(set(lengths)) > 10
    assert max(int(prompt.max()) for prompt in first) < 30


@given(st.lists(st.lists(st.text("abc|", max_size=5), min_size=3, max_size=3), max_size=5))
def test_a_table_is_aligned(rows: list[list[str]]) -> None:
    rows = [[cell.replace("|", "") for cell in row] for row in rows]
    lines = report.table(("one", "two", "three"), rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert len({len(line) for line in lines}) == 1
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]] == rows


def test_scaling_is_drawn_over_both_sizes(tmp_path: Path) -> None:
    one = scaling.Point("prompts", 4, 8, 100, 1.0, 1.1, 10**9, 10**8, 1, 1)
    scaling.draw([one, replace(one, prompts=16), replace(one, over="layers")], "title", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


# --- paper ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "billions"), [("70B", 70.55), ("405B", 405.85), ("671B", 671.03)])
def test_models_on_paper_have_the_published_number_of_weights(name: str, billions: float) -> None:
    tensors = make_checkpoint.parameters(paper.LLAMAS[name]) if name in paper.LLAMAS else paper.deepseek()
    weights = sum(math.prod(one.shape) for one in tensors if not one.name.endswith(limits.SCALES))
    assert weights / 1e9 == pytest.approx(billions, abs=0.01)


SMALL = {"num_hidden_layers": 4, "n_routed_experts": 16, "hidden_size": 512, "moe_intermediate_size": 256}


def test_a_plan_on_paper_is_that_of_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one card of several, with a share of what they have in common; of what is here, nothing is asked."""
    monkeypatch.setattr(paper, "DEEPSEEK", paper.DEEPSEEK | SMALL)
    size = paper.hollow("671B", tmp_path / "model")
    whole = make_checkpoint.write_tensors(tmp_path / "twin", paper.deepseek(), paper.DEEPSEEK, hollow=True)
    assert size == whole
    eight = replace(paper.ONE_80, cards=8)
    plans = [paper.planned(tmp_path / "model", machine, 20, 8) for machine in (paper.ONE_80, eight)]
    assert [plan.device.type for plan in plans] == ["cuda", "cuda"]
    assert [plan.prompts for plan in plans] == [20, 3]
    assert [plan.budgets.device for plan in plans] == [int(0.9 * 80e9)] * 2
    assert plans[0].budgets.memory == pytest.approx(8 * plans[1].budgets.memory, rel=1e-6)
    assert plans[0].rates.disk_read == 8 * plans[1].rates.disk_read == 1e10
    assert "conservative" not in plans[0].summary()
    found = paper.estimate("671B", tmp_path / "model", eight, 20, 8, show=False)
    assert found.limit_s == pytest.approx(8 * limits.layers_bytes(tmp_path / "model") / 1e10)


def test_scales_of_quantised_matrices_are_no_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "DEEPSEEK", paper.DEEPSEEK | SMALL)
    paper.hollow("671B", tmp_path / "model")
    names = {linear.name for layer in limits.linears(tmp_path / "model") for linear in layer}
    assert "mlp.experts.7.up_proj.weight" in names
    assert not [name for name in names if name.endswith(limits.SCALES) or "experts.8" in name]


# --- caps -----------------------------------------------------------------------------------------------------------

V1 = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup {} cgroup rw,relatime,memory 0 0\ncgroup2 /u cgroup2 rw 0 0"
V2 = "cgroup2 {} cgroup2 rw,nosuid 0 0"


@pytest.mark.parametrize(("mounts", "version"), [(V1, memory_cap.V1), (V2, memory_cap.V2)], ids=["v1", "v2"])
def test_the_own_group_is_found_in_both_versions(tmp_path: Path, mounts: str, version: memory_cap.Files) -> None:
    own = "8:memory:/a/b\n1:cpu:/\n0::/a/b\n"
    assert memory_cap.own_group(own, mounts.format(tmp_path)) == (tmp_path, version)  # a container sees but itself
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert memory_cap.own_group(own, mounts.format(tmp_path)) == (tmp_path / "a" / "b", version)


def test_no_control_groups_are_said_to_be_missing() -> None:
    with pytest.raises(memory_cap.Uncapped, match="no memory control group is mounted"):
        memory_cap.own_group("0::/\n", "proc /proc proc rw 0 0")


@pytest.mark.parametrize(("text", "count"), [("700MB", 7 * 10**8), ("0.5 GiB", 2**29), ("12", 12)])
def test_sizes_are_read(text: str, count: int) -> None:
    assert memory_cap.size(text) == count
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        memory_cap.size(text + "x")


def capped(limit: str, size: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(memory_cap.__file__)), limit, "--"]
    work = [sys.executable, "-c", f"print(len(b'x' * {size}))"]
    return subprocess.run([*command, *work], capture_output=True, text=True)


def test_what_takes_more_than_its_cap_is_killed_and_nothing_else() -> None:
    """Where no control group can be made, the command says so and runs nothing."""
    within, beyond = capped("80MB", 20 * 10**6), capped("80MB", 400 * 10**6)
    if within.stderr.startswith("memory_cap: "):
        assert (within.returncode, within.stdout) == (1, "")
        return
    assert (within.returncode, within.stdout) == (0, "20000000\n")
    assert beyond.returncode == 137
    figures = json.loads(beyond.stderr.splitlines()[-1])
    assert figures["limit"] == 80 * 10**6
    assert figures["peak"] in range(70 * 10**6, 81 * 10**6) or figures["peak"] == -1
    folder, _ = memory_cap.own_group(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mounts").read_text())
    assert not list(folder.glob("capped-*"))
