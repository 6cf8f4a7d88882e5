"""Checkpoints that are stored in fp8 blocks or mxfp4: a sweep of them is one of the weights that they decode to.

The quantised files are made here from a plain checkpoint; the plain one that the reference loads holds the values that
the stored numbers stand for, computed one by one and not with `fpwap.formats`.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CHECKS, Variant, tensors, write
from harness import Keep, Reference, differences, edit_config, keep, prompts, run
from safetensors.torch import save_file
from torch import Tensor

from fpwap.callbacks.common import RawActivations
from fpwap.cli import main
from fpwap.errors import ModelError
from fpwap.plan import Plan, make_plan
from fpwap.schedule import Schedule, group_stages

DATASET = prompts([24, 24, 9, 9, 5, 1], seed=5)
BLOCK = (16, 32)
HOOKS = ("attn_out", "mlp_out", "residual_post", "logits")
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def copy(folder: Path, to: Path, held: Mapping[str, Tensor], quantised: Mapping[str, object] | None) -> Path:
    """A checkpoint of these tensors with the config of ``folder``."""
    to.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, to / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | ({"quantization_config": quantised} if quantised else {})))
    return to


def in_fp8(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The quantised copy and the plain one; blocks at the edges are short."""
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors(folder).items():
        if not name.endswith("proj.weight"):
            stored[name] = plain[name] = tensor
            continue
        rows, columns = tensor.shape
        scales = torch.empty(math.ceil(rows / BLOCK[0]), math.ceil(columns / BLOCK[1]))
        values, exact = torch.empty_like(tensor, dtype=torch.float8_e4m3fn), torch.empty_like(tensor)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1])
                scales[i, j] = tensor[at].abs().max() / 448 * 1.07
                values[at] = (tensor[at] / scales[i, j]).to(torch.float8_e4m3fn)
                exact[at] = values[at].float() * scales[i, j]
        stored |= {name: values, name + "_scale_inv": scales}
        plain[name] = exact
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": BLOCK, "activation_scheme": "dynamic"}
    return copy(folder, tmp_path / "fp8", stored, config), copy(folder, tmp_path / "plain", plain, None)


def in_mxfp4(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors(folder).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = plain[name] = tensor
            continue
        experts, width, height = tensor.shape
        codes = torch.randint(16, (experts, height, width), generator=generator)
        scales = torch.randint(123, 126, (experts, height, width // 32), generator=generator, dtype=torch.uint8)
        low, high = codes[..., 0::2], codes[..., 1::2]
        blocks = (low + 16 * high).to(torch.uint8).view(experts, height, width // 32, 16)
        signed = torch.tensor(VALUES)[codes % 8] * torch.where(codes < 8, 1.0, -1.0)
        exact = signed * (2.0 ** (scales.double() - 127)).float().repeat_interleave(32, dim=2)
        stored |= {name + "_blocks": blocks, name + "_scales": scales}
        plain[name] = exact.transpose(1, 2)
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return copy(folder, tmp_path / "mxfp4", stored, config), copy(folder, tmp_path / "plain", plain, None)


MADE = {
    "llama": (Variant(config={"num_key_value_heads": 2}), in_fp8),
    "deepseek_v3": (Variant(family="deepseek_v3"), in_fp8),
    "gpt_oss": (Variant(family="gpt_oss", config={"hidden_size": 64}), in_mxfp4),
}
ROUTED = ("deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """family -> the quantised checkpoint, and the plain one of the same values."""
    made: dict[str, tuple[Path, Path]] = {}
    for name, (variant, quantise) in MADE.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "source").mkdir()
        made[name] = quantise(write(variant, folder / "source"), folder)
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MADE)
def test_a_sweep_is_one_of_the_decoded_weights(
    name: str, dtype: torch.dtype, pairs: dict[str, tuple[Path, Path]]
) -> None:
    quantised, plain = pairs[name]
    found = keep(quantised, DATASET, Keep(HOOKS), dtype=dtype, batching="padded", microbatch_size=3)
    attention = "eager" if name == "gpt_oss" else "sdpa"
    expected = Reference.load(plain, dtype, attention, checks=CHECKS[name]).kept(DATASET, 3)
    assert not differences(found, {site: rows for site, rows in expected.items() if site[1] in HOOKS})


@pytest.mark.parametrize("name", ROUTED)
def test_experts_are_decoded_as_they_are_streamed(
    name: str, pairs: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised, _ = pairs[name]
    request = {"dtype": "float32", "microbatch_tokens": 24}
    resident = keep(quantised, DATASET, Keep(HOOKS), **request)

    def in_chunks(*given: Any) -> Plan:
        plan = make_plan(*given)
        routed = frozenset(stage for stage, cost in plan.costs.stages.items() if cost.experts and stage.kind == "layer")
        layers = [stage.layer for stage in plan.costs.stages if stage.layer is not None]
        groups = group_stages(layers, norm=True, head=True, size=1, apart=True)
        schedule = Schedule(groups, plan.schedule.waves, (range(2), range(2, 3)), routed)
        return replace(plan, schedule=schedule, loading="stream", ring=3)

    monkeypatch.setattr("fpwap.prepare.make_plan", in_chunks)
    assert not differences(keep(quantised, DATASET, Keep(HOOKS), **request), resident)


@pytest.mark.parametrize("name", MADE)
def test_a_run_of_quantised_weights_is_certified(name: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    quantised, _ = pairs[name]
    result = run(quantised, DATASET, RawActivations([-1]), verify=True, dtype="bfloat16")
    assert result.manifest["certificate"]["layers"]
    assert main(["verify", str(quantised), "--dtype", "bfloat16"]) == 0


def test_another_quantisation_is_refused_by_name(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    folder = copy(checkpoint("llama"), tmp_path / "gptq", tensors(checkpoint("llama")), {"quant_method": "gptq"})
    with pytest.raises(ModelError, match="quantised with 'gptq' are not supported; supported: fp8 and mxfp4"):
        keep(folder, DATASET)


@pytest.mark.parametrize(("shape", "named"), [((4, 1), r"has shape \[4, 1\]"), (None, "is stored as F8_E4M3")])
def test_scales_of_another_shape_are_refused(
    shape: tuple[int, int] | None, named: str, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    quantised, _ = in_fp8(checkpoint("llama_gqa"), tmp_path)
    held = tensors(quantised)
    name = "model.layers.1.mlp.down_proj.weight"
    del held[name + "_scale_inv"]
    if shape:
        held[name + "_scale_inv"] = torch.ones(shape)
    save_file(held, quantised / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name}.* {named}"):
        keep(quantised, DATASET)


def test_mxfp4_weights_without_a_config_of_theirs_are_refused(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    quantised, _ = pairs["gpt_oss"]
    folder = copy(quantised, tmp_path / "silent", tensors(quantised), None)
    edit_config(folder, quantization_config=None)
    with pytest.raises(ModelError, match="is stored as U8, which is not supported"):
        keep(folder, DATASET, Keep(HOOKS))


def test_a_vector_in_fp8_is_refused(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    quantised, _ = in_fp8(checkpoint("llama_gqa"), tmp_path)
    held = tensors(quantised)
    name = "model.layers.1.input_layernorm.weight"
    held |= {name: held[name].to(torch.float8_e4m3fn), name + "_scale_inv": torch.ones(4)}
    save_file(held, quantised / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name} is stored as F8_E4M3, which is not supported \(hidden 60\)"):
        keep(quantised, DATASET)


def test_fp8_weights_without_a_config_of_theirs_are_refused(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    quantised, _ = in_fp8(checkpoint("llama_gqa"), tmp_path)
    edit_config(quantised, quantization_config=None)
    with pytest.raises(ModelError, match="is stored as F8_E4M3, which is not supported"):
        keep(quantised, DATASET)
