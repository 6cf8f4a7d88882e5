"""GLM-4-0414 (GLM team, 2024 and 2025), 9B and 32B: norms on both sides of each branch, rope on pairs of half a head.

    residual_pre --+-- attn_norm -- q, k, v -- rope -- attention -- o -- attn_post_norm --(+)-- residual_mid
                   '-----------------------------------------------------------------------'
    residual_mid --+-- mlp_norm -- up * act(gate) -- down -- mlp_post_norm --(+)-- residual_post
                   '----------------------------------------------------------'

``attn_out`` and ``mlp_out`` are what comes out of the post-norms. The MLP's input norm is stored under the name
``post_attention_layernorm``, which elsewhere is a post-norm's. Gate and up are one projection, gate first. Rope turns
neighbouring dimensions, by default those of the first half of a head. Queries, keys and values have biases unless the
config says no; the output never has one. Does not know GLM-4-9B of 2024 (``model_type`` glm), images or experts.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from . import llama
from .batch import Batch
from .contract import Keys, Tap, source
from .ops import ACTIVATIONS, attention, heads, joined_probabilities, joined_sdpa, mlp, rms_norm
from .rope import Rope, rotary, rotate_pairs

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        head_dim = keys.size("head_dim", 128)
        config = cls.read(
            keys,
            head_dim=head_dim,
            kv_heads=keys.size("num_key_value_heads", 2),
            eps=keys.number("rms_norm_eps", 1.5625e-7, least=0),
            rope=Rope.from_hf(keys, head_dim, keys.size("max_position_embeddings", 131072), partial=0.5),
            attention_bias=keys.flag("attention_bias", True),
            mlp_bias=False,
        )
        keys.finish(llama.HARMLESS)
        return config

    @property
    def gate_up_width(self) -> int:
        return 2 * self.mlp_width


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor = source("input_layernorm.weight", "hidden")
    q: Tensor = source("self_attn.q_proj.weight", "q_width", "hidden")
    k: Tensor = source("self_attn.k_proj.weight", "kv_width", "hidden")
    v: Tensor = source("self_attn.v_proj.weight", "kv_width", "hidden")
    o: Tensor = source("self_attn.o_proj.weight", "hidden", "q_width")
    q_bias: Tensor | None = source("self_attn.q_proj.bias", "q_width", when="attention_bias")
    k_bias: Tensor | None = source("self_attn.k_proj.bias", "kv_width", when="attention_bias")
    v_bias: Tensor | None = source("self_attn.v_proj.bias", "kv_width", when="attention_bias")
    attn_post_norm: Tensor = source("post_self_attn_layernorm.weight", "hidden")
    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    gate_up: Tensor = source("mlp.gate_up_proj.weight", "gate_up_width", "hidden")
    down: Tensor = source("mlp.down_proj.weight", "hidden", "mlp_width")
    mlp_post_norm: Tensor = source("post_mlp_layernorm.weight", "hidden")


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    a = rms_norm(x, w.attn_norm, c.eps)
    q = tap("q", heads(linear(a, w.q, w.q_bias), c.head_dim))
    k = tap("k", heads(linear(a, w.k, w.k_bias), c.head_dim))
    v = tap("v", heads(linear(a, w.v, w.v_bias), c.head_dim))
    cos, sin = rotary(c.rope, batch, x.dtype)
    q, k = tap("q_rot", rotate_pairs(q, cos, sin)), tap("k_rot", rotate_pairs(k, cos, sin))
    z = attention(q, k, v, batch, tap, scale=c.head_dim**-0.5, eager=joined_probabilities, sdpa=joined_sdpa)
    a = rms_norm(linear(tap("z", z).flatten(1), w.o), w.attn_post_norm, c.eps)
    x = tap("residual_mid", x + tap("attn_out", a))

    def hidden(m: Tensor) -> Tensor:
        gate, up = linear(rms_norm(m, w.mlp_norm, c.eps), w.gate_up).chunk(2, dim=-1)
        return ACTIVATIONS[c.act](gate).mul_(up)

    m = mlp(x, batch, tap, hidden, lambda m: rms_norm(linear(m, w.down), w.mlp_post_norm, c.eps))
    return tap("residual_post", x + tap("mlp_out", m))


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="GLM 4",
    model_types=("glm4",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer,
    block=block,
    about="post-norms, rope on pairs of half a head, fused gate and up",
    ignored=(),
)
