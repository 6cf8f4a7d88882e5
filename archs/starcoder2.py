"""StarCoder 2 (Lozhkov et al., 2024): LayerNorm, biases, an ungated MLP, grouped queries, rope, a sliding window.

    residual_pre --+-- attn_norm -- q, k, v -- rope -- attention -- o --(+)-- residual_mid
                   '-----------------------------------------------------'
    residual_mid --+-- mlp_norm -- up -- act -- down --(+)-- residual_post
                   '------------------------------------'

All layers have the same window, none if it is null or absent. Does not know caches or generation.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from . import llama
from .batch import Batch
from .contract import Keys, Tap, source
from .ops import ACTIVATIONS, Sees, attention, heads, layer_norm, mlp
from .rope import Rope, rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words, and the window; ``attention_bias`` and ``mlp_bias`` are one."""

    sees: Sees

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        head_dim = keys.size("head_dim", keys.size("hidden_size") // keys.size("num_attention_heads"))
        bias = keys.flag("use_bias", True)
        keys.only("mlp_type", "default", "default")
        keys.only("norm_type", "layer_norm", "layer_norm")
        config = cls.read(
            keys,
            kv_heads=keys.size("num_key_value_heads", 2),
            act=keys.choice("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS),
            eps=keys.number("norm_epsilon", 1e-5, least=0),
            rope=Rope.from_hf(keys, head_dim, keys.size("max_position_embeddings", 4096)),
            attention_bias=bias,
            mlp_bias=bias,
            tied=keys.flag("tie_word_embeddings", True),
            sees=Sees(window=keys.optional("sliding_window")),
        )
        keys.finish(HARMLESS)
        return config


HARMLESS = llama.HARMLESS | {"embedding_dropout", "residual_dropout"}

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor = source("input_layernorm.weight", "hidden")
    attn_norm_bias: Tensor = source("input_layernorm.bias", "hidden")
    q: Tensor = source("self_attn.q_proj.weight", "q_width", "hidden")
    k: Tensor = source("self_attn.k_proj.weight", "kv_width", "hidden")
    v: Tensor = source("self_attn.v_proj.weight", "kv_width", "hidden")
    o: Tensor = source("self_attn.o_proj.weight", "hidden", "q_width")
    q_bias: Tensor | None = source("self_attn.q_proj.bias", "q_width", when="attention_bias")
    k_bias: Tensor | None = source("self_attn.k_proj.bias", "kv_width", when="attention_bias")
    v_bias: Tensor | None = source("self_attn.v_proj.bias", "kv_width", when="attention_bias")
    o_bias: Tensor | None = source("self_attn.o_proj.bias", "hidden", when="attention_bias")
    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    mlp_norm_bias: Tensor = source("post_attention_layernorm.bias", "hidden")
    up: Tensor = source("mlp.c_fc.weight", "mlp_width", "hidden")
    down: Tensor = source("mlp.c_proj.weight", "hidden", "mlp_width")
    up_bias: Tensor | None = source("mlp.c_fc.bias", "mlp_width", when="mlp_bias")
    down_bias: Tensor | None = source("mlp.c_proj.bias", "hidden", when="mlp_bias")


@dataclass(frozen=True)
class Norm(llama.Norm):
    bias: Tensor = source("norm.bias", "hidden")


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    a = layer_norm(x, w.attn_norm, w.attn_norm_bias, c.eps)
    q = tap("q", heads(linear(a, w.q, w.q_bias), c.head_dim))
    k = tap("k", heads(linear(a, w.k, w.k_bias), c.head_dim))
    v = tap("v", heads(linear(a, w.v, w.v_bias), c.head_dim))
    cos, sin = rotary(c.rope, batch, x.dtype)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    z = tap("z", attention(q, k, v, batch, tap, scale=c.head_dim**-0.5, sees=c.sees))
    x = tap("residual_mid", x + tap("attn_out", linear(z.flatten(1), w.o, w.o_bias)))

    def hidden(m: Tensor) -> Tensor:
        m = layer_norm(m, w.mlp_norm, w.mlp_norm_bias, c.eps)
        return ACTIVATIONS[c.act](linear(m, w.up, w.up_bias))

    m = mlp(x, batch, tap, hidden, lambda m: linear(m, w.down, w.down_bias))
    return tap("residual_post", x + tap("mlp_out", m))


def final_norm(x: Tensor, w: Norm, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, hidden]``."""
    return layer_norm(x, w.weight, w.bias, c.eps)


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="StarCoder 2",
    model_types=("starcoder2",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer,
    norm_weights=Norm,
    block=block,
    final_norm=final_norm,
    about="LayerNorm, biases, an ungated MLP, a sliding window",
)
