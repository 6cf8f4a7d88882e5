"""DeepSeek-V2, V2-Lite and Coder-V2 (DeepSeek-AI, 2024): multi-head latent attention, many experts beside shared ones.

    residual_pre --+-- attn_norm --+-- q_a -- norm -- q_b ------------- q (content | rope) --+
                   |               +-- kv_a --+-- norm -- kv_b --+-- v                       +-- attention -- o --(+)--
                   |                          |                  +-- k content --+-- k ------+                     |
                   |                          '-- one for all heads -- k rope ---'                                 |
                   '-----------------------------------------------------------------------------------------------'
    residual_mid --+-- mlp_norm --+-- router -- softmax -- top k -- experts -- sum --(+)--(+)-- residual_post
                   |              '-- shared experts --------------------------------'    |
                   '----------------------------------------------------------------------'

Queries and keys are ``qk_nope_head_dim`` of content, then ``qk_rope_head_dim`` that are rotated, in complex fp32;
values have a width of their own. ``q`` and ``k`` are whole heads, the rotated part before its rotation (a key's is a
copy for every head). Without ``q_lora_rank`` queries are one projection. Norms of latents have an eps of 1e-6, whatever
``rms_norm_eps`` says. The router is in fp32; its scores are not renormalised. The first ``first_k_dense_replace``
layers have a dense MLP. ``mlp_out`` is routed + shared. Does not know latent caches, nor losses that balance experts.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from . import llama
from .batch import Batch
from .contract import ArchError, Experts, Keys, Shape, Tap, dense_hooks, experts, layer_hooks, source, sparse_hooks
from .ops import (
    ACTIVATIONS,
    EXPERT_ACTIVATIONS,
    attention,
    heads,
    joined_probabilities,
    joined_sdpa,
    mlp,
    rms_norm,
    routed,
)
from .rope import Rope, rotary_complex, rotate_complex

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Latent(llama.Config):
    """The words of every model with latent attention; ``head_dim`` is that of queries and keys, both parts."""

    scale: float
    q_rank: int | None
    kv_rank: int
    content_dim: int
    rope_dim: int
    value_dim: int
    dense_layers: int
    experts: int
    chosen: int
    expert_width: int
    shared: int
    score_factor: float

    @classmethod
    def read(cls, keys: Keys, **own: Any) -> Self:
        """``own``: a family's other words, and where its defaults differ."""
        n_heads, content_dim = keys.size("num_attention_heads"), keys.size("qk_nope_head_dim", 128)
        rope_dim = keys.size("qk_rope_head_dim", 64)
        rope = Rope.from_hf(keys, rope_dim, own["max_positions"])
        keys.only("num_key_value_heads", n_heads, n_heads)
        keys.only("moe_layer_freq", 1, 1)
        words = {
            "head_dim": content_dim + rope_dim,
            "kv_heads": n_heads,
            "rope": rope,
            "scale": softmax_scale(keys, rope, content_dim + rope_dim),
            "q_rank": keys.optional("q_lora_rank", 1536),
            "kv_rank": keys.size("kv_lora_rank", 512),
            "content_dim": content_dim,
            "rope_dim": rope_dim,
            "value_dim": keys.size("v_head_dim", 128),
        }
        words["act"] = keys.choice("hidden_act", "silu", EXPERT_ACTIVATIONS)
        return super().read(keys, **words | own | {"max_positions": None})

    @property
    def value_width(self) -> int:
        return self.heads * self.value_dim

    @property
    def latent_width(self) -> int:
        return self.kv_rank + self.rope_dim

    @property
    def expanded_width(self) -> int:
        return self.heads * (self.content_dim + self.value_dim)

    @property
    def shared_width(self) -> int:
        return self.shared * self.expert_width

    @property
    def q_whole(self) -> bool:
        return self.q_rank is None

    @property
    def q_latent(self) -> bool:
        return self.q_rank is not None

    @property
    def q_latent_bias(self) -> bool:
        return self.q_latent and self.attention_bias


def softmax_scale(keys: Keys, rope: Rope, width: int) -> float:
    """``width ** -0.5``, times the square of what yarn's ``mscale_all_dim`` makes of its factor."""
    scaled = keys.nested("rope_scaling" if keys.get("rope_scaling") else "rope_parameters")
    weight = scaled.number("mscale_all_dim", 0.0, least=0)
    grown = 0.1 * weight * math.log(rope.factor) + 1.0 if weight and rope.factor > 1 else 1.0
    return float(width**-0.5 * grown * grown)


@dataclass(frozen=True, kw_only=True)
class Config(Latent):
    """The same, and from how many groups of experts the chosen ones may come: ``groups`` 1 for no limit."""

    groups: int
    chosen_groups: int

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        limited = keys.choice("topk_method", "greedy", ("greedy", "group_limited_greedy")) != "greedy"
        for name in ("n_group", "topk_group"):
            keys.get(name)
        keys.only("norm_topk_prob", False, False)
        keys.only("scoring_func", "softmax", "softmax")
        config = cls.read(
            keys,
            max_positions=keys.size("max_position_embeddings", 2048),
            dense_layers=int(keys.number("first_k_dense_replace", 0)),
            experts=keys.size("n_routed_experts", 64),
            chosen=keys.size("num_experts_per_tok"),
            expert_width=keys.size("moe_intermediate_size", 1407),
            shared=keys.size("n_shared_experts", 2),
            score_factor=keys.number("routed_scaling_factor", 1.0),
            groups=keys.size("n_group") if limited else 1,
            chosen_groups=keys.size("topk_group") if limited else 1,
        )
        check_groups(config)
        keys.finish(HARMLESS)
        return config


def check_groups(c: Any) -> None:
    if c.experts % c.groups or c.chosen_groups > c.groups:
        raise ArchError(
            f"config.json: 'n_group' {c.groups} must divide 'n_routed_experts' {c.experts} "
            f"and be no less than 'topk_group' {c.chosen_groups}"
        )


HARMLESS = llama.HARMLESS | frozenset(
    "aux_loss_alpha ep_size head_dim num_nextn_predict_layers output_router_logits qk_head_dim router_aux_loss_coef "
    "seq_aux".split()
)

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expert:
    gate_up: Tensor = source(("{e}.gate_proj.weight", "{e}.up_proj.weight"), "expert_width", "hidden")
    down: Tensor = source("{e}.down_proj.weight", "hidden", "expert_width")


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor = source("input_layernorm.weight", "hidden")
    q: Tensor | None = source("self_attn.q_proj.weight", "q_width", "hidden", when="q_whole")
    q_a: Tensor | None = source("self_attn.q_a_proj.weight", "q_rank", "hidden", when="q_latent")
    q_a_bias: Tensor | None = source("self_attn.q_a_proj.bias", "q_rank", when="q_latent_bias")
    q_norm: Tensor | None = source("self_attn.q_a_layernorm.weight", "q_rank", when="q_latent")
    q_b: Tensor | None = source("self_attn.q_b_proj.weight", "q_width", "q_rank", when="q_latent")
    kv_a: Tensor = source("self_attn.kv_a_proj_with_mqa.weight", "latent_width", "hidden")
    kv_a_bias: Tensor | None = source("self_attn.kv_a_proj_with_mqa.bias", "latent_width", when="attention_bias")
    kv_norm: Tensor = source("self_attn.kv_a_layernorm.weight", "kv_rank")
    kv_b: Tensor = source("self_attn.kv_b_proj.weight", "expanded_width", "kv_rank")
    o: Tensor = source("self_attn.o_proj.weight", "hidden", "value_width")
    o_bias: Tensor | None = source("self_attn.o_proj.bias", "hidden", when="attention_bias")
    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden")


@dataclass(frozen=True)
class Dense(Layer):
    gate: Tensor = source("mlp.gate_proj.weight", "mlp_width", "hidden")
    up: Tensor = source("mlp.up_proj.weight", "mlp_width", "hidden")
    down: Tensor = source("mlp.down_proj.weight", "hidden", "mlp_width")
    gate_bias: Tensor | None = source("mlp.gate_proj.bias", "mlp_width", when="mlp_bias")
    up_bias: Tensor | None = source("mlp.up_proj.bias", "mlp_width", when="mlp_bias")
    down_bias: Tensor | None = source("mlp.down_proj.bias", "hidden", when="mlp_bias")


@dataclass(frozen=True)
class Sparse(Layer):
    """With ``gate``, ``up`` and ``down`` of the shared experts, stored as one."""

    router: Tensor = source("mlp.gate.weight", "experts", "hidden")
    experts: Experts[Expert] = experts("mlp.experts.", Expert, "experts")
    gate: Tensor = source("mlp.shared_experts.gate_proj.weight", "shared_width", "hidden")
    up: Tensor = source("mlp.shared_experts.up_proj.weight", "shared_width", "hidden")
    down: Tensor = source("mlp.shared_experts.down_proj.weight", "hidden", "shared_width")
    gate_bias: Tensor | None = source("mlp.shared_experts.gate_proj.bias", "shared_width", when="mlp_bias")
    up_bias: Tensor | None = source("mlp.shared_experts.up_proj.bias", "shared_width", when="mlp_bias")
    down_bias: Tensor | None = source("mlp.shared_experts.down_proj.bias", "hidden", when="mlp_bias")


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Dense | Sparse, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    x = tap("residual_pre", x)
    q, k, v = projected(rms_norm(x, w.attn_norm, c.eps), w, c, batch, tap)
    turns = rotary_complex(c.rope, batch)
    q, k = (
        tap(name, torch.cat((part[..., : c.content_dim], rotate_complex(part[..., c.content_dim :], turns)), dim=-1))
        for name, part in (("q_rot", q), ("k_rot", k))
    )
    z = attention(q, k, v, batch, tap, scale=c.scale, eager=joined_probabilities, sdpa=joined_sdpa)
    x = tap("residual_mid", x + tap("attn_out", batch.linear(tap("z", z).flatten(1), w.o, w.o_bias)))

    m = mixture(x, w, c, batch, tap) if isinstance(w, Sparse) else dense(x, w, c, batch, tap)
    return tap("residual_post", x + tap("mlp_out", m))


def projected(a: Tensor, w: Layer, c: Latent, batch: Batch, tap: Tap) -> tuple[Tensor, Tensor, Tensor]:
    """``a [rows, hidden]`` -> q and k ``[rows, heads, head_dim]`` before rope, and v ``[rows, heads, value_dim]``."""
    linear = batch.linear
    if w.q is not None:
        q = linear(a, w.q)
    else:
        assert w.q_a is not None and w.q_norm is not None and w.q_b is not None
        q = linear(rms_norm(linear(a, w.q_a, w.q_a_bias), w.q_norm, LATENT_EPS), w.q_b)
    latent, turning = torch.split(linear(a, w.kv_a, w.kv_a_bias), [c.kv_rank, c.rope_dim], dim=-1)
    expanded = heads(linear(rms_norm(latent, w.kv_norm, LATENT_EPS), w.kv_b), c.content_dim + c.value_dim)
    content, v = torch.split(expanded, [c.content_dim, c.value_dim], dim=-1)
    k = torch.cat((content, repeat(turning, "rows d -> rows heads d", heads=c.heads)), dim=-1)
    return tap("q", heads(q, c.head_dim)), tap("k", k), tap("v", v)


LATENT_EPS = 1e-6


def dense(x: Tensor, w: Dense, c: Latent, batch: Batch, tap: Tap) -> Tensor:
    """What a dense MLP adds to ``x [rows, hidden]``."""
    hidden, out = gated(w, c, batch)
    return mlp(x, batch, tap, lambda m: hidden(rms_norm(m, w.mlp_norm, c.eps)), out)


def gated(w: Dense | Sparse, c: Latent, batch: Batch) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The two halves of a gated MLP, into its width and out of it."""
    linear = batch.linear

    def hidden(m: Tensor) -> Tensor:
        return ACTIVATIONS[c.act](linear(m, w.gate, w.gate_bias)).mul_(linear(m, w.up, w.up_bias))

    return hidden, lambda m: linear(m, w.down, w.down_bias)


def mixture(x: Tensor, w: Sparse, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """What chosen and shared experts add to ``x [rows, hidden]``."""
    m = rms_norm(x, w.mlp_norm, c.eps)
    logits = tap("router_logits", batch.linear(m.float(), w.router.float()))
    scores = F.softmax(logits, dim=-1)
    best = rearrange(scores, "rows (groups own) -> rows groups own", groups=c.groups).amax(-1)
    scores, ids = of_groups(scores, best, c.chosen_groups, 0.0).topk(c.chosen, dim=-1, sorted=False)
    return summed(m, tap("expert_ids", ids), scores * c.score_factor, w, c, batch)


def of_groups(scores: Tensor, groups: Tensor, chosen: int, other: float) -> Tensor:
    """``scores [rows, experts]`` with ``other`` outside of the best groups, by their own scores ``[rows, groups]``."""
    kept = groups.topk(chosen, dim=-1, sorted=False)[1]
    out = torch.ones_like(groups, dtype=torch.bool).scatter_(1, kept, False)
    return scores.masked_fill(out.repeat_interleave(scores.shape[-1] // groups.shape[-1], dim=-1), other)


def summed(m: Tensor, ids: Tensor, scores: Tensor, w: Sparse, c: Latent, batch: Batch) -> Tensor:
    """Chosen experts, weighted by fp32 scores, plus the shared ones: ``[rows, hidden] -> [rows, hidden]``."""

    def expert(e: Expert, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, e.gate_up).chunk(2, dim=-1)
        return F.linear(ACTIVATIONS[c.act](gate) * up, e.down)

    hidden, out = gated(w, c, batch)
    return routed(m, ids, scores, w.experts, batch, expert) + batch.rows(lambda tile: out(hidden(tile)), m)


def hooks(c: Latent, layer: int) -> dict[str, Shape]:
    """Shape behind the rows at every hook of a layer."""
    return layer_hooks(
        hidden=c.hidden,
        heads=c.heads,
        kv_heads=c.heads,
        head_dim=c.head_dim,
        value_dim=c.value_dim,
        mlp=dense_hooks(c.mlp_width) if layer < c.dense_layers else sparse_hooks(c.experts, c.chosen),
    )


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="DeepSeek V2",
    model_types=("deepseek_v2",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Dense if layer < c.dense_layers else Sparse,
    block=block,
    hooks=hooks,
    dtypes={"router_logits": torch.float32},
    activations=("mlp_width", "expert_width", "shared_width"),
    about="latent attention, experts beside shared ones, groups of experts",
    ignored=(),
)
