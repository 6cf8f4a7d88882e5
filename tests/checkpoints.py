"""Tiny checkpoints that can show a fault, written as Hugging Face writes them.

A model with default weights has norms of 1, biases of 0 and nearly uniform attention: swapped norms, a dropped bias, a
wrong rope or mask hardly show. So every tensor is redrawn, config values are off their defaults, and prompts are longer
than every original context. `VARIANTS` names what a family's config and files can look like; `write` makes one on disk.
The reference loader of every test is `transformers`' own ``from_pretrained(folder, dtype=D)``.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

Head = Literal["own", "tied", "other", "alone"]
"""own: untied. tied: only the embedding is stored. other: tied in the config, yet a different head is stored, which
counts. alone: tied, and only the head is stored, which is the embedding too."""

VOCAB = 97
LONGEST = 24
"""Tokens of the longest prompt that tests draw: beyond every ``max_position_embeddings`` below that rope may exceed."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One checkpoint: a family, config values over `BASE`, and how its files look.

    gain: how far attention is from uniform; the standard deviation of scores is about ``gain ** 2``.
    prefix: whether names start with ``model.`` or ``transformer.``. shard: size at which files are split.
    buffers: adds tensors that old files hold and nobody reads. legacy: a ``config.json`` of transformers 4.
    """

    family: Literal["llama", "gpt2"] = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    gain: float = 1.6
    dtype: torch.dtype = torch.float32
    head: Head = "own"
    prefix: bool = True
    shard: str = "1GB"
    buffers: bool = False
    legacy: bool = False


BASE: Mapping[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": VOCAB,
        "hidden_size": 60,
        "intermediate_size": 101,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 60,
        "n_layer": 3,
        "n_head": 5,
        "n_positions": 40,
        "layer_norm_epsilon": 1e-3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
ROOT = {"llama": "model.", "gpt2": "transformer."}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **parameters}}


GQA = {"num_key_value_heads": 2}
LLAMA3 = rope(
    "llama3", factor=4.0, low_freq_factor=0.5, high_freq_factor=2.0, original_max_position_embeddings=LONGEST - 4
)
YARN = {"factor": 4.0, "original_max_position_embeddings": LONGEST - 4, "beta_fast": 3.0, "beta_slow": 0.3}

VARIANTS: Mapping[str, Variant] = {
    "llama": Variant(),
    "llama_gqa": Variant(config=GQA, shard="60KB"),
    "llama_mqa": Variant(config={"num_key_value_heads": 1}, dtype=torch.bfloat16),
    "llama_head_dim": Variant(config={"head_dim": 14, "num_attention_heads": 5, "num_key_value_heads": 1}),
    "llama_attention_bias": Variant(config=GQA | {"attention_bias": True}, dtype=torch.float16),
    "llama_mlp_bias": Variant(config=GQA | {"mlp_bias": True}),
    "llama_tied": Variant(config=GQA, head="tied"),
    "llama_tied_other_head": Variant(config=GQA, head="other"),
    "llama_tied_head_alone": Variant(config=GQA, head="alone"),
    "llama_no_prefix": Variant(config=GQA, head="tied", prefix=False, shard="60KB"),
    "llama_legacy": Variant(config=rope("default", rope_theta=10000.0), legacy=True, buffers=True),
    "llama_linear": Variant(config=GQA | rope("linear", factor=2.5)),
    "llama_linear_legacy": Variant(config=GQA | rope("linear", factor=2.5), legacy=True),
    "llama_dynamic": Variant(config=GQA | rope("dynamic", factor=2.0) | {"max_position_embeddings": LONGEST - 8}),
    "llama_llama3": Variant(config=GQA | LLAMA3),
    "llama_llama3_legacy": Variant(config=GQA | LLAMA3, legacy=True),
    "llama_yarn": Variant(config=GQA | rope("yarn", **YARN)),
    "llama_yarn_defaults": Variant(config=GQA | rope("yarn", factor=2.0)),
    "llama_yarn_attention_factor": Variant(config=GQA | rope("yarn", **YARN, attention_factor=1.3)),
    "llama_yarn_mscale": Variant(config=GQA | rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.4)),
    "llama_yarn_no_truncate": Variant(config=GQA | rope("yarn", **YARN, truncate=False)),
    "llama_yarn_null_factor": Variant(config=GQA | rope("yarn", **{**YARN, "factor": None})),
    "llama_gelu": Variant(config=GQA | {"hidden_act": "gelu"}),
    "llama_gelu_tanh": Variant(config=GQA | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama_swish": Variant(config=GQA | {"hidden_act": "swish"}),
    "gpt2": Variant(family="gpt2", head="tied"),
    "gpt2_untied": Variant(family="gpt2", config={"tie_word_embeddings": False}),
    "gpt2_n_inner": Variant(family="gpt2", config={"n_inner": 101}, head="tied", dtype=torch.bfloat16),
    "gpt2_unscaled": Variant(family="gpt2", config={"scale_attn_weights": False}, gain=0.9, head="tied"),
    "gpt2_by_layer": Variant(
        family="gpt2", config={"scale_attn_by_inverse_layer_idx": True}, gain=2.0, head="tied", dtype=torch.float16
    ),
    "gpt2_upcast": Variant(
        family="gpt2",
        config={"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
        gain=2.0,
        head="tied",
    ),
    "gpt2_no_prefix": Variant(family="gpt2", head="tied", prefix=False, buffers=True, legacy=True),
    "gpt2_buffers": Variant(family="gpt2", head="tied", buffers=True, shard="60KB"),
    "gpt2_other_head": Variant(family="gpt2", head="other"),
    "gpt2_gelu": Variant(family="gpt2", config={"activation_function": "gelu"}, head="tied"),
    "gpt2_gelu_tanh": Variant(family="gpt2", config={"activation_function": "gelu_pytorch_tanh"}, head="tied"),
    "gpt2_relu": Variant(family="gpt2", config={"activation_function": "relu"}, head="tied"),
}


def write(variant: Variant, folder: Path, seed: int = 0) -> Path:
    """Makes the checkpoint in an empty folder and returns that."""
    generator = torch.Generator().manual_seed(seed)
    model = _model(variant)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.data = _draw(name, tensor, variant, generator).to(variant.dtype)
    model.save_pretrained(folder, max_shard_size=variant.shard)
    _rewrite_files(folder, variant, lambda *shape: torch.randn(*shape, generator=generator).to(variant.dtype))
    if variant.legacy:
        path = folder / "config.json"
        path.write_text(json.dumps(_legacy(json.loads(path.read_text()), variant)))
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their stored names."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _model(variant: Variant) -> PreTrainedModel:
    values = dict(BASE[variant.family] | variant.config)
    if variant.head != "own":
        values["tie_word_embeddings"] = True
    if variant.family == "llama":
        return LlamaForCausalLM(LlamaConfig(**values))
    return GPT2LMHeadModel(GPT2Config(**values))


def _draw(name: str, like: Tensor, variant: Variant, generator: torch.Generator) -> Tensor:
    """A tensor in the place of ``like``: random, and large where a fault could hide behind small numbers."""
    values = torch.randn(like.shape, generator=generator)
    if like.ndim < 2:
        return 0.3 * values if name.endswith("bias") else 1 + 0.3 * values
    if "embed" in name or "wte" in name or "wpe" in name:
        return values
    conv = variant.family == "gpt2" and "lm_head" not in name
    values /= math.sqrt(like.shape[0] if conv else like.shape[1])
    if "q_proj" in name or "k_proj" in name:
        return variant.gain * values
    if "c_attn" in name:
        values[:, : 2 * like.shape[0]] *= variant.gain
    return values


def _rewrite_files(folder: Path, variant: Variant, draw: Callable[..., Tensor]) -> None:
    """Gives the files that `save_pretrained` wrote the names and extra tensors that the variant asks for."""
    files = sorted(folder.glob("*.safetensors"))
    places: dict[str, str] = {}
    for file in files:
        held = load_file(file)
        if file == files[0]:
            held |= _extra(variant, draw)
        if variant.head == "alone":
            held = {("lm_head.weight" if "embed_tokens" in name else name): tensor for name, tensor in held.items()}
        if not variant.prefix:
            held = {name.removeprefix(ROOT[variant.family]): tensor for name, tensor in held.items()}
        save_file(held, file, metadata={"format": "pt"})
        places |= dict.fromkeys(held, file.name)
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _extra(variant: Variant, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    values, root = BASE[variant.family] | variant.config, ROOT[variant.family]
    extra: dict[str, Tensor] = {}
    if variant.head == "other":
        extra["lm_head.weight"] = draw(VOCAB, values["hidden_size" if variant.family == "llama" else "n_embd"])
    if variant.buffers and variant.family == "llama":
        for layer in range(values["num_hidden_layers"]):
            extra[f"{root}layers.{layer}.self_attn.rotary_emb.inv_freq"] = draw(5)
    if variant.buffers and variant.family == "gpt2":
        for layer in range(values["n_layer"]):
            extra[f"{root}h.{layer}.attn.bias"] = draw(1, 1, values["n_positions"], values["n_positions"])
            extra[f"{root}h.{layer}.attn.masked_bias"] = draw(3)
    return extra


def _legacy(config: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """A config as transformers 4 wrote it, without the keys that old files lack where their default is meant."""
    config["torch_dtype"] = config.pop("dtype")
    if variant.family == "gpt2":
        return config | {"n_ctx": config["n_positions"], "gradient_checkpointing": False}
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    if config["rope_theta"] == 10000.0:
        del config["rope_theta"]
    kind = scaling.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **scaling}
    for key in ("head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        del config[key]
    if config["num_key_value_heads"] == config["num_attention_heads"]:
        del config["num_key_value_heads"]
    return config | {"pretraining_tp": 1}
