"""Mixtral: two experts and one, windows, many experts of which some stay idle."""

from checkpoints import VOCAB, Checks, Variant, rope

CHECKS = {
    "mixtral": Checks(
        config={
            "model_type": "mixtral",
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "pad_token_id": 0,
            **rope("default"),
        },
        points={
            "attn_out": "self_attn out",
            "residual_mid": "post_attention_layernorm in",
            "router_logits": "mlp.gate out [0]",
            "expert_ids": "mlp.gate out [2]",
            "mlp_out": "mlp out",
        },
    )
}

VARIANTS = {
    "mixtral": Variant(family="mixtral"),
    "mixtral_one_of_many": Variant(family="mixtral", config={"num_local_experts": 16, "num_experts_per_tok": 1}),
    "mixtral_window": Variant(family="mixtral", config={"sliding_window": 7, "num_experts_per_tok": 4}),
}

REFUSED = [
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok"),
    ("mixtral", {"num_experts_per_tok": 6}, "choose 6 of 5 experts"),
]
FAULTS = [
    ("scores = scores / scores.sum(-1, keepdim=True)", "scores = scores / 1", "mixtral"),
    ("gate, up = F.linear", "up, gate = F.linear", "mixtral"),
    ('keys.optional("sliding_window")', "None", "mixtral_window"),
    ("F.softmax(logits, dim=-1, dtype=torch.float32)", "F.softmax(logits, dim=-1)", "mixtral"),
    ("m = rms_norm(x, w.mlp_norm, c.eps)", "m = rms_norm(x, w.attn_norm, c.eps)", "mixtral_one_of_many"),
]
