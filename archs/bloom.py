"""Bloom (BigScience Workshop, 2022): alibi instead of positions, LayerNorm also on the embedding, fused qkv, a gelu of
its own.

    embedding = norm(tokens)
    residual_pre --+-- attn_norm -- q, k, v -- attention with alibi -- o --(+)-- residual_mid
                   '--------------------------------------------------------'
    residual_mid --+-- mlp_norm -- up -- gelu -- down --(+)-- residual_post
                   '-------------------------------------'

The fused projection holds q, k and v of one head after another. Scores are the product of queries and keys added to the
bias in one operation; transformers has eager attention only. Biases count real tokens, so padding moves nothing. Does
not know residuals after the norm, nor ``slow_but_exact``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .batch import Batch
from .contract import MOST_LAYERS, ArchError, Family, Keys, Shape, Tap, dense_hooks, layer_hooks, source
from .ops import alibi, alibi_slopes, attention, heads, layer_norm, mlp

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model in the words of the maths below."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    eps: float
    tied: bool
    max_positions: int | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        keys = Keys(hf)
        hidden = keys.size("n_embed", keys.size("hidden_size", 64))
        n_heads = keys.size("num_attention_heads", keys.size("n_head", 8))
        if hidden % n_heads:
            raise ArchError(f"hidden_size {hidden} is not a multiple of n_head {n_heads}")
        keys.only("n_inner", 4 * hidden, 4 * hidden)
        for word in ("apply_residual_connection_post_layernorm", "slow_but_exact"):
            keys.only(word, False, False)
        config = cls(
            layers=keys.size("num_hidden_layers", keys.size("n_layer", 2, most=MOST_LAYERS), most=MOST_LAYERS),
            hidden=hidden,
            heads=n_heads,
            vocab=keys.size("vocab_size", 250880),
            eps=keys.number("layer_norm_epsilon", 1e-5, least=0),
            tied=keys.flag("tie_word_embeddings", True),
        )
        keys.finish(HARMLESS)
        return config

    @property
    def mlp_width(self) -> int:
        return 4 * self.hidden

    @property
    def qkv_width(self) -> int:
        return 3 * self.hidden


HARMLESS = frozenset(
    """attention_dropout attention_softmax_in_fp32 bias_dropout_fusion hidden_dropout masked_softmax_fusion
    offset_alibi seq_length skip_bias_add skip_bias_add_qkv unk_token_id""".split()
)

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    tokens: Tensor = source("word_embeddings.weight", "vocab", "hidden")
    norm: Tensor = source("word_embeddings_layernorm.weight", "hidden")
    norm_bias: Tensor = source("word_embeddings_layernorm.bias", "hidden")


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor = source("input_layernorm.weight", "hidden")
    attn_norm_bias: Tensor = source("input_layernorm.bias", "hidden")
    qkv: Tensor = source("self_attention.query_key_value.weight", "qkv_width", "hidden")
    qkv_bias: Tensor = source("self_attention.query_key_value.bias", "qkv_width")
    o: Tensor = source("self_attention.dense.weight", "hidden", "hidden")
    o_bias: Tensor = source("self_attention.dense.bias", "hidden")
    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    mlp_norm_bias: Tensor = source("post_attention_layernorm.bias", "hidden")
    up: Tensor = source("mlp.dense_h_to_4h.weight", "mlp_width", "hidden")
    up_bias: Tensor = source("mlp.dense_h_to_4h.bias", "mlp_width")
    down: Tensor = source("mlp.dense_4h_to_h.weight", "hidden", "mlp_width")
    down_bias: Tensor = source("mlp.dense_4h_to_h.bias", "hidden")


@dataclass(frozen=True)
class Norm:
    weight: Tensor = source("ln_f.weight", "hidden")
    bias: Tensor = source("ln_f.bias", "hidden")


@dataclass(frozen=True)
class Head:
    unembed: Tensor = source("lm_head.weight", "vocab", "hidden")


# --- maths ----------------------------------------------------------------------------------------------------------


def embed(w: Embedding, c: Config, batch: Batch) -> Tensor:
    """Token ids -> ``[rows, hidden]``."""
    return layer_norm(F.embedding(batch.ids, w.tokens), w.norm, w.norm_bias, c.eps)


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear, width = batch.linear, c.hidden // c.heads
    x = tap("residual_pre", x)

    a = linear(layer_norm(x, w.attn_norm, w.attn_norm_bias, c.eps), w.qkv, w.qkv_bias)
    q, k, v = torch.split(heads(a, 3 * width), width, dim=-1)
    q, k, v = tap("q", q), tap("k", k), tap("v", v)
    q, k = tap("q_rot", q), tap("k_rot", k)
    slopes = alibi_slopes(c.heads, batch)
    scale = 1.0 / math.sqrt(width)
    z = attention(q, k, v, batch, tap, scale, eager=probabilities, bias=lambda group: alibi(slopes, group, a.dtype))
    z = tap("z", z)
    x = tap("residual_mid", x + tap("attn_out", linear(z.flatten(1), w.o, w.o_bias)))

    def hidden(m: Tensor) -> Tensor:
        return gelu(linear(layer_norm(m, w.mlp_norm, w.mlp_norm_bias, c.eps), w.up, w.up_bias))

    m = mlp(x, batch, tap, hidden, lambda m: linear(m, w.down, w.down_bias))
    return tap("residual_post", x + tap("mlp_out", m))


def probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float, bias: Tensor) -> Tensor:
    """Eager attention in which the product of queries and keys is added to the biases, with one rounding."""
    b, n_heads, s, _ = q.shape
    bias = bias.expand(b, -1, -1, -1).reshape(b * n_heads, 1, s)
    queries, keys = q.reshape(b * n_heads, s, -1), k.reshape(b * n_heads, s, -1)
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale)
    return F.softmax(scores.view(b, n_heads, s, s) + mask, dim=-1, dtype=torch.float32).to(q.dtype)


def gelu(x: Tensor) -> Tensor:
    """The formula of Megatron-DeepSpeed, in the model's dtype."""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def final_norm(x: Tensor, w: Norm, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, hidden]``."""
    return layer_norm(x, w.weight, w.bias, c.eps)


def unembed(x: Tensor, w: Head, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, vocab]``."""
    return batch.linear(x, w.unembed)


def hooks(c: Config, layer: int) -> dict[str, Shape]:
    """Shape behind the rows at every hook of a layer."""
    width = c.hidden // c.heads
    return layer_hooks(hidden=c.hidden, heads=c.heads, kv_heads=c.heads, head_dim=width, mlp=dense_hooks(c.mlp_width))


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = Family(
    name="Bloom",
    model_types=("bloom",),
    config=Config.from_hf,
    embed_weights=Embedding,
    layer_weights=lambda c, layer: Layer,
    norm_weights=Norm,
    head_weights=Head,
    embed=embed,
    block=block,
    final_norm=final_norm,
    unembed=unembed,
    hooks=hooks,
    prefixes=(("transformer.", ""), ("", "")),
    layer_prefix="h.{i}.",
    embedding="word_embeddings.weight",
    head="lm_head.weight",
    attention=("eager",),
    about="alibi, LayerNorm on the embedding, fused qkv; eager attention only",
)
