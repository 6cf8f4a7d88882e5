"""Granite 3 (IBM, 2024): a Llama with four multipliers, on the embedding, the scores, both branches and the logits.

    token -- embedding * embedding_multiplier -- residual_pre of layer 0
    residual_pre --+-- attn_norm -- q, k, v -- rope -- attention -- o -- * residual_multiplier --(+)-- residual_mid
                   '----------------------------------------------------------------------------'
    residual_mid --+-- mlp_norm -- act(gate) * up -- down -- * residual_multiplier --(+)-- residual_post
                   '----------------------------------------------------------------'

``attn_out`` and ``mlp_out`` are what is added, multiplied. Scores are ``q k^T`` times ``attention_multiplier`` instead
of one over the root of a head's width; logits are divided by ``logits_scaling``. An absent multiplier is 1. They are
those of Yang et al. (2022), "Tensor Programs V". Does not know caches or generation.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from . import llama
from .batch import Batch
from .contract import Keys, Tap
from .llama import HARMLESS, Embedding, Head, Layer
from .ops import ACTIVATIONS, attention, heads, mlp, rms_norm
from .rope import rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words, and the multipliers."""

    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        config = cls.read(keys)
        keys.finish(HARMLESS)
        return config

    @classmethod
    def read(cls, keys: Keys, **own: Any) -> Self:
        """The words of every Granite; ``own``: as for a Llama."""
        return super().read(
            keys,
            embedding_multiplier=keys.number("embedding_multiplier", 1.0),
            attention_multiplier=keys.number("attention_multiplier", 1.0),
            residual_multiplier=keys.number("residual_multiplier", 1.0),
            logits_scaling=keys.number("logits_scaling", 1.0, above=0),
            **own,
        )


# --- maths ----------------------------------------------------------------------------------------------------------


def embed(w: Embedding, c: Config, batch: Batch) -> Tensor:
    """Token ids -> ``[rows, hidden]``."""
    return llama.embed(w, c, batch).mul_(c.embedding_multiplier)


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

    def hidden(m: Tensor) -> Tensor:
        m = rms_norm(m, w.mlp_norm, c.eps)
        return ACTIVATIONS[c.act](linear(m, w.gate, w.gate_bias)).mul_(linear(m, w.up, w.up_bias))

    m = mlp(x, batch, tap, hidden, lambda m: linear(m, w.down, w.down_bias).mul_(c.residual_multiplier))
    return tap("residual_post", x + tap("mlp_out", m))


def unembed(x: Tensor, w: Head, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, vocab]``, scaled."""
    return batch.linear(x, w.unembed).div_(c.logits_scaling)


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="Granite",
    model_types=("granite",),
    config=Config.from_hf,
    embed=embed,
    block=block,
    unembed=unembed,
    about="multipliers on embedding, scores, branches and logits",
)
