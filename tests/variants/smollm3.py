"""SmolLM3: layers without rope by list and by interval, windows that are used and not, and a silent config."""

from typing import Any

import torch
from checkpoints import LONGEST, VOCAB, Checks, Variant, rope

FULL, LOCAL = "full_attention", "sliding_attention"

CHECKS = {
    "smollm3": Checks(
        config={
            "model_type": "smollm3",
            "vocab_size": VOCAB,
            "hidden_size": 60,
            "intermediate_size": 101,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "no_rope_layer_interval": 2,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
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
WINDOW = {"use_sliding_window": True, "sliding_window": 7}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=LONGEST - 4)


def published(config: dict[str, Any]) -> dict[str, Any]:
    """As the hub has it: a list for more layers than there are, a window that is not used, rope in the old words."""
    scaling = config.pop("rope_parameters")
    own = {"rope_theta": scaling["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    del config["tie_word_embeddings"], config["layer_types"]
    return config | own | {"no_rope_layers": [1, 0, 0, 1, 0, 1], "max_window_layers": 28, "pretraining_tp": 2}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have a default of their own."""
    defaults = {"num_key_value_heads", "max_position_embeddings", "no_rope_layers", "no_rope_layer_interval"}
    defaults |= {"layer_types", "hidden_act", "rms_norm_eps", "tie_word_embeddings"}
    del config["rope_parameters"]["rope_theta"], config["rope_parameters"]["original_max_position_embeddings"]
    return {key: value for key, value in config.items() if key not in defaults}


def untyped(config: dict[str, Any]) -> dict[str, Any]:
    """With the layers' kinds left to the rules."""
    return {key: value for key, value in config.items() if key not in ("layer_types", "no_rope_layers")}


VARIANTS = {
    "smollm3": Variant(family="smollm3"),
    "smollm3_published": Variant(
        family="smollm3",
        config={"num_hidden_layers": 4, "no_rope_layers": [1, 0, 0, 1], "sliding_window": 5},
        head="tied",
        dtype=torch.bfloat16,
        legacy=published,
    ),
    "smollm3_silent": Variant(
        family="smollm3",
        config={"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 128}
        | {"no_rope_layer_interval": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
        | rope("yarn", rope_theta=2e6, factor=2.0, beta_slow=1000),
        head="tied",
        legacy=silent,
    ),
    "smollm3_window": Variant(family="smollm3", config=WINDOW, shard="60KB", legacy=untyped),
    "smollm3_layer_types": Variant(
        family="smollm3",
        config=WINDOW | {"layer_types": [LOCAL, FULL, FULL], "num_key_value_heads": None, "no_rope_layers": [1, 1, 0]},
        dtype=torch.float16,
    ),
    "smollm3_bias": Variant(
        family="smollm3",
        config=YARN | {"attention_bias": True, "mlp_bias": True, "head_dim": 14, "hidden_act": "gelu"},
        head="other",
        prefix=False,
    ),
}

FAULTS: list[tuple[str, str, str]] = [
    ("(layer + 1) % interval != 0", "layer % interval != 0", "smollm3_window"),
    ("tuple(map(bool, listed[:layers]))", "tuple(map(bool, listed[-layers:]))", "smollm3_published"),
    ("if c.rotates[layer]:", "if not c.rotates[layer]:", "smollm3_published"),
    ('keys.size("no_rope_layer_interval", 4)', 'keys.size("no_rope_layer_interval", 3)', "smollm3_silent"),
    ('"max_position_embeddings", 32768), 2e6', '"max_position_embeddings", 2048), 2e6', "smollm3_silent"),
    (", 2e6)", ", 1e4)", "smollm3_silent"),
    ('keys.optional("num_key_value_heads", 4)', 'keys.optional("num_key_value_heads", 2)', "smollm3_silent"),
    ('keys.flag("tie_word_embeddings", True)', 'keys.flag("tie_word_embeddings", False)', "smollm3_published"),
    ("if window and not rotates[layer]", "if window and rotates[layer]", "smollm3_window"),
    ("size if keys.flag(", "size if not keys.flag(", "smollm3_published"),
    ("linear(m, w.up, w.up_bias)", "linear(m, w.up)", "smollm3_bias"),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("smollm3", {"no_rope_layers": ["rope", "nope", "rope"]}, "no_rope_layers"),
    ("smollm3", {"layer_types": [FULL, LOCAL, FULL]}, "use_sliding_window"),
    ("smollm3", WINDOW | {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ("smollm3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
]
