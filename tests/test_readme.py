"""The examples users read are run: every Python block of README.md, and the promised API word for word.

Only the model's name is exchanged, for a random checkpoint with the 80 layers that the examples speak of.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import archs

README = Path(__file__).parent.parent / "README.md"
MODEL = "meta-llama/Llama-3.1-70B"
PROMISED = """
from fpwap import Sweep
from fpwap.callbacks.common import RawActivations, IncrementalPCA, DiffOfMeans

run = Sweep(
    model="meta-llama/Llama-3.1-70B",      # hub id or local folder
    dataset=my_dataset,                    # iterable of {"input_ids": ..., "label": ...}
    seq_len=256,
    callbacks=[
        RawActivations(layers=[40, 45, 50]),                 # last token by default
        IncrementalPCA(layers="all", n_components=64),
        DiffOfMeans(layers="all", label_fn=lambda s: s["label"]),
    ],
)
plan = run.preflight()
print(plan.summary())                      # feasible? how long? how many GB? before touching the device
result = run.run()
acts  = result.activations(layer=45, hook="residual_post")   # [N, H]
basis = result.artifact("pca_basis", layer=45)

from fpwap import Callback, Emit, WriteBack
from fpwap.callbacks.common import SteerInBasis

class LastTokenLogNorm(Callback):
    target_layers = [32]
    target_hooks = ("residual_post",)
    phase = "read"                                   # "read" | "write" | "read_after_write"
    def on_batch(self, layer_idx, hook, acts, sample_ids):
        return Emit(acts[:, -1, :].norm(dim=-1).log())       # Emit | WriteBack | None

steer = Sweep(model="meta-llama/Llama-3.1-70B", dataset=my_dataset, seq_len=256, callbacks=[
    SteerInBasis(basis_artifact=result.artifact("pca_basis", layer=45),
                 direction_idx=0, alpha=2.0, layers=[45])])
steered = steer.run()

result.profile.summary()         # per layer: load / forward / callback / write
result.profile.by_phase(); result.profile.slowest_layer(); result.profile.bytes_moved()
result.profile.throughput_tok_per_s(); result.profile.weight_bandwidth_gb_per_s()
norms = Sweep(model="meta-llama/Llama-3.1-70B", dataset=my_dataset, callbacks=[LastTokenLogNorm()]).run()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 layers of width 64."""
    path = tmp_path_factory.mktemp("eighty")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, num_hidden_layers=80, **sizes))  # type: ignore[arg-type]
    model.to(torch.bfloat16).save_pretrained(path)  # type: ignore[arg-type]
    return path


def dataset() -> Iterator[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    for index in range(80):
        yield {"input_ids": torch.randint(0, 61, (3 + index % 7,), generator=draw).tolist(), "label": index % 2}


def run(code: str, folder: Path, names: dict[str, Any]) -> dict[str, Any]:
    samples = list(dataset())
    names |= {"my_dataset": samples}
    exec(compile(code.replace(MODEL, str(folder)), "example", "exec"), names)
    return names


def test_the_promised_api(folder: Path) -> None:
    names = run(PROMISED, folder, {})
    assert names["acts"].shape == (80, 64)
    assert names["basis"]["components"].shape == (64, 64)
    assert names["norms"].activations(layer=32).shape == (80,)
    assert names["plan"].feasible


def test_every_python_block_of_the_readme(folder: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)
    assert len(blocks) >= 4
    names: dict[str, Any] = {}
    for block in blocks:
        names = run(block, folder, names)
    assert names["logits"].shape == (80, 61)
    samples = list(dataset())
    cache = names["ActivationCache"].build(str(folder), [s["input_ids"] for s in samples], None, [40])
    assert torch.equal(cache.acts[40], names["result"].activations(layer=40))


def test_the_table_of_families_is_that_of_the_code() -> None:
    rows = {line.split("|")[1].strip(): line for line in README.read_text().splitlines() if line.startswith("| ")}
    for family in archs.supported():
        assert family.about in rows[family.name]
        assert all(f"`{name}`" in rows[family.name] for name in family.model_types)
