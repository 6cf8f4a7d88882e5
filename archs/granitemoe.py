"""Granite 3 MoE (IBM, 2024): a Granite whose MLP is a mixture of experts, softmax over the scores of the chosen ones.

    residual_mid --+-- mlp_norm -- router -- top k -- softmax over these -- experts -- sum -- * multiplier --(+)
                   '-----------------------------------------------------------------------------------------'

The router's logits are rounded to the model's dtype and from there on fp32; scores are rounded again. ``mlp_out`` is
the sum over experts times ``residual_multiplier``. All experts of a layer lie in two tensors, gate above up. Does not
know shared experts, the layers with a recurrent state of Granite 4, nor GELU, whose bits in transformers depend on how
many rows all experts get together.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from . import granite, llama, mixtral
from .batch import Batch
from .contract import Experts, Keys, Tap, experts, source
from .ops import ACTIVATIONS, attention, heads, rms_norm, routed
from .rope import rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(granite.Config):
    """The words of Granite, and the experts."""

    experts: int
    chosen: int

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        config = cls.read(
            keys,
            act=keys.choice("hidden_act", "silu", ("silu", "swish")),
            mlp_bias=False,
            experts=keys.size("num_local_experts", 8),
            chosen=keys.size("num_experts_per_tok", 2),
        )
        keys.finish(llama.HARMLESS | {"output_router_logits", "router_aux_loss_coef"})
        return config

    @property
    def gate_up_width(self) -> int:
        return 2 * self.mlp_width


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expert:
    gate_up: Tensor = source("input_linear.weight", "gate_up_width", "hidden")
    down: Tensor = source("output_linear.weight", "hidden", "mlp_width")


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
    o_bias: Tensor | None = source("self_attn.o_proj.bias", "hidden", when="attention_bias")
    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    router: Tensor = source("block_sparse_moe.router.layer.weight", "experts", "hidden")
    experts: Experts[Expert] = experts("block_sparse_moe.", Expert, "experts")


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
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    z = tap("z", attention(q, k, v, batch, tap, scale=c.attention_multiplier))
    a = linear(z.flatten(1), w.o, w.o_bias).mul_(c.residual_multiplier)
    x = tap("residual_mid", x + tap("attn_out", a))

    m = rms_norm(x, w.mlp_norm, c.eps)
    logits = tap("router_logits", linear(m, w.router).float())
    best, ids = logits.topk(c.chosen, dim=-1)
    scores = F.softmax(best, dim=-1).to(x.dtype)

    def expert(e: Expert, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, e.gate_up).chunk(2, dim=-1)
        return F.linear(ACTIVATIONS[c.act](gate) * up, e.down)

    m = routed(m, tap("expert_ids", ids), scores, w.experts, batch, expert).mul_(c.residual_multiplier)
    return tap("residual_post", x + tap("mlp_out", m))


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    granite.FAMILY,
    name="Granite MoE",
    model_types=("granitemoe",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer,
    block=block,
    hooks=mixtral.hooks,
    dtypes={"router_logits": torch.float32},
    about="Granite with a mixture of experts, softmax over the chosen ones",
)
