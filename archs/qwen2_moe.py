"""Qwen 2 and 1.5 with experts (Yang et al., 2024): a Qwen 2 whose MLP is a mixture of experts beside a shared one.

    residual_mid --+-- mlp_norm --+-- router -- softmax -- top k -- experts -- sum --(+)--(+)-- residual_post
                   |              +-- shared gate -- sigmoid -- * -- shared expert ---'    |
                   '-----------------------------------------------------------------------'

``mlp_out`` is the sum over experts plus the shared expert's output times one number for each token. Scores are rounded
to the model's dtype, and not renormalised unless the config says so. Layers in ``mlp_only_layers``, or off the beat of
``decoder_sparse_step``, are a Qwen 2's. Windows, where they are used, are in every second layer below
``max_window_layers``: not the rule of Qwen 2. Does not know the router's loss.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from . import llama, qwen2
from .batch import Batch
from .contract import MOST_LAYERS, Experts, Keys, Shape, Tap, experts, layer_hooks, source, sparse_hooks
from .ops import ACTIVATIONS, EXPERT_ACTIVATIONS, attention, heads, rms_norm, routed
from .qwen2 import windows
from .rope import rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sparse(qwen2.Config):
    """The words of every Qwen with experts. sparse: which layers have them."""

    sparse: tuple[bool, ...]
    experts: int
    chosen: int
    expert_width: int
    renormalised: bool

    @classmethod
    def read(cls, keys: Keys, **own: Any) -> Self:
        layers = range(keys.size("num_hidden_layers", most=MOST_LAYERS))
        dense, step = keys.sequence("mlp_only_layers", int) or (), keys.size("decoder_sparse_step", 1)
        return super().read(
            keys,
            sparse=tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers),
            renormalised=keys.flag("norm_topk_prob", False),
            act=keys.choice("hidden_act", "silu", EXPERT_ACTIVATIONS),
            **own,
        )


@dataclass(frozen=True, kw_only=True)
class Config(Sparse):
    """The same, and the shared expert."""

    shared_width: int
    shared_scores: int = 1

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        end = keys.number("max_window_layers", 28)
        config = cls.read(
            keys,
            kv_heads=keys.optional("num_key_value_heads", 16),
            attention_bias=keys.flag("qkv_bias", True),
            sees=windows(keys, lambda layer: layer % 2 == 0 and layer < end),
            experts=keys.size("num_experts", 60),
            chosen=keys.size("num_experts_per_tok", 4),
            expert_width=keys.size("moe_intermediate_size", 1408),
            shared_width=keys.size("shared_expert_intermediate_size", 5632),
        )
        keys.finish(HARMLESS)
        return config


HARMLESS = llama.HARMLESS | {"output_router_logits", "router_aux_loss_coef"}

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expert:
    gate_up: Tensor = source(("{e}.gate_proj.weight", "{e}.up_proj.weight"), "expert_width", "hidden")
    down: Tensor = source("{e}.down_proj.weight", "hidden", "expert_width")


@dataclass(frozen=True)
class Layer:
    """One with experts; the others are `qwen2.Layer`."""

    attn_norm: Tensor = source("input_layernorm.weight", "hidden")
    q: Tensor = source("self_attn.q_proj.weight", "q_width", "hidden")
    k: Tensor = source("self_attn.k_proj.weight", "kv_width", "hidden")
    v: Tensor = source("self_attn.v_proj.weight", "kv_width", "hidden")
    o: Tensor = source("self_attn.o_proj.weight", "hidden", "q_width")
    q_bias: Tensor | None = source("self_attn.q_proj.bias", "q_width", when="attention_bias")
    k_bias: Tensor | None = source("self_attn.k_proj.bias", "kv_width", when="attention_bias")
    v_bias: Tensor | None = source("self_attn.v_proj.bias", "kv_width", when="attention_bias")
    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    router: Tensor = source("mlp.gate.weight", "experts", "hidden")
    experts: Experts[Expert] = experts("mlp.experts.", Expert, "experts")
    shared_score: Tensor = source("mlp.shared_expert_gate.weight", "shared_scores", "hidden")
    shared_gate: Tensor = source("mlp.shared_expert.gate_proj.weight", "shared_width", "hidden")
    shared_up: Tensor = source("mlp.shared_expert.up_proj.weight", "shared_width", "hidden")
    shared_down: Tensor = source("mlp.shared_expert.down_proj.weight", "hidden", "shared_width")


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Layer | qwen2.Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    return sparse(x, w, c, layer, batch, tap) if isinstance(w, Layer) else qwen2.block(x, w, c, layer, batch, tap)


def sparse(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    linear, act = batch.linear, ACTIVATIONS[c.act]
    x = tap("residual_pre", x)

    a = rms_norm(x, w.attn_norm, c.eps)
    q = tap("q", heads(linear(a, w.q, w.q_bias), c.head_dim))
    k = tap("k", heads(linear(a, w.k, w.k_bias), c.head_dim))
    v = tap("v", heads(linear(a, w.v, w.v_bias), c.head_dim))
    cos, sin = rotary(c.rope, batch, x.dtype)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    z = tap("z", attention(q, k, v, batch, tap, scale=c.head_dim**-0.5, sees=c.sees[layer]))
    x = tap("residual_mid", x + tap("attn_out", linear(z.flatten(1), w.o)))

    m = rms_norm(x, w.mlp_norm, c.eps)

    def shared(m: Tensor) -> Tensor:
        score = F.sigmoid(linear(m, w.shared_score))
        return score * linear(act(linear(m, w.shared_gate)).mul_(linear(m, w.shared_up)), w.shared_down)

    m = mixture(m, w.router, w.experts, c, batch, tap) + batch.rows(shared, m)
    return tap("residual_post", x + tap("mlp_out", m))


def mixture(m: Tensor, router: Tensor, experts: Experts[Expert], c: Sparse, batch: Batch, tap: Tap) -> Tensor:
    """The best experts of every row, weighted by their probabilities: ``[rows, hidden] -> [rows, hidden]``."""
    logits = tap("router_logits", batch.linear(m, router))
    scores, ids = F.softmax(logits, dim=-1, dtype=torch.float32).topk(c.chosen, dim=-1)
    if c.renormalised:
        scores = scores / scores.sum(-1, keepdim=True)

    def expert(e: Expert, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, e.gate_up).chunk(2, dim=-1)
        return F.linear(ACTIVATIONS[c.act](gate) * up, e.down)

    return routed(m, tap("expert_ids", ids), scores.to(m.dtype), experts, batch, expert)


def hooks(c: Sparse, layer: int) -> dict[str, Shape]:
    """Shape behind the rows at every hook of a layer."""
    if not c.sparse[layer]:
        return dict(qwen2.FAMILY.hooks(c, layer))
    return layer_hooks(
        hidden=c.hidden, heads=c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim, mlp=sparse_hooks(c.experts, c.chosen)
    )


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    qwen2.FAMILY,
    name="Qwen 2 MoE",
    model_types=("qwen2_moe",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer if c.sparse[layer] else qwen2.Layer,
    block=block,
    hooks=hooks,
    activations=("mlp_width", "expert_width", "shared_width", "shared_scores"),
    about="mixture of experts beside a shared one, scores as they are",
)
