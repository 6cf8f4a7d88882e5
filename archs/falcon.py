"""Falcon (Almazrouei et al., 2023): three generations of one family.

The 7b: a single head of keys and values, both branches from one norm. The 40b, 180b and 11b ("new decoder
architecture"): some heads of keys and values, both branches from norms of their own, or again from one.

    residual_pre --+-- attn_norm -- q, k, v -- rope -- attention -- o --.
                   +-- mlp_norm -- up -- gelu -- down -----------------(+)--(+)-- residual_post
                   '--------------------------------------------------------'

``residual_post = residual_pre + (mlp_out + attn_out)``. The rw models: as many heads of keys as of queries, perhaps
alibi instead of rope, perhaps one branch after the other:

    residual_pre --+-- attn_norm -- q, k, v -- attention with alibi -- o --(+)-- residual_mid
                   '--------------------------------------------------------'
    residual_mid --+-- mlp_norm -- up -- gelu -- down --(+)-- residual_post
                   '-------------------------------------'

The fused projection holds some heads of queries, their key and their value, then the next. A bias is added after its
product is rounded. With alibi there is no eager attention: transformers' adds the biases twice.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .batch import Batch, Group
from .contract import MOST_LAYERS, ArchError, Family, Keys, Shape, Tap, dense_hooks, layer_hooks, source
from .ops import ACTIVATIONS, Sees, alibi, alibi_slopes, attention, layer_norm, mlp
from .rope import Rope, rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


EXPLICIT = Sees(explicit=True)
"""transformers hands sdpa a mask always, with biases or without."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model in the words of the maths below.

    grouped: transformers hands one copy of a key to every query that reads it, not all queries the single key.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    grouped: bool
    mlp_width: int
    vocab: int
    act: str
    eps: float
    alibi: bool
    rope: Rope
    parallel: bool
    norms: int
    bias: bool
    tied: bool
    max_positions: int | None = None
    sees: Sees = EXPLICIT

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        keys = Keys(hf)
        hidden, n_heads = keys.size("n_embed", keys.size("hidden_size", 4544)), keys.size("num_attention_heads", 71)
        if hidden % n_heads:
            raise ArchError(f"hidden_size {hidden} is not a multiple of num_attention_heads {n_heads}")
        head_dim = hidden // n_heads
        if head_dim % 2:
            raise ArchError(
                f"hidden_size {hidden} / num_attention_heads {n_heads} is odd: rotary embedding needs pairs"
            )
        grouped, single = keys.flag("new_decoder_architecture", False), keys.flag("multi_query", True)
        kv_heads = keys.size("num_kv_heads", n_heads)
        if not grouped:
            kv_heads = 1 if single else keys.only("num_kv_heads", n_heads, n_heads)
        if n_heads % kv_heads or (grouped and kv_heads == 1):
            raise ArchError(
                f"num_kv_heads {kv_heads} is not supported: it must be a divisor of num_attention_heads {n_heads}, "
                "and more than 1 in the new decoder architecture"
            )
        parallel = keys.only("parallel_attn", True, *((True,) if grouped else (True, False)))
        norms = keys.only("num_ln_in_parallel_attn", 2 if grouped else 1, *((1, 2) if grouped else (1,)))
        keys.only("apply_residual_connection_post_layernorm", False, False)
        config = cls(
            layers=keys.size("num_hidden_layers", 32, most=MOST_LAYERS),
            hidden=hidden,
            heads=n_heads,
            kv_heads=kv_heads,
            grouped=grouped,
            mlp_width=keys.size("ffn_hidden_size", 4 * hidden),
            vocab=keys.size("vocab_size", 65024),
            act=keys.choice("activation", "gelu", ACTIVATIONS),
            eps=keys.number("layer_norm_epsilon", 1e-5, least=0),
            alibi=keys.flag("alibi", False),
            rope=Rope.from_hf(keys, head_dim, keys.size("max_position_embeddings", 2048)),
            parallel=parallel,
            norms=norms if parallel else 2,
            bias=keys.flag("bias", False),
            tied=keys.flag("tie_word_embeddings", True),
        )
        keys.finish(HARMLESS)
        return config

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


HARMLESS = frozenset("attention_dropout ff_factor hidden_dropout".split())
# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    tokens: Tensor = source("word_embeddings.weight", "vocab", "hidden")


@dataclass(frozen=True)
class Layer:
    """What all layers have."""

    qkv: Tensor = source("self_attention.query_key_value.weight", "qkv_width", "hidden")
    o: Tensor = source("self_attention.dense.weight", "hidden", "hidden")
    up: Tensor = source("mlp.dense_h_to_4h.weight", "mlp_width", "hidden")
    down: Tensor = source("mlp.dense_4h_to_h.weight", "hidden", "mlp_width")
    qkv_bias: Tensor | None = source("self_attention.query_key_value.bias", "qkv_width", when="bias")
    o_bias: Tensor | None = source("self_attention.dense.bias", "hidden", when="bias")
    up_bias: Tensor | None = source("mlp.dense_h_to_4h.bias", "mlp_width", when="bias")
    down_bias: Tensor | None = source("mlp.dense_4h_to_h.bias", "hidden", when="bias")


@dataclass(frozen=True)
class OneNorm(Layer):
    """Both branches start from the same norm."""

    attn_norm: Tensor = source("input_layernorm.weight", "hidden")
    attn_norm_bias: Tensor = source("input_layernorm.bias", "hidden")


@dataclass(frozen=True)
class TwoNorms(Layer):
    """Each branch has a norm of its own, of the same input."""

    attn_norm: Tensor = source("ln_attn.weight", "hidden")
    attn_norm_bias: Tensor = source("ln_attn.bias", "hidden")
    mlp_norm: Tensor = source("ln_mlp.weight", "hidden")
    mlp_norm_bias: Tensor = source("ln_mlp.bias", "hidden")


@dataclass(frozen=True)
class Sequential(OneNorm):
    """One branch after the other."""

    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    mlp_norm_bias: Tensor = source("post_attention_layernorm.bias", "hidden")


def layer_weights(c: Config, layer: int) -> type:
    if not c.parallel:
        return Sequential
    return OneNorm if c.norms == 1 else TwoNorms


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
    return F.embedding(batch.ids, w.tokens)


def block(x: Tensor, w: Any, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """The block of the config's kind, all ``[rows, hidden]``."""
    return (parallel if c.parallel else sequential)(x, w, c, batch, tap)


def parallel(x: Tensor, w: OneNorm | TwoNorms, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = residual_pre + (mlp_out + attn_out)``."""
    x = tap("residual_pre", x)
    a = m = layer_norm(x, w.attn_norm, w.attn_norm_bias, c.eps)
    if isinstance(w, TwoNorms):
        m = layer_norm(x, w.mlp_norm, w.mlp_norm_bias, c.eps)
    a = attend(a, w, c, batch, tap)
    return tap("residual_post", x + (feed(m, w, c, batch, tap) + a))


def sequential(x: Tensor, w: Sequential, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``."""
    x = tap("residual_pre", x)
    x = tap("residual_mid", x + attend(layer_norm(x, w.attn_norm, w.attn_norm_bias, c.eps), w, c, batch, tap))
    return tap("residual_post", x + feed(layer_norm(x, w.mlp_norm, w.mlp_norm_bias, c.eps), w, c, batch, tap))


def attend(a: Tensor, w: Layer, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """The attention branch, up to ``attn_out``."""
    each = c.heads // c.kv_heads
    qkv = linear(a, w.qkv, w.qkv_bias, batch).view(-1, c.kv_heads, each + 2, c.head_dim)
    q = tap("q", qkv[:, :, :each].flatten(1, 2))
    k, v = tap("k", qkv[:, :, each]), tap("v", qkv[:, :, each + 1])
    if not c.alibi:
        cos, sin = rotary(c.rope, batch, a.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    q, k = tap("q_rot", q), tap("k_rot", k)
    if c.grouped:
        k, v = (x[:, :, None].expand(-1, -1, each, -1).flatten(1, 2) for x in (k, v))
    bias = biases(c, batch, a.dtype)
    z = attention(q, k, v, batch, tap, c.head_dim**-0.5, sees=c.sees, eager=probabilities, sdpa=sdpa, bias=bias)
    return tap("attn_out", linear(tap("z", z).flatten(1), w.o, w.o_bias, batch))


def biases(c: Config, batch: Batch, dtype: torch.dtype) -> Callable[[Group], Tensor] | None:
    """Alibi with slopes of bf16 whatever the dtype; None for a model that rotates."""
    if not c.alibi:
        return None
    slopes = alibi_slopes(c.heads, batch).bfloat16()
    return lambda group: alibi(slopes, group, dtype)


def probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float, *bias: Tensor) -> Tensor:
    """Eager attention: biases are divided as scores are, and the softmax is in the model's dtype."""
    scores = sum(bias, torch.matmul(q, k.transpose(2, 3))) / math.sqrt(q.shape[-1])
    return F.softmax(scores + mask, dim=-1, dtype=q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *bias: Tensor) -> Tensor:
    """With torch's own scale and always a mask, which holds the biases where there are some; a single key is shared."""
    assert mask is not None
    for added in bias:
        mask = (added / math.sqrt(q.shape[-1])).masked_fill(~mask, torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def feed(m: Tensor, w: Layer, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """The MLP, up to ``mlp_out``."""

    def hidden(m: Tensor) -> Tensor:
        return ACTIVATIONS[c.act](linear(m, w.up, w.up_bias, batch))

    return tap("mlp_out", mlp(m, batch, tap, hidden, lambda m: linear(m, w.down, w.down_bias, batch)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch) -> Tensor:
    """The product is rounded before the bias is added."""
    x = batch.linear(x, weight)
    return x if bias is None else x + bias


def final_norm(x: Tensor, w: Norm, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, hidden]``."""
    return layer_norm(x, w.weight, w.bias, c.eps)


def unembed(x: Tensor, w: Head, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, vocab]``."""
    return batch.linear(x, w.unembed)


def hooks(c: Config, layer: int) -> dict[str, Shape]:
    """Shape behind the rows at every hook of a layer."""
    return layer_hooks(
        hidden=c.hidden,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        mlp=dense_hooks(c.mlp_width),
        parallel=c.parallel,
    )


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = Family(
    name="Falcon",
    model_types=("falcon",),
    config=Config.from_hf,
    embed_weights=Embedding,
    layer_weights=layer_weights,
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
    attention=lambda c: ("sdpa",) if c.alibi else ("sdpa", "eager"),
    about="parallel branches, one or few heads of keys; the rw models with alibi, one branch after the other",
)
