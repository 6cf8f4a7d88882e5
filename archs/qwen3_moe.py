"""Qwen 3 with experts (Yang et al., 2025): a Qwen 3 whose MLP is a mixture of experts, without a shared one.

    residual_mid --+-- mlp_norm -- router -- softmax -- top k -- experts -- sum --(+)-- residual_post
                   '---------------------------------------------------------------'

Routing is that of Qwen 2 MoE; published models renormalise the scores. Layers in ``mlp_only_layers``, or off the beat
of ``decoder_sparse_step``, are a Qwen 3's. A window, where one is used, is in every layer: transformers reads neither
``layer_types`` nor ``max_window_layers`` here, so configs that have them beside a window are refused.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from . import qwen3
from .batch import Batch
from .contract import ArchError, Experts, Keys, Tap, experts, source
from .ops import attention, heads, rms_norm
from .qwen2 import windows
from .qwen2_moe import HARMLESS, Expert, Sparse, hooks, mixture
from .rope import rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(Sparse, qwen3.Config):
    """The words of Qwen 3, and the experts."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        for key in ("layer_types", "max_window_layers"):
            if key in keys and keys.flag("use_sliding_window", False):
                raise ArchError(f"config.json: {key!r} is not supported by this family beside 'use_sliding_window'")
        for key, value in {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}.items():
            keys.only(key, value, value)
        config = cls.read(
            keys,
            kv_heads=keys.optional("num_key_value_heads", 4),
            sees=windows(keys, lambda layer: True),
            experts=keys.size("num_local_experts", keys.size("num_experts", 128)),
            chosen=keys.size("num_experts_per_tok", 8),
            expert_width=keys.size("moe_intermediate_size", 768),
        )
        keys.finish(HARMLESS | {"max_window_layers"})
        return config


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One with experts; the others are `qwen3.Layer`."""

    attn_norm: Tensor = source("input_layernorm.weight", "hidden")
    q: Tensor = source("self_attn.q_proj.weight", "q_width", "hidden")
    k: Tensor = source("self_attn.k_proj.weight", "kv_width", "hidden")
    v: Tensor = source("self_attn.v_proj.weight", "kv_width", "hidden")
    o: Tensor = source("self_attn.o_proj.weight", "hidden", "q_width")
    q_bias: Tensor | None = source("self_attn.q_proj.bias", "q_width", when="attention_bias")
    k_bias: Tensor | None = source("self_attn.k_proj.bias", "kv_width", when="attention_bias")
    v_bias: Tensor | None = source("self_attn.v_proj.bias", "kv_width", when="attention_bias")
    o_bias: Tensor | None = source("self_attn.o_proj.bias", "hidden", when="attention_bias")
    q_norm: Tensor = source("self_attn.q_norm.weight", "head_dim")
    k_norm: Tensor = source("self_attn.k_norm.weight", "head_dim")
    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    router: Tensor = source("mlp.gate.weight", "experts", "hidden")
    experts: Experts[Expert] = experts("mlp.experts.", Expert, "experts")


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Layer | qwen3.Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    return sparse(x, w, c, layer, batch, tap) if isinstance(w, Layer) else qwen3.block(x, w, c, layer, batch, tap)


def sparse(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    linear = batch.linear
    x = tap("residual_pre", x)

    a = rms_norm(x, w.attn_norm, c.eps)
    q = tap("q", rms_norm(heads(linear(a, w.q, w.q_bias), c.head_dim), w.q_norm, c.eps))
    k = tap("k", rms_norm(heads(linear(a, w.k, w.k_bias), c.head_dim), w.k_norm, c.eps))
    v = tap("v", heads(linear(a, w.v, w.v_bias), c.head_dim))
    cos, sin = rotary(c.rope, batch, x.dtype)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    z = tap("z", attention(q, k, v, batch, tap, scale=c.head_dim**-0.5, sees=c.sees[layer]))
    x = tap("residual_mid", x + tap("attn_out", linear(z.flatten(1), w.o, w.o_bias)))

    m = mixture(rms_norm(x, w.mlp_norm, c.eps), w.router, w.experts, c, batch, tap)
    return tap("residual_post", x + tap("mlp_out", m))


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    qwen3.FAMILY,
    name="Qwen 3 MoE",
    model_types=("qwen3_moe",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer if c.sparse[layer] else qwen3.Layer,
    block=block,
    hooks=hooks,
    activations=("mlp_width", "expert_width"),
    about="mixture of experts, renormalised or not; dense layers between, where the config has them",
)
