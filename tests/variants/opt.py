"""OPT: norms before and after the additions, words narrower than layers, no biases, files of every age."""

from dataclasses import replace
from typing import Any

import torch
from checkpoints import VOCAB, Checks, Draw, Tensors, Variant

CONFIG = {
    "model_type": "opt",
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "ffn_dim": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
POINTS = {
    "q": "self_attn.q_proj out",
    "k": "self_attn.k_proj out",
    "v": "self_attn.v_proj out",
    "z": "self_attn.out_proj in",
    "attn_out": "self_attn out",
    "residual_mid": "final_layer_norm in",
    "mlp_hidden": "fc2 in",
    "mlp_out": "fc2 out",
}
OPT = Checks(
    config=CONFIG,
    root="model.decoder.",
    layers="model.decoder.layers",
    norm="model.decoder.final_layer_norm",
    points=POINTS,
)
CHECKS = {
    "opt": OPT,
    "opt_350m": replace(
        OPT,
        config=CONFIG | {"do_layer_norm_before": False, "word_embed_proj_dim": 36},
        norm="model.decoder.project_out",
        points=POINTS | {"residual_mid": "self_attn_layer_norm out"},
        sums=None,
    ),
    "opt_no_final_norm": replace(OPT, config=CONFIG | {"_remove_final_layer_norm": True}, norm=None),
}


def base_model(tensors: Tensors) -> Tensors:
    """As saved from the model without a head."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def version(config: dict[str, Any], draw: Draw) -> Tensors:
    """What old files hold and nobody reads."""
    return {"model.decoder.version": draw(1)}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it: some keys more, and absent ones where a default is meant."""
    config["torch_dtype"] = config.pop("dtype")
    for key in ("tie_word_embeddings", "enable_bias", "layer_norm_elementwise_affine", "do_layer_norm_before"):
        if config[key]:
            del config[key]
    return config | {"activation_dropout": 0.0, "learned_embeddings": True, "scale_embeddings": False, "prefix": "</s>"}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    meant = ("num_attention_heads", "ffn_dim", "activation_function", "max_position_embeddings", "word_embed_proj_dim")
    return published({key: value for key, value in config.items() if key not in meant})


VARIANTS = {
    "opt": Variant(family="opt", head="tied", shard="60KB"),
    "opt_base_model": Variant(
        family="opt", head="tied", extra=version, rename=base_model, legacy=published, dtype=torch.float16
    ),
    "opt_350m": Variant(family="opt_350m", head="tied", legacy=published, extra=version, shard="60KB"),
    "opt_350m_base_model": Variant(
        family="opt_350m", config={"word_embed_proj_dim": 72}, head="tied", rename=base_model, dtype=torch.float16
    ),
    "opt_galactica": Variant(
        family="opt", config={"enable_bias": False, "activation_function": "gelu"}, head="tied", legacy=published
    ),
    "opt_plain_norms": Variant(family="opt", config={"layer_norm_elementwise_affine": False}, head="other"),
    "opt_no_final_norm": Variant(family="opt_no_final_norm", config={"tie_word_embeddings": False}),
    "opt_silent": Variant(
        family="opt",
        config={"num_attention_heads": 12, "ffn_dim": 3072, "max_position_embeddings": 2048, "num_hidden_layers": 1},
        head="tied",
        legacy=silent,
        dtype=torch.bfloat16,
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("EPS = 1e-5", "EPS = 1e-6", "opt"),
    ("UNUSED = 2", "UNUSED = 1", "opt_base_model"),
    ("softmax_probabilities(q * scale, k, mask, 1.0)", "softmax_probabilities(q, k, mask, scale)", "opt_galactica"),
    ("sdpa(q * scale, k, v, mask, 1.0)", "sdpa(q, k, v, mask, scale)", "opt_350m"),
    ("norm(x + attend(x, w, c, batch, tap), w.attn", "x + norm(attend(x, w, c, batch, tap), w.attn", "opt_350m"),
    ("feed(norm(x, w.mlp_norm, w.mlp_norm_bias)", "feed(norm(x, w.mlp_norm, w.attn_norm_bias)", "opt"),
    ("linear(a, w.k, w.k_bias)", "linear(a, w.k)", "opt"),
    ("norm_before and not removed", "norm_before", "opt_no_final_norm"),
    ('"activation_function", "relu"', '"activation_function", "gelu"', "opt_silent"),
    ('keys.size("ffn_dim", 3072)', 'keys.size("ffn_dim", 4 * hidden)', "opt_silent"),
    ("x if w.narrow is None else", "x if w.narrow is None or c.tied else", "opt_350m_base_model"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("opt", {"num_attention_heads": 7}, "num_attention_heads"),
    ("opt", {"activation_function": "tanh"}, "activation_function"),
    ("opt", {"scale_embeddings": True}, "scale_embeddings"),
    ("opt", {"learned_embeddings": False}, "learned_embeddings"),
    ("opt", {"is_encoder_decoder": True}, "is_encoder_decoder"),
]
