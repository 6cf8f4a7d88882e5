"""Mistral (Jiang et al., 2023), Nemo and Small: a Llama whose queries see a sliding window of earlier tokens.

The residual stream is a Llama's. An absent ``sliding_window`` means 4,096 tokens, null none at all; all layers have the
same. Does not know Ministral's ``layer_types``, which transformers' Mistral ignores.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from . import llama
from .batch import Batch
from .contract import Keys, Tap
from .llama import HARMLESS, Layer
from .ops import ACTIVATIONS, Sees, attention, heads, mlp, rms_norm
from .rope import rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words, and the window."""

    sees: Sees

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        config = cls.read(
            keys,
            kv_heads=keys.optional("num_key_value_heads", 8),
            attention_bias=False,
            mlp_bias=False,
            sees=Sees(window=keys.optional("sliding_window", 4096)),
        )
        keys.finish(HARMLESS)
        return config


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

    def hidden(m: Tensor) -> Tensor:
        m = rms_norm(m, w.mlp_norm, c.eps)
        return ACTIVATIONS[c.act](linear(m, w.gate)).mul_(linear(m, w.up))

    m = mlp(x, batch, tap, hidden, lambda m: linear(m, w.down))
    return tap("residual_post", x + tap("mlp_out", m))


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="Mistral",
    model_types=("mistral",),
    config=Config.from_hf,
    block=block,
    about="a sliding window in every layer, unless the config's is null",
)
