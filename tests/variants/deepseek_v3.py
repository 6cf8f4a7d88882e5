"""DeepSeek-V3: a correction that changes who is chosen, groups and none, both layouts of rope, a layer to ignore."""

import dataclasses
from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Draw, Tensors, Variant, rope
from torch import Tensor


def draw(name: str, like: Tensor, values: Tensor) -> Tensor | None:
    """Of the size of scores' differences; the files hold it in fp32, and rounding it would be seen."""
    return 0.3 * values if name.endswith("e_score_correction_bias") else None


CHECKS = {
    "deepseek_v3": Checks(
        config={
            "model_type": "deepseek_v3",
            "vocab_size": VOCAB,
            "hidden_size": 56,
            "intermediate_size": 104,
            "moe_intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 12,
            "v_head_dim": 14,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.7,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "pad_token_id": 0,
            **rope("default"),
        },
        points={
            "q": "self_attn.q_b_proj out",
            "z": "self_attn.o_proj in",
            "attn_out": "self_attn out",
            "residual_mid": "post_attention_layernorm in",
            "mlp_hidden": "mlp.down_proj in",
            "router_logits": "mlp.gate out [0]",
            "expert_ids": "mlp.gate out [2]",
            "mlp_out": "mlp out",
        },
        fused=r"q_proj|q_b_proj|kv_b_proj",
        draw=draw,
    )
}
GENERAL = CHECKS["deepseek_v3"]
CHECKS["deepseek_v3_moonlight"] = dataclasses.replace(
    GENERAL,
    config=GENERAL.config
    | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "qk_rope_head_dim": 6},
    points=GENERAL.points | {"q": "self_attn.q_proj out"},
)
YARN = {"factor": 4.0, "original_max_position_embeddings": LONGEST - 4, "beta_fast": 3.0, "beta_slow": 0.3}


def prediction(config: dict[str, Any], draw: Draw) -> Tensors:
    """Some of the layer for multi-token prediction, as files hold it behind the last one."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    return {
        f"model.layers.{layers}.eh_proj.weight": draw(hidden, 2 * hidden),
        f"model.layers.{layers}.enorm.weight": draw(hidden),
        f"model.layers.{layers}.self_attn.kv_a_layernorm.weight": draw(config["kv_lora_rank"]),
        f"model.layers.{layers}.mlp.gate.e_score_correction_bias": draw(config["n_routed_experts"]),
        f"model.layers.{layers}.mlp.experts.0.down_proj.weight": draw(hidden, config["moe_intermediate_size"]),
    }


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As the model's own code wrote it."""
    scaling = config.pop("rope_parameters")
    own = {"rope_theta": scaling.pop("rope_theta"), "torch_dtype": config.pop("dtype"), "ep_size": 1, "seq_aux": True}
    scaling["type"] = scaling.pop("rope_type")
    own |= {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "aux_loss_alpha": 0.001}
    for key in ("head_dim", "qk_head_dim", "rope_interleave"):
        config.pop(key, None)
    scaling = None if scaling["type"] == "default" else scaling
    return config | own | {"rope_scaling": scaling, "num_nextn_predict_layers": 1}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    ranks = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim")
    counts = ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "n_group")
    scores = ("topk_group", "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "rope_interleave")
    others = ("rms_norm_eps", "rope_parameters", "qk_head_dim")
    return {key: value for key, value in config.items() if key not in (*ranks, *counts, *scores, *others)}


VARIANTS = {
    "deepseek_v3": Variant(family="deepseek_v3", shard="60KB"),
    "deepseek_v3_published": Variant(
        family="deepseek_v3",
        config=rope("yarn", **YARN, mscale=1.0, mscale_all_dim=1.0),
        legacy=published,
        extra=prediction,
    ),
    "deepseek_v3_moonlight": Variant(family="deepseek_v3_moonlight", legacy=published, dtype=torch.bfloat16),
    "deepseek_v3_halves": Variant(
        family="deepseek_v3",
        config={"rope_interleave": False, "attention_bias": True, "num_hidden_layers": 4, "first_k_dense_replace": 2},
        head="tied",
        prefix=False,
    ),
    "deepseek_v3_plain": Variant(
        family="deepseek_v3_moonlight",
        config={"norm_topk_prob": False, "num_experts_per_tok": 6, "qk_nope_head_dim": 18, "v_head_dim": 24},
        dtype=torch.float16,
        gain=2.0,
        head="other",
    ),
    "deepseek_v3_silent": Variant(
        family="deepseek_v3",
        config={"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 4}
        | {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        | {"v_head_dim": 128, "n_routed_experts": 256, "moe_intermediate_size": 24, "routed_scaling_factor": 2.5}
        | {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3}
        | {"rms_norm_eps": 1e-6, "rope_parameters": None},
        legacy=silent,
        dtype=torch.bfloat16,
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("scores + w.correction", "scores", "deepseek_v3"),
    ("scores.gather(1, ids)", "corrected.gather(1, ids)", "deepseek_v3_plain"),
    ("+ 1e-20)", "+ 1e-2)", "deepseek_v3_published"),
    (".topk(2, dim=-1)[0].sum(-1)", ".amax(-1)", "deepseek_v3"),
    ("-torch.inf).topk", "0.0).topk", "deepseek_v3_halves"),
    ("weights * c.score_factor", "weights", "deepseek_v3"),
    ("if c.renormalised:", "if not c.renormalised:", "deepseek_v3_plain"),
    ("if c.interleaved:", "if not c.interleaved:", "deepseek_v3_halves"),
    ("(two pairs)", "(pairs two)", "deepseek_v3_moonlight"),
    ('"norm_topk_prob", True', '"norm_topk_prob", False', "deepseek_v3_silent"),
    ('"first_k_dense_replace", 3', '"first_k_dense_replace", 0', "deepseek_v3_silent"),
    ('keys.size("topk_group", 4)', 'keys.size("topk_group", 3)', "deepseek_v3_silent"),
    ('ignored=(r"layers\\.{layers}\\..*",)', "ignored=()", "deepseek_v3_published"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("deepseek_v3", {"n_group": 3}, "n_group"),
    ("deepseek_v3", {"n_routed_experts": 4, "n_group": 4, "topk_group": 2}, "'n_group' 4 leaves fewer than two"),
    ("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads"),
    ("deepseek_v3", {"mlp_bias": True}, "mlp_bias"),
]
