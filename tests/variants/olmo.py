"""OLMo: clipped and not, biases, grouped queries, the defaults of old files.

HF clips the outputs of the projections in place, after its modules have shown them: q, k and v are seen through z.
"""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope
from torch import Tensor


def draw(name: str, like: Tensor, values: Tensor) -> Tensor | None:
    """Norms have no weights that could show an epsilon, so the stream is small."""
    return 0.05 * values if "embed_tokens" in name else None


CHECKS = {
    "olmo": Checks(
        config={
            "model_type": "olmo",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "clip_qkv": 1.5,
            "pad_token_id": 0,
            "eos_token_id": 1,
            **rope("default"),
        },
        points={
            "z": "self_attn.o_proj in",
            "attn_out": "self_attn out",
            "residual_mid": "post_attention_layernorm in",
            "mlp_hidden": "mlp.down_proj in",
            "mlp_out": "mlp out",
        },
        draw=draw,
    )
}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=LONGEST - 4)


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it, without the keys that have a default of their own."""
    assert config.pop("rope_parameters")["rope_theta"] == 10000.0
    defaults = ("num_key_value_heads", "max_position_embeddings", "attention_bias", "hidden_act", "clip_qkv")
    config = {key: value for key, value in config.items() if key not in defaults}
    return config | {"rope_scaling": None, "torch_dtype": config.pop("dtype"), "pretraining_tp": 1}


VARIANTS = {
    "olmo": Variant(family="olmo", shard="60KB"),
    "olmo_silent": Variant(
        family="olmo",
        config={"num_key_value_heads": 6, "clip_qkv": None} | rope("default", rope_theta=10000.0),
        legacy=silent,
        dtype=torch.bfloat16,
        head="tied",
    ),
    "olmo_biases": Variant(family="olmo", config={"attention_bias": True, "num_key_value_heads": 1, "clip_qkv": 1.0}),
    "olmo_yarn": Variant(family="olmo", config=YARN, dtype=torch.float16, head="tied", prefix=False),
    "olmo_gelu": Variant(family="olmo", config={"hidden_act": "gelu", "clip_qkv": 0.7}, head="other"),
    "olmo_head_dim": Variant(family="olmo", config={"head_dim": 14, "num_key_value_heads": None}),
}

FAULTS: list[tuple[str, str, str]] = [
    ("eps=1e-5", "eps=1e-6", "olmo_yarn"),
    (
        'v = tap("v", heads(clipped(linear(a, w.v, w.v_bias)), c.head_dim))',
        'v = tap("v", heads(linear(a, w.v, w.v_bias), c.head_dim))',
        "olmo",
    ),
    ("x.clamp_(-c.clip, c.clip)", "x.clamp_(max=c.clip)", "olmo_gelu"),
    (
        "return by_parts(lambda x: layer_norm(x.float(), None, None, c.eps).to(x.dtype), x)",
        "return llama.rms_norm(x, torch.ones_like(x[0]), c.eps)",
        "olmo_silent",
    ),
    ("rotary(c.rope, batch, torch.float32)", "rotary(c.rope, batch, x.dtype)", "olmo_silent"),
    ("linear(z.flatten(1), w.o, w.o_bias)", "linear(z.flatten(1), w.o)", "olmo_biases"),
    ("x if c.clip is None else", "x if c.clip else", "olmo_biases"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("olmo", {"layer_norm_eps": 1e-6}, "layer_norm_eps"),
    ("olmo", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ("olmo", {"clip_qkv": "much"}, "clip_qkv"),
    ("olmo", {"mlp_bias": True}, "mlp_bias"),
    ("olmo", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
]
