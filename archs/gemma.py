"""Gemma 1 (Gemma Team, 2024), CodeGemma: a Llama with scaled embeddings, GELU and norms whose weight is kept less 1.

    token -- embedding * sqrt(hidden) -- residual_pre of layer 0
    residual_pre --+-- attn_norm -- q, k, v -- rope -- attention -- o --(+)-- residual_mid
                   '---------------------------------------------------'
    residual_mid --+-- mlp_norm -- gelu(gate) * up -- down --(+)-- residual_post
                   '------------------------------------------'

sqrt(hidden) is rounded to the model's dtype first. A head has 256 dimensions whatever the width of the model, unless
the config says otherwise. ``hidden_act`` "gelu", which the first configs have, means its tanh form. Keys that a config
leaves out have transformers' defaults. Does not know attention to later tokens.
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
from .contract import Keys, Tap
from .llama import Embedding, Layer, Norm
from .ops import ACTIVATIONS, attention, heads, mlp, rms_norm_gemma
from .rope import rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""What an absent key means."""


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys({**DEFAULTS, **hf})
        named = keys.choice("hidden_act", None, ACTIVATIONS)
        act = "gelu_pytorch_tanh" if named == "gelu" else named
        keys.only("hidden_activation", act, act)
        config = cls.read(keys, act=act, mlp_bias=False)
        keys.finish(HARMLESS)
        return config


HARMLESS = llama.HARMLESS

# --- maths ----------------------------------------------------------------------------------------------------------


def embed(w: Embedding, c: llama.Config, batch: Batch) -> Tensor:
    """Token ids -> ``[rows, hidden]``."""
    return F.embedding(batch.ids, w.tokens) * torch.tensor(c.hidden**0.5).to(w.tokens.dtype)


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
    z = tap("z", attention(q, k, v, batch, tap, scale=c.head_dim**-0.5))
    x = tap("residual_mid", x + tap("attn_out", linear(z.flatten(1), w.o, w.o_bias)))

    def hidden(m: Tensor) -> Tensor:
        m = rms_norm_gemma(m, w.mlp_norm, c.eps)
        return ACTIVATIONS[c.act](linear(m, w.gate)).mul_(linear(m, w.up))

    m = mlp(x, batch, tap, hidden, lambda m: linear(m, w.down))
    return tap("residual_post", x + tap("mlp_out", m))


def final_norm(x: Tensor, w: Norm, c: llama.Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, hidden]``."""
    return rms_norm_gemma(x, w.weight, c.eps)


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="Gemma",
    model_types=("gemma",),
    config=Config.from_hf,
    embed=embed,
    block=block,
    final_norm=final_norm,
    about="Gemma 1 and CodeGemma: scaled embeddings, GELU, norms that scale by 1 + weight",
)
