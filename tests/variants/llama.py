"""Llama: biases, grouped queries, ties, names, and every rope that transformers scales."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Draw, Tensors, Variant, rope

CHECKS = {
    "llama": Checks(
        config={
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "pad_token_id": 0,
            **rope("default"),
        },
        points={
            "q": "self_attn.q_proj out",
            "k": "self_attn.k_proj out",
            "v": "self_attn.v_proj out",
            "z": "self_attn.o_proj in",
            "attn_out": "self_attn out",
            "residual_mid": "post_attention_layernorm in",
            "mlp_hidden": "mlp.down_proj in",
            "mlp_out": "mlp out",
        },
    )
}


def buffers(config: dict[str, Any], draw: Draw) -> Tensors:
    """What old files hold and nobody reads."""
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": draw(5) for layer in layers}


def legacy(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it, without the keys that old files lack where their default is meant."""
    config["torch_dtype"] = config.pop("dtype")
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


GQA = {"num_key_value_heads": 2}
LLAMA3 = rope(
    "llama3", factor=4.0, low_freq_factor=0.5, high_freq_factor=2.0, original_max_position_embeddings=LONGEST - 4
)
YARN = {"factor": 4.0, "original_max_position_embeddings": LONGEST - 4, "beta_fast": 3.0, "beta_slow": 0.3}

VARIANTS = {
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
    "llama_legacy": Variant(config=rope("default", rope_theta=10000.0), legacy=legacy, extra=buffers),
    "llama_linear": Variant(config=GQA | rope("linear", factor=2.5)),
    "llama_linear_legacy": Variant(config=GQA | rope("linear", factor=2.5), legacy=legacy),
    "llama_dynamic": Variant(config=GQA | rope("dynamic", factor=2.0) | {"max_position_embeddings": LONGEST - 8}),
    "llama_llama3": Variant(config=GQA | LLAMA3),
    "llama_llama3_legacy": Variant(config=GQA | LLAMA3, legacy=legacy),
    "llama_yarn": Variant(config=GQA | rope("yarn", **YARN)),
    "llama_yarn_defaults": Variant(config=GQA | rope("yarn", factor=2.0)),
    "llama_yarn_attention_factor": Variant(config=GQA | rope("yarn", **YARN, attention_factor=1.3)),
    "llama_yarn_mscale": Variant(config=GQA | rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.4)),
    "llama_yarn_no_truncate": Variant(config=GQA | rope("yarn", **YARN, truncate=False)),
    "llama_yarn_null_factor": Variant(config=GQA | rope("yarn", **{**YARN, "factor": None})),
    "llama_gelu": Variant(config=GQA | {"hidden_act": "gelu"}),
    "llama_gelu_tanh": Variant(config=GQA | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama_swish": Variant(config=GQA | {"hidden_act": "swish"}),
}

FAULTS = [
    ('keys.number("rms_norm_eps", 1e-6, least=0)', "1e-5", "llama"),
    ("mul_(linear(m, w.up, w.up_bias))", "mul_(linear(m, w.up))", "llama_mlp_bias"),
    ("rms_norm(m, w.mlp_norm, c.eps)", "rms_norm(m, w.attn_norm, c.eps)", "llama_gqa"),
    ("scale=c.head_dim**-0.5", "scale=c.hidden**-0.5", "llama_head_dim"),
    ("linear(z.flatten(1), w.o, w.o_bias)", "linear(z.flatten(1), w.o)", "llama_attention_bias"),
    ('keys.size("num_key_value_heads", n_heads)', 'keys.size("num_key_value_heads", 2)', "llama_legacy"),
]
