"""OLMo 2 (OLMo et al., 2024): a Llama without norms before its branches; their outputs are normalised instead.

    residual_pre --+-- q, k -- q_norm, k_norm -- rope --+-- attention -- o -- attn_norm --(+)-- residual_mid
                   +-- v -------------------------------'                                  |
                   '-----------------------------------------------------------------------'
    residual_mid --+-- act(gate) * up -- down -- mlp_norm --(+)-- residual_post
                   '-----------------------------------------'

``attn_out`` and ``mlp_out`` are what is added: the norms' outputs. Queries and keys are normalised over all heads at
once. Norms scale in fp32 and round once, and rope is in fp32 throughout. Does not know windows: those are OLMo 3's.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from . import llama
from .batch import Batch
from .contract import Keys, Tap, source
from .llama import HARMLESS, Norm
from .ops import ACTIVATIONS, attention, heads, mlp, rms_norm_late
from .rope import rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        config = cls.read(keys, mlp_bias=False, eps=keys.number("rms_norm_eps", 1e-5, least=0))
        keys.finish(HARMLESS)
        return config


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    q: Tensor = source("self_attn.q_proj.weight", "q_width", "hidden")
    k: Tensor = source("self_attn.k_proj.weight", "kv_width", "hidden")
    v: Tensor = source("self_attn.v_proj.weight", "kv_width", "hidden")
    o: Tensor = source("self_attn.o_proj.weight", "hidden", "q_width")
    q_bias: Tensor | None = source("self_attn.q_proj.bias", "q_width", when="attention_bias")
    k_bias: Tensor | None = source("self_attn.k_proj.bias", "kv_width", when="attention_bias")
    v_bias: Tensor | None = source("self_attn.v_proj.bias", "kv_width", when="attention_bias")
    o_bias: Tensor | None = source("self_attn.o_proj.bias", "hidden", when="attention_bias")
    q_norm: Tensor = source("self_attn.q_norm.weight", "q_width")
    k_norm: Tensor = source("self_attn.k_norm.weight", "kv_width")
    attn_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    gate: Tensor = source("mlp.gate_proj.weight", "mlp_width", "hidden")
    up: Tensor = source("mlp.up_proj.weight", "mlp_width", "hidden")
    down: Tensor = source("mlp.down_proj.weight", "hidden", "mlp_width")
    mlp_norm: Tensor = source("post_feedforward_layernorm.weight", "hidden")


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    q = tap("q", heads(rms_norm_late(linear(x, w.q, w.q_bias), w.q_norm, c.eps), c.head_dim))
    k = tap("k", heads(rms_norm_late(linear(x, w.k, w.k_bias), w.k_norm, c.eps), c.head_dim))
    v = tap("v", heads(linear(x, w.v, w.v_bias), c.head_dim))
    cos, sin = rotary(c.rope, batch, torch.float32)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    z = tap("z", attention(q, k, v, batch, tap, scale=c.head_dim**-0.5))
    a = rms_norm_late(linear(z.flatten(1), w.o, w.o_bias), w.attn_norm, c.eps)
    x = tap("residual_mid", x + tap("attn_out", a))

    def hidden(m: Tensor) -> Tensor:
        return ACTIVATIONS[c.act](linear(m, w.gate)).mul_(linear(m, w.up))

    m = mlp(x, batch, tap, hidden, lambda m: rms_norm_late(linear(m, w.down), w.mlp_norm, c.eps))
    return tap("residual_post", x + tap("mlp_out", m))


def final_norm(x: Tensor, w: Norm, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, hidden]``."""
    return rms_norm_late(x, w.weight, c.eps)


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="OLMo 2",
    model_types=("olmo2",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer,
    block=block,
    final_norm=final_norm,
    about="norms after the branches only, queries and keys normalised over all heads",
)
