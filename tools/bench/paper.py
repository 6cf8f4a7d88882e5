"""Models and machines that are not here, on paper: what the plan of a real `Sweep` says of them.

    python -m tools.bench.paper --write
    python -m tools.bench.paper --models 671B --prompts 10000 --show

Nothing is computed and nothing is estimated a second time. A hollow checkpoint has the published model's headers (70B
and 405B: Llama 3.1; 671B: DeepSeek-V3, in fp8 as it is published) and no bytes. `Sweep.preflight` plans the residual
stream of all layers at the last token of N prompts of random tokens; what it would ask the machine (its device, its
free memory, its rates) is answered by a `Machine` here. So a time on this page is the plan's own `predicted_s`, with
rates that come from data sheets and not from a calibration: how far plans are from the clock is `predict`'s question.

**limit**: operations / matrix rate, or all bytes of the layers once / disk rate, whichever is longer.

**Cards.** One node that shares a layer between its cards is not implemented. 8 cards are 8 independent sweeps, each of
an eighth of the prompts: each with its card and link, and an eighth of RAM, of the free disk and of the disk's rate,
since all of them read all weights at the same time, past the page cache.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import process_time
from typing import Any
from unittest import mock

import numpy as np
import torch

import fpwap.machine
import fpwap.rates
from fpwap import Sweep
from fpwap.callbacks.common import RawActivations
from fpwap.plan import Plan, duration
from fpwap.rates import Rates
from fpwap.ways import Budgets

from . import limits, make_checkpoint, report
from .make_checkpoint import Parameter, Shape

LLAMAS = {
    "70B": Shape(layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, mlp=28672, vocab=128256, tied=False),
    "405B": Shape(layers=126, hidden=16384, heads=128, kv_heads=8, head_dim=128, mlp=53248, vocab=128256, tied=False),
}
BLOCK = 128
"""Rows and columns of an fp8 matrix that share a scale."""
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 163840,
    "attention_bias": False,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
}
"""DeepSeek-V3's ``config.json`` (DeepSeek-AI, 2024), without its prediction layer."""
NAMES = (*LLAMAS, "671B")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a sweep on it may take, and how fast its parts are. memory: of a card; flops: bf16 matrix products."""

    name: str
    cards: int
    memory: float
    flops: float
    bandwidth: float
    """Bytes per second of the card's memory."""
    ram: float
    link: float
    disk: float
    """Bytes per second, of the machine's disk; written at half of that."""
    room: float = 4e12
    """Free disk."""

    @property
    def budgets(self) -> Budgets:
        """Of one card's sweep; a tenth of RAM and card is left to others."""
        return Budgets(
            memory=int(0.9 * self.ram / self.cards),
            device=int(0.9 * self.memory),
            disk=int(self.room / self.cards),
        )

    @property
    def rates(self) -> Rates:
        """Of one card's sweep, attention at a third of the matrix rate."""
        plain = fpwap.rates.conservative(torch.device("cuda"))
        disk = self.disk / self.cards
        return replace(
            plain,
            matrix={**plain.matrix, "bfloat16": self.flops},
            attention={**plain.attention, "bfloat16": self.flops / 3},
            passes={**plain.passes, "bfloat16": 0.8 * self.bandwidth},
            disk_read=disk,
            disk_write=disk / 2,
            to_device=self.link,
            from_device=self.link,
            since=dict.fromkeys(("matrix.bfloat16", "disk_read"), "as on paper"),
        )


SLOW_32 = Machine(
    name="32 GB, disk 5 GB/s", cards=1, memory=32e9, flops=1.5e14, bandwidth=1.79e12, ram=128e9, link=5e10, disk=5e9
)
ONE_80 = Machine(
    name="80 GB, disk 10 GB/s", cards=1, memory=80e9, flops=6e14, bandwidth=3.35e12, ram=256e9, link=5e10, disk=1e10
)
MACHINES = (
    SLOW_32,
    replace(SLOW_32, name="32 GB, disk 10 GB/s", disk=1e10),
    ONE_80,
    replace(ONE_80, name="8 x 80 GB, disk 20 GB/s", cards=8, ram=2e12, disk=2e10),
)
"""A desktop with 150 TFLOP/s in bf16 and PCIe 5, on a slower and a faster NVMe drive; servers with 600 TFLOP/s."""


def deepseek() -> list[Parameter]:
    """Every tensor of DeepSeek-V3: matrices in fp8 with scales for blocks; the rest, embedding and head in bf16."""
    config = DEEPSEEK
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    content, turning, value = (config[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v"))
    query, latent = config["q_lora_rank"], config["kv_lora_rank"]
    width, experts = config["moe_intermediate_size"], config["n_routed_experts"]

    def plain(name: str, *shape: int, dtype: str = "BF16") -> Iterator[Parameter]:
        yield Parameter(name, shape, dtype=dtype)

    def matrix(name: str, out: int, into: int) -> Iterator[Parameter]:
        yield Parameter(f"{name}.weight", (out, into), dtype="F8_E4M3")
        yield Parameter(f"{name}.weight_scale_inv", (-(-out // BLOCK), -(-into // BLOCK)), dtype="F32")

    def mlp(name: str, width: int) -> Iterator[Parameter]:
        yield from matrix(f"{name}.gate_proj", width, hidden)
        yield from matrix(f"{name}.up_proj", width, hidden)
        yield from matrix(f"{name}.down_proj", hidden, width)

    def layer(index: int) -> Iterator[Parameter]:
        at = f"model.layers.{index}"
        yield from plain(f"{at}.input_layernorm.weight", hidden)
        yield from matrix(f"{at}.self_attn.q_a_proj", query, hidden)
        yield from plain(f"{at}.self_attn.q_a_layernorm.weight", query)
        yield from matrix(f"{at}.self_attn.q_b_proj", heads * (content + turning), query)
        yield from matrix(f"{at}.self_attn.kv_a_proj_with_mqa", latent + turning, hidden)
        yield from plain(f"{at}.self_attn.kv_a_layernorm.weight", latent)
        yield from matrix(f"{at}.self_attn.kv_b_proj", heads * (content + value), latent)
        yield from matrix(f"{at}.self_attn.o_proj", hidden, heads * value)
        yield from plain(f"{at}.post_attention_layernorm.weight", hidden)
        if index < config["first_k_dense_replace"]:
            yield from mlp(f"{at}.mlp", config["intermediate_size"])
            return
        yield from plain(f"{at}.mlp.gate.weight", experts, hidden)
        yield from plain(f"{at}.mlp.gate.e_score_correction_bias", experts, dtype="F32")
        yield from mlp(f"{at}.mlp.shared_experts", config["n_shared_experts"] * width)
        for expert in range(experts):
            yield from mlp(f"{at}.mlp.experts.{expert}", width)

    found = list(plain("model.embed_tokens.weight", config["vocab_size"], hidden))
    for index in range(config["num_hidden_layers"]):
        found += layer(index)
    return [*found, *plain("model.norm.weight", hidden), *plain("lm_head.weight", config["vocab_size"], hidden)]


def hollow(name: str, folder: Path) -> int:
    """The checkpoint of this name, headers only; returns its bytes."""
    if name in LLAMAS:
        return make_checkpoint.write(folder, LLAMAS[name], hollow=True)
    return make_checkpoint.write_tensors(folder, deepseek(), DEEPSEEK, hollow=True)


def planned(model: Path, machine: Machine, prompts: int, length: int) -> Plan:
    """What a sweep on this machine would be: of one card, if there are several."""
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    own = -(-prompts // machine.cards)
    drawn = np.random.default_rng(0).integers(0, vocab, (own, length), dtype=np.int32)
    budgets = machine.budgets
    answers = {
        "resolve_device": torch.device("cuda"),
        "available_memory": budgets.memory,
        "device_memory": budgets.device,
        "free_disk": budgets.disk,
    }
    with (
        mock.patch.multiple(fpwap.machine, **{name: mock.Mock(return_value=a) for name, a in answers.items()}),
        mock.patch.object(fpwap.rates, "load", return_value=machine.rates),
    ):
        return Sweep(model, drawn, callbacks=[RawActivations(layers="all")], progress=False).preflight()


@dataclass(frozen=True)
class Estimate:
    """One model, machine and dataset: seconds and bytes, of one card where there are several. plan_s: of processor."""

    model: str
    machine: str
    prompts: int
    feasible: bool
    predicted_s: float
    limit_s: float
    bound: str
    loading: str
    layers_per_visit: int
    tier: str
    waves: int
    chunks: int
    read: int
    device_bytes: int
    memory_bytes: int
    disk_bytes: int
    plan_s: float

    @property
    def row(self) -> tuple[str, ...]:
        how = [self.loading, f"{self.layers_per_visit} a visit", f"residual in {self.tier}"]
        how += [f"{self.waves} waves"] * (self.waves > 1) + [f"{self.chunks} chunks"] * (self.chunks > 1)
        return (
            self.model,
            self.machine,
            f"{self.prompts:,}",
            duration(self.predicted_s) if self.feasible else "does not fit",
            f"{self.limit_s / self.predicted_s:.2f}",
            self.bound,
            f"{self.read / 1e9:,.0f}",
            f"{self.device_bytes / 1e9:.1f}",
            f"{self.memory_bytes / 1e9:.1f}",
            f"{self.disk_bytes / 1e9:,.0f}",
            ", ".join(how),
        )


HEAD = ("model", "machine", "prompts", "time", "share", "bound", "read GB", "card GB", "RAM GB", "disk GB", "how")


def estimate(name: str, model: Path, machine: Machine, prompts: int, length: int, show: bool) -> Estimate:
    """Plans one case."""
    started = process_time()
    plan = planned(model, machine, prompts, length)
    took = process_time() - started
    if show:
        print(f"\n{name}, {machine.name}, {prompts:,} prompts, of one card:\n{plan.summary()}")
    operations = 2.0 * limits.weights_per_token(model) * plan.tokens
    groups, waves = plan.schedule.groups, plan.schedule.waves
    return Estimate(
        model=name,
        machine=machine.name,
        prompts=prompts,
        feasible=plan.feasible,
        predicted_s=plan.predicted_s,
        limit_s=max(operations / machine.flops, limits.layers_bytes(model) * machine.cards / machine.disk),
        bound=plan.bound,
        loading=plan.loading,
        layers_per_visit=max(sum(stage.kind == "layer" for stage in group) for group in groups),
        tier=plan.tier if len(groups) > 1 else "no store",
        waves=len(waves),
        chunks=len(plan.schedule.chunks),
        read=plan.weights_bytes,
        device_bytes=plan.device_bytes,
        memory_bytes=plan.memory_bytes,
        disk_bytes=plan.disk_bytes,
        plan_s=took,
    )


def estimates(args: argparse.Namespace, machines: Sequence[Machine]) -> Iterator[Estimate]:
    """Every model on every machine with every number of prompts."""
    with tempfile.TemporaryDirectory(prefix="paper-") as folder:
        for name in args.models:
            model = Path(folder) / name
            hollow(name, model)
            for prompts in args.prompts:
                for machine in machines:
                    yield estimate(name, model, machine, prompts, args.length, args.show)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 10000, 100000])
    parser.add_argument("--length", type=int, default=256, help="tokens of every prompt")
    parser.add_argument("--show", action="store_true", help="print every plan's page")
    parser.add_argument("--write", action="store_true", help="keep the run under tools/bench/results/")
    args = parser.parse_args()
    found = list(estimates(args, MACHINES))
    title = f"paper: all layers at the last token of prompts of {args.length} tokens"
    assumed = [
        (
            machine.name,
            f"{machine.flops / 1e12:.0f}",
            f"{machine.bandwidth / 1e12:.2f}",
            f"{machine.ram / 1e9:,.0f}",
            f"{machine.link / 1e9:.0f}",
            f"{machine.disk / 1e9:.0f}",
        )
        for machine in MACHINES
    ]
    slowest = max(found, key=lambda one: one.plan_s)
    text = "\n\n".join(
        (
            report.table(HEAD, [one.row for one in found]),
            "share: of the limit, operations / matrix rate or the layers' bytes once / disk rate. read, card, RAM and "
            "disk are those of one card's sweep.",
            report.table(("assumed", "TFLOP/s a card", "TB/s a card", "RAM GB", "link GB/s", "disk GB/s"), assumed),
            f"slowest plan: {slowest.plan_s:.1f} s of processor ({slowest.model}, {slowest.prompts:,} prompts)",
        )
    )
    figures = {
        "bench": "paper",
        "configuration": {"length": args.length},
        "machines": [asdict(machine) for machine in MACHINES],
        "estimates": [asdict(one) for one in found],
    }
    print(f"{title}\n{text}\n")
    if args.write:
        print(f"kept as {report.store('paper', title, text, figures).name}")
    report.last_line(figures)


if __name__ == "__main__":
    main()
