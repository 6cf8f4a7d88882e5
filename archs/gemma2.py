"""Gemma 2 (Gemma Team, 2024): a Gemma with norms on both sides of a branch, soft caps, every other layer with a window.

    residual_pre --+-- attn_norm -- q, k, v -- rope -- capped attention -- o -- attn_post_norm --(+)-- residual_mid
                   '-----------------------------------------------------------------------------'
    residual_mid --+-- mlp_norm -- gelu(gate) * up -- down -- mlp_post_norm --(+)-- residual_post
                   '----------------------------------------------------------'

``attn_out`` and ``mlp_out`` are what the post-norms make. Scores and logits go through ``cap * tanh(x / cap)``; a cap
that is null does not exist. Scores are scaled by ``query_pre_attn_scalar ** -0.5``, not by the width of a head. Without
``layer_types`` the even layers see a window. Does not know sdpa, which has no caps.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gemma, llama
from .batch import Batch
from .contract import MOST_LAYERS, Keys, Tap, source
from .llama import Head
from .ops import ACTIVATIONS, Sees, attention, heads, mlp, rms_norm_gemma
from .rope import rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
"""What an absent key means."""


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words, what each layer sees, the scale of scores, and the caps; None: not capped."""

    sees: tuple[Sees, ...]
    scale: float
    attn_cap: float | None
    final_cap: float | None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys({**DEFAULTS, **hf})
        window, layers = keys.size("sliding_window"), keys.size("num_hidden_layers", most=MOST_LAYERS)
        keys.only("sliding_window_size", window, window)
        kinds = keys.layer_types(layers, KINDS, lambda layer: KINDS[layer % 2])
        config = cls.read(
            keys,
            sees=tuple(Sees(window=window if kind == "sliding_attention" else None) for kind in kinds),
            attn_cap=cap(keys, "attn_logit_softcapping"),
        )
        keys.finish(HARMLESS)
        return config

    @classmethod
    def read(cls, keys: Keys, **own: Any) -> Self:
        """The words of Gemma 2 and 3; ``own``: as for a Llama."""
        act = keys.choice("hidden_activation", None, ACTIVATIONS)
        keys.only("hidden_act", act, act)
        scale = keys.number("query_pre_attn_scalar", above=0) ** -0.5
        return super().read(
            keys, act=act, mlp_bias=False, scale=scale, final_cap=cap(keys, "final_logit_softcapping"), **own
        )


def cap(keys: Keys, key: str) -> float | None:
    return keys.number(key, above=0) if keys.get(key) is not None else None


KINDS = ("sliding_attention", "full_attention")
HARMLESS = llama.HARMLESS | {"cache_implementation"}

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
    o_bias: Tensor | None = source("self_attn.o_proj.bias", "hidden", when="attention_bias")
    attn_post_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    mlp_norm: Tensor = source("pre_feedforward_layernorm.weight", "hidden")
    gate: Tensor = source("mlp.gate_proj.weight", "mlp_width", "hidden")
    up: Tensor = source("mlp.up_proj.weight", "mlp_width", "hidden")
    down: Tensor = source("mlp.down_proj.weight", "hidden", "mlp_width")
    mlp_post_norm: Tensor = source("post_feedforward_layernorm.weight", "hidden")


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    a = rms_norm_gemma(x, w.attn_norm, c.eps)
    q = tap("q", heads(linear(a, w.q, w.q_bias), c.head_dim))
    k = tap("k", heads(linear(a, w.k, w.k_bias), c.head_dim))
    v = tap("v", heads(linear(a, w.v, w.v_bias), c.head_dim))
    cos, sin = rotary(c.rope, batch, x.dtype)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    eager = partial(capped_probabilities, cap=c.attn_cap)
    z = tap("z", attention(q, k, v, batch, tap, scale=c.scale, sees=c.sees[layer], eager=eager))
    a = rms_norm_gemma(linear(z.flatten(1), w.o, w.o_bias), w.attn_post_norm, c.eps)
    x = tap("residual_mid", x + tap("attn_out", a))

    def hidden(m: Tensor) -> Tensor:
        m = rms_norm_gemma(m, w.mlp_norm, c.eps)
        return ACTIVATIONS[c.act](linear(m, w.gate)).mul_(linear(m, w.up))

    m = mlp(x, batch, tap, hidden, lambda m: rms_norm_gemma(linear(m, w.down), w.mlp_post_norm, c.eps))
    return tap("residual_post", x + tap("mlp_out", m))


def capped(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)``; x itself where there is no cap."""
    return x if cap is None else (x / cap).tanh_().mul_(cap)


def capped_probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float, *, cap: float | None) -> Tensor:
    """Eager attention, with scores capped before they are masked."""
    scores = capped(torch.matmul(q, k.transpose(2, 3)) * scale, cap) + mask
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)


def unembed(x: Tensor, w: Head, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, vocab]``, capped."""
    logits = batch.linear(x, w.unembed)
    return logits if c.final_cap is None else batch.rows(partial(capped, cap=c.final_cap), logits)


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    gemma.FAMILY,
    name="Gemma 2",
    model_types=("gemma2",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer,
    block=block,
    unembed=unembed,
    attention=("eager",),
    activations=("mlp_width", "vocab"),
    about="soft caps on scores and logits, norms before and after a branch, alternating windows",
)
