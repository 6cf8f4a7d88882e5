"""gpt-oss (OpenAI, 2025): attention sinks, every other layer with a window, clamped SwiGLU experts with biases.

    residual_pre --+-- attn_norm -- q, k, v -- rope -- attention with sinks -- o --(+)-- residual_mid
                   '-----------------------------------------------------------------'
    residual_mid --+-- mlp_norm -- router -- top k -- softmax over these -- experts -- sum --(+)-- residual_post
                   '-----------------------------------------------------------------------'

A sink is a learned logit of each head that takes part in the softmax and has no value: a row of ``attn_pattern`` sums
to less than 1. An expert is ``(clamp(up) + 1) * g * sigmoid(alpha g)`` with ``g = clamp(gate)``; its matrices are
stored ``[in, out]``, gate and up in alternate columns. ``mlp_out`` is the sum over experts. A config without rope means
yarn, 32 times 4,096 tokens. HF takes the sigmoid of all experts' rows as one tensor: in fp32 its bits need an
``intermediate_size`` that is a multiple of 64, as all published models have it. Does not know how the experts of the
published files are packed (mxfp4).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from . import llama, mixtral
from .batch import Batch
from .contract import ArchError, Experts, Keys, Tap, experts, source
from .ops import Sees, attention, heads, rms_norm_late, routed
from .rope import Rope, rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The rope of a config that says nothing about rope but perhaps its theta."""


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words, what each layer sees, and the experts."""

    sees: tuple[Sees, ...]
    experts: int
    chosen: int
    alpha: float
    limit: float

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        if not hf.get("rope_scaling") and hf.get("rope_parameters") is None:
            hf = {**hf, "rope_parameters": YARN}
        keys = Keys(hf)
        layers, head_dim = keys.size("num_hidden_layers", 36), keys.size("head_dim", 64)
        window = keys.optional("sliding_window", 128)
        kinds = keys.layer_types(layers, ("full_attention", "sliding_attention"), alternate)
        if window is None:
            raise ArchError("config.json: 'sliding_window' must be a number; 'layer_types' may free layers from it")
        keys.only("hidden_act", "silu", "silu")
        chosen = keys.size("num_experts_per_tok", 4)
        keys.only("experts_per_token", chosen, chosen)
        config = cls.read(
            keys,
            layers=layers,
            head_dim=head_dim,
            kv_heads=keys.optional("num_key_value_heads", 8),
            act="silu",
            eps=keys.number("rms_norm_eps", 1e-5, least=0),
            rope=Rope.from_hf(keys, head_dim, keys.size("max_position_embeddings", 131072), 150000.0),
            attention_bias=keys.flag("attention_bias", True),
            mlp_bias=True,
            sees=tuple(Sees(window=window if kind == "sliding_attention" else None) for kind in kinds),
            experts=keys.size("num_local_experts", keys.get("num_experts", 128)),
            chosen=chosen,
            alpha=keys.number("swiglu_alpha", 1.702),
            limit=keys.number("swiglu_limit", 7.0, above=0),
        )
        keys.finish(HARMLESS)
        return config

    @property
    def gate_up_width(self) -> int:
        return 2 * self.mlp_width


HARMLESS = llama.HARMLESS | {"initial_context_length", "output_router_logits", "router_aux_loss_coef"}


def alternate(layer: int) -> str:
    """A layer's kind of attention where the config has no ``layer_types``."""
    return "full_attention" if layer % 2 else "sliding_attention"


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expert:
    gate_up: Tensor = source("gate_up_proj", "hidden", "gate_up_width")
    gate_up_bias: Tensor = source("gate_up_proj_bias", "gate_up_width")
    down: Tensor = source("down_proj", "mlp_width", "hidden")
    down_bias: Tensor = source("down_proj_bias", "hidden")


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor = source("input_layernorm.weight", "hidden", dtype=torch.float32)
    q: Tensor = source("self_attn.q_proj.weight", "q_width", "hidden")
    k: Tensor = source("self_attn.k_proj.weight", "kv_width", "hidden")
    v: Tensor = source("self_attn.v_proj.weight", "kv_width", "hidden")
    o: Tensor = source("self_attn.o_proj.weight", "hidden", "q_width")
    q_bias: Tensor | None = source("self_attn.q_proj.bias", "q_width", when="attention_bias")
    k_bias: Tensor | None = source("self_attn.k_proj.bias", "kv_width", when="attention_bias")
    v_bias: Tensor | None = source("self_attn.v_proj.bias", "kv_width", when="attention_bias")
    o_bias: Tensor | None = source("self_attn.o_proj.bias", "hidden", when="attention_bias")
    sinks: Tensor = source("self_attn.sinks", "heads")
    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden", dtype=torch.float32)
    router: Tensor = source("mlp.router.weight", "experts", "hidden")
    router_bias: Tensor = source("mlp.router.bias", "experts")
    experts: Experts[Expert] = experts("mlp.experts.", Expert, "experts")


@dataclass(frozen=True)
class Norm:
    weight: Tensor = source("norm.weight", "hidden", dtype=torch.float32)


# --- maths ----------------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the OLMo 2 kind; its fp32 weight stays so under fp16, as in HF, and is rounded under bf16."""
    return rms_norm_late(x, weight if x.dtype == torch.float16 else weight.to(x.dtype), eps)


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    a = norm(x, w.attn_norm, c.eps)
    q = tap("q", heads(linear(a, w.q, w.q_bias), c.head_dim))
    k = tap("k", heads(linear(a, w.k, w.k_bias), c.head_dim))
    v = tap("v", heads(linear(a, w.v, w.v_bias), c.head_dim))
    cos, sin = rotary(c.rope, batch, x.dtype)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    eager = partial(probabilities_with_sinks, sinks=w.sinks)
    z = tap("z", attention(q, k, v, batch, tap, scale=c.head_dim**-0.5, sees=c.sees[layer], eager=eager))
    x = tap("residual_mid", x + tap("attn_out", linear(z.flatten(1), w.o, w.o_bias)))

    m = norm(x, w.mlp_norm, c.eps)
    logits = tap("router_logits", linear(m, w.router, w.router_bias))
    best, ids = logits.topk(c.chosen, dim=-1)

    def expert(e: Expert, rows: Tensor) -> Tensor:
        gate_up = (rows @ e.gate_up).add_(e.gate_up_bias)
        gate, up = gate_up[:, ::2].clamp(max=c.limit), gate_up[:, 1::2].clamp(-c.limit, c.limit)
        return (((up + 1) * (gate * torch.sigmoid(gate * c.alpha))) @ e.down).add_(e.down_bias)

    m = routed(m, tap("expert_ids", ids), F.softmax(best, dim=-1), w.experts, batch, expert)
    return tap("residual_post", x + tap("mlp_out", m))


def probabilities_with_sinks(q: Tensor, k: Tensor, mask: Tensor, scale: float, *, sinks: Tensor) -> Tensor:
    """Eager attention in the model's dtype, with one logit more in each head's row, ``sinks [heads]``, then dropped."""
    keys = (
        k.contiguous()
    )  # [b, heads, s, d]: the product's bits depend on the layout, and HF's rotation leaves this one
    scores = torch.matmul(q, keys.transpose(2, 3)) * scale + mask
    scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)), dim=-1)
    return F.softmax(scores - scores.amax(-1, keepdim=True), dim=-1)[..., :-1]


def final_norm(x: Tensor, w: Norm, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, hidden]``."""
    return norm(x, w.weight, c.eps)


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="gpt-oss",
    model_types=("gpt_oss",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer,
    norm_weights=Norm,
    block=block,
    final_norm=final_norm,
    hooks=mixtral.hooks,
    attention=("eager",),
    about="attention sinks, alternating windows, clamped experts with biases",
    ignored=(),
)
