"""DeepSeek-V2: queries with a latent and without, groups of experts, yarn that also scales scores, old files."""

import dataclasses
from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

CHECKS = {
    "deepseek_v2": Checks(
        config={
            "model_type": "deepseek_v2",
            "vocab_size": VOCAB,
            "hidden_size": 56,
            "intermediate_size": 104,
            "moe_intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 12,
            "v_head_dim": 14,
            "n_routed_experts": 6,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
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
    )
}
GENERAL = CHECKS["deepseek_v2"]
CHECKS["deepseek_v2_lite"] = dataclasses.replace(
    GENERAL,
    config=GENERAL.config | {"q_lora_rank": None, "qk_rope_head_dim": 6, "num_attention_heads": 2, "v_head_dim": 24},
    points=GENERAL.points | {"q": "self_attn.q_proj out"},
)
CHECKS["deepseek_v2_sparse"] = dataclasses.replace(
    GENERAL,
    config=GENERAL.config | {"first_k_dense_replace": 0},
    points={hook: point for hook, point in GENERAL.points.items() if hook != "mlp_hidden"},
)
YARN = {"factor": 4.0, "original_max_position_embeddings": LONGEST - 4, "beta_fast": 3.0, "beta_slow": 0.3}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "n_routed_experts": 16}


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As the model's own code wrote it."""
    scaling = config.pop("rope_parameters")
    own = {"rope_theta": scaling.pop("rope_theta"), "torch_dtype": config.pop("dtype"), "ep_size": 1, "seq_aux": True}
    scaling["type"] = scaling.pop("rope_type")
    own |= {"moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": False, "aux_loss_alpha": 0.001}
    for key in ("head_dim", "qk_head_dim", "mlp_bias"):
        config.pop(key, None)
    return config | own | {"rope_scaling": scaling, "pretraining_tp": 1}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    ranks = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim")
    counts = ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "topk_method")
    others = ("num_key_value_heads", "rms_norm_eps", "rope_parameters", "routed_scaling_factor", "qk_head_dim")
    return {key: value for key, value in config.items() if key not in (*ranks, *counts, *others)}


VARIANTS = {
    "deepseek_v2": Variant(family="deepseek_v2", shard="60KB"),
    "deepseek_v2_lite": Variant(
        family="deepseek_v2_lite",
        config=rope("yarn", **YARN, mscale=0.707, mscale_all_dim=0.707),
        legacy=published,
        dtype=torch.bfloat16,
    ),
    "deepseek_v2_groups": Variant(
        family="deepseek_v2",
        config=GROUPS
        | {"num_experts_per_tok": 6, "routed_scaling_factor": 16.0, "n_shared_experts": 1}
        | rope("yarn", **YARN, mscale=0.9, mscale_all_dim=0.5),
        legacy=published,
    ),
    "deepseek_v2_one_group": Variant(
        family="deepseek_v2",
        config=GROUPS | {"topk_group": 1, "num_hidden_layers": 4, "first_k_dense_replace": 3},
        head="other",
        dtype=torch.float16,
    ),
    "deepseek_v2_biases": Variant(
        family="deepseek_v2", config={"attention_bias": True, "mlp_bias": True}, head="tied", prefix=False
    ),
    "deepseek_v2_lite_bias": Variant(
        family="deepseek_v2_lite",
        config={"attention_bias": True, "qk_nope_head_dim": 18} | rope("linear", factor=2.5),
        gain=2.0,
    ),
    "deepseek_v2_silent": Variant(
        family="deepseek_v2_sparse",
        config={"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "num_experts_per_tok": 6}
        | {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        | {"v_head_dim": 128, "n_routed_experts": 64, "moe_intermediate_size": 48, "routed_scaling_factor": 1.0}
        | {"rms_norm_eps": 1e-6, "rope_parameters": None},
        legacy=silent,
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("LATENT_EPS = 1e-6", "LATENT_EPS = 1e-3", "deepseek_v2"),
    ("float(width**-0.5 * grown * grown)", "float(width**-0.5 * grown)", "deepseek_v2_lite"),
    ('"mscale_all_dim", 0.0', '"mscale", 0.0', "deepseek_v2_groups"),
    ("scores * c.score_factor, w", "scores, w", "deepseek_v2_groups"),
    ("0.0).topk(c.chosen, dim=-1, sorted=False)", "0.0).topk(c.chosen, dim=-1)", "deepseek_v2_groups"),
    ("(groups own) -> rows groups own", "(own groups) -> rows groups own", "deepseek_v2_groups"),
    (".amax(-1)", ".sum(-1)", "deepseek_v2_one_group"),
    ("lambda c, layer: Dense if layer <", "lambda c, layer: Dense if layer <=", "deepseek_v2_one_group"),
    ("else sparse_hooks", "else dense_hooks(c.mlp_width) or sparse_hooks", "deepseek_v2"),
    ("[c.content_dim, c.value_dim], dim=-1)", "[c.value_dim, c.content_dim], dim=-1)", "deepseek_v2_lite_bias"),
    ('keys.optional("q_lora_rank", 1536)', 'keys.get("q_lora_rank")', "deepseek_v2_silent"),
    (" + batch.rows(lambda tile: out(hidden(tile)), m)", "", "deepseek_v2"),
    ("linear(a, w.kv_a, w.kv_a_bias)", "linear(a, w.kv_a)", "deepseek_v2_lite_bias"),
    ("linear(m, w.down, w.down_bias)", "linear(m, w.down)", "deepseek_v2_biases"),
    ('keys.number("routed_scaling_factor", 1.0)', 'keys.number("routed_scaling_factor", 16.0)', "deepseek_v2_silent"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, "n_group"),
]
