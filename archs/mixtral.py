"""Mixtral (Jiang et al., 2024): a Mistral whose MLP is a mixture of experts, the best two of eight for each token.

    residual_mid --+-- mlp_norm -- router -- softmax -- top k -- renormalised -- experts -- sum --(+)-- residual_post
                   '-----------------------------------------------------------------------------'

``mlp_out`` is the sum over experts. Does not know the router's jitter, which is for training.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from . import llama
from .batch import Batch
from .contract import Experts, Keys, Shape, Tap, experts, layer_hooks, source, sparse_hooks
from .ops import ACTIVATIONS, EXPERT_ACTIVATIONS, Sees, attention, heads, rms_norm, routed
from .rope import rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words, the window, and the experts."""

    sees: Sees
    experts: int
    chosen: int

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        config = cls.read(
            keys,
            kv_heads=keys.optional("num_key_value_heads", 8),
            attention_bias=False,
            mlp_bias=False,
            act=keys.choice("hidden_act", "silu", EXPERT_ACTIVATIONS),
            sees=Sees(window=keys.optional("sliding_window")),
            experts=keys.size("num_local_experts", 8),
            chosen=keys.size("num_experts_per_tok", 2),
        )
        keys.finish(llama.HARMLESS | {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})
        return config


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expert:
    gate_up: Tensor = source(("{e}.w1.weight", "{e}.w3.weight"), "mlp_width", "hidden")
    down: Tensor = source("{e}.w2.weight", "hidden", "mlp_width")


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor = source("input_layernorm.weight", "hidden")
    q: Tensor = source("self_attn.q_proj.weight", "q_width", "hidden")
    k: Tensor = source("self_attn.k_proj.weight", "kv_width", "hidden")
    v: Tensor = source("self_attn.v_proj.weight", "kv_width", "hidden")
    o: Tensor = source("self_attn.o_proj.weight", "hidden", "q_width")
    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    router: Tensor = source("block_sparse_moe.gate.weight", "experts", "hidden")
    experts: Experts[Expert] = experts("block_sparse_moe.experts.", Expert, "experts")


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    a = rms_norm(x, w.attn_norm, c.eps)
    q = tap("q", heads(linear(a, w.q), c.head_dim))
    k = tap("k", heads(linear(a, w.k), c.head_dim))
    v = tap("v", heads(linear(a, w.v), c.head_dim))
    cos, sin = rotary(c.rope, batch, x.dtype)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    z = tap("z", attention(q, k, v, batch, tap, scale=c.head_dim**-0.5, sees=c.sees))
    x = tap("residual_mid", x + tap("attn_out", linear(z.flatten(1), w.o)))

    m = rms_norm(x, w.mlp_norm, c.eps)
    logits = tap("router_logits", linear(m, w.router))
    scores, ids = F.softmax(logits, dim=-1, dtype=torch.float32).topk(c.chosen, dim=-1)
    scores = scores / scores.sum(-1, keepdim=True)

    def expert(e: Expert, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, e.gate_up).chunk(2, dim=-1)
        return F.linear(ACTIVATIONS[c.act](gate) * up, e.down)

    m = routed(m, tap("expert_ids", ids), scores, w.experts, batch, expert)
    return tap("residual_post", x + tap("mlp_out", m))


def hooks(c: Config, layer: int) -> dict[str, Shape]:
    """Shape behind the rows at every hook of a layer."""
    return layer_hooks(
        hidden=c.hidden, heads=c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim, mlp=sparse_hooks(c.experts, c.chosen)
    )


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="Mixtral",
    model_types=("mixtral",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer,
    block=block,
    hooks=hooks,
    about="mixture of experts, renormalised scores",
)
