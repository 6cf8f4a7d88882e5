"""GPT-2: its five ways to scale scores, its activations, and files of every age."""

import math
from typing import Any

import torch
from checkpoints import VOCAB, Checks, Draw, Tensors, Variant
from torch import Tensor


def draw(name: str, like: Tensor, values: Tensor) -> Tensor | None:
    """Matrices are stored ``[in, out]``."""
    return (
        values / math.sqrt(like.shape[0]) if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")) else None
    )


CHECKS = {
    "gpt2": Checks(
        config={
            "model_type": "gpt2",
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
        root="transformer.",
        embedding="wte.weight",
        layers="transformer.h",
        norm="transformer.ln_f",
        points={
            "q": "attn.c_attn out 0/3",
            "k": "attn.c_attn out 1/3",
            "v": "attn.c_attn out 2/3",
            "q_rot": "attn.c_attn out 0/3",
            "k_rot": "attn.c_attn out 1/3",
            "z": "attn.c_proj in",
            "attn_out": "attn out",
            "residual_mid": "ln_2 in",
            "mlp_hidden": "mlp.c_proj in",
            "mlp_out": "mlp out",
        },
        draw=draw,
    )
}


def buffers(config: dict[str, Any], draw: Draw) -> Tensors:
    """What old files hold and nobody reads."""
    side = config["n_positions"]
    masks = {f"transformer.h.{layer}.attn.bias": draw(1, 1, side, side) for layer in range(config["n_layer"])}
    return masks | {f"transformer.h.{layer}.attn.masked_bias": draw(3) for layer in range(config["n_layer"])}


def legacy(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    config["torch_dtype"] = config.pop("dtype")
    return config | {"n_ctx": config["n_positions"], "gradient_checkpointing": False}


VARIANTS = {
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
    "gpt2_no_prefix": Variant(family="gpt2", head="tied", prefix=False, extra=buffers, legacy=legacy),
    "gpt2_buffers": Variant(family="gpt2", head="tied", extra=buffers, shard="60KB"),
    "gpt2_other_head": Variant(family="gpt2", head="other"),
    "gpt2_gelu": Variant(family="gpt2", config={"activation_function": "gelu"}, head="tied"),
    "gpt2_gelu_tanh": Variant(family="gpt2", config={"activation_function": "gelu_pytorch_tanh"}, head="tied"),
    "gpt2_relu": Variant(family="gpt2", config={"activation_function": "relu"}, head="tied"),
}

FAULTS = [
    ("q, k, v = (heads(part", "q, v, k = (heads(part", "gpt2"),
    ('keys.number("layer_norm_epsilon", 1e-5, least=0)', "1e-5", "gpt2_untied"),
    ("scale / float(layer + 1)", "scale / float(layer + 2)", "gpt2_by_layer"),
    ("F.embedding(batch.positions, w.positions)", "F.embedding(batch.positions + 1, w.positions)", "gpt2_relu"),
    (
        "return F.softmax(torch.matmul(q, k.transpose(2, 3)) * scale + mask, dim=-1)",
        "return F.softmax(torch.matmul(q, k.transpose(2, 3)) * scale + mask, dim=-1, dtype=torch.float32).to(q.dtype)",
        "gpt2_n_inner",
    ),
    ('keys.size("n_inner", 4 * hidden)', "4 * hidden", "gpt2_n_inner"),
]
