"""What a run takes at its peak against what its plan says, each in a process of its own.

Peaks are of resident memory beyond what the process had when the run began. The first sweep of a process brings what
the libraries load once, so a small one goes before.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Variant, write

SLACK = 64 * 10**6
"""Bytes by which a run may go beyond its plan: of allocators, of threads, of the interpreter."""
CODE = """
import json, sys
from pathlib import Path
from fpwap import Sweep
from fpwap.callbacks.common import RawActivations
folder, small, lengths, request = json.loads(sys.argv[1])
def sweep(folder, lengths, **request):
    prompts = [[index % 90 + 1] * length for index, length in enumerate(lengths)]
    return Sweep(folder, prompts, callbacks=[RawActivations()], device="cpu", progress=False, **request)
sweep(small, [5, 3]).run()
run = sweep(folder, lengths, **request)
plan = run.preflight()
peaks = run.run().profile.peaks
print(json.dumps([peaks["memory"], len(plan.schedule.waves), plan.loading, plan.blockers]))
"""
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
CASES: dict[str, tuple[Variant, list[int], dict[str, Any]]] = {
    "window": (
        Variant(family="mistral", config={"sliding_window": 64, "num_hidden_layers": 2, "head_dim": 8}),
        [5000],
        {},
    ),
    "cast": (
        Variant(config={**SIZES, "num_hidden_layers": 6, "vocab_size": 4096}, dtype=torch.float32),
        [50] * 20,
        {"dtype": "bfloat16"},
    ),
    "streamed": (
        Variant(config={**SIZES, "num_hidden_layers": 12}, dtype=torch.float32),
        [50] * 40,
        {"loading": "stream"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_takes_no_more_than_its_plan_says(case: str, tmp_path: Path) -> None:
    variant, lengths, request = CASES[case]
    folders = [tmp_path / name for name in ("model", "small")]
    for folder, own in zip(folders, (variant, Variant()), strict=True):
        folder.mkdir()
        write(own, folder)
    words = json.dumps([*map(str, folders), lengths, request])
    done = subprocess.run([sys.executable, "-c", CODE, words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    memory, _, _, _ = json.loads(done.stdout)
    assert memory["measured"] > 0
    assert memory["measured"] <= memory["planned"] + SLACK, memory
