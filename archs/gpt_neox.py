"""GPT-NeoX (Black et al., 2022) and Pythia (Biderman et al., 2023): LayerNorm, parallel branches, partly rotated heads.

    residual_pre --+-- attn_norm -- q, k, v -- rope -- attention -- dense --.
                   +-- mlp_norm -- act(up) -- down --(+)--------------------(+)--(+)-- residual_post
                   '--------------------------------------------------------------'

The sum is ``(mlp_out + attn_out) + residual_pre``. Where ``use_parallel_residual`` is false (RedPajama) the branches
follow one another, ``residual_mid = residual_pre + attn_out``, ``residual_post = residual_mid + mlp_out``. The fused
projection holds queries, keys and values head by head; a quarter of each head is rotated unless the config says
otherwise. Does not know the Japanese variant, which has biases in other places.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .batch import Batch
from .contract import MOST_LAYERS, ArchError, Family, Keys, Shape, Tap, dense_hooks, layer_hooks, source
from .ops import ACTIVATIONS, attention, joined_probabilities, joined_sdpa, layer_norm, mlp
from .rope import Rope, rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model in the words of the maths below."""

    layers: int
    hidden: int
    heads: int
    mlp_width: int
    vocab: int
    act: str
    eps: float
    rope: Rope
    parallel: bool
    attention_bias: bool
    tied: bool
    max_positions: int | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        keys = Keys(hf)
        hidden, n_heads = keys.size("hidden_size", 6144), keys.size("num_attention_heads", 64)
        if hidden % n_heads:
            raise ArchError(f"hidden_size {hidden} is not a multiple of num_attention_heads {n_heads}")
        theta, share = keys.number("rotary_emb_base", 10000.0), keys.number("rotary_pct", 0.25)
        keys.only("rope_theta", theta, theta)  # transformers reads neither of these two names here
        keys.only("partial_rotary_factor", share, share)
        positions = keys.size("max_position_embeddings", 2048)
        config = cls(
            layers=keys.size("num_hidden_layers", 44, most=MOST_LAYERS),
            hidden=hidden,
            heads=n_heads,
            mlp_width=keys.size("intermediate_size", 24576),
            vocab=keys.size("vocab_size", 50432),
            act=keys.choice("hidden_act", "gelu", ACTS),
            eps=keys.number("layer_norm_eps", 1e-5, least=0),
            rope=Rope.from_hf(keys, hidden // n_heads, positions, theta, partial=share),
            parallel=keys.flag("use_parallel_residual", True),
            attention_bias=keys.flag("attention_bias", True),
            tied=keys.flag("tie_word_embeddings", False),
        )
        keys.finish(HARMLESS)
        return config

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def qkv_width(self) -> int:
        return 3 * self.hidden


HARMLESS = frozenset(
    """attention_dropout attention_probs_dropout_prob classifier_dropout custom_pipelines gradient_checkpointing
    hidden_dropout hidden_dropout_prob""".split()
)

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    tokens: Tensor = source("embed_in.weight", "vocab", "hidden")


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor = source("input_layernorm.weight", "hidden")
    attn_norm_bias: Tensor = source("input_layernorm.bias", "hidden")
    qkv: Tensor = source("attention.query_key_value.weight", "qkv_width", "hidden")
    qkv_bias: Tensor | None = source("attention.query_key_value.bias", "qkv_width", when="attention_bias")
    o: Tensor = source("attention.dense.weight", "hidden", "hidden")
    o_bias: Tensor | None = source("attention.dense.bias", "hidden", when="attention_bias")
    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    mlp_norm_bias: Tensor = source("post_attention_layernorm.bias", "hidden")
    up: Tensor = source("mlp.dense_h_to_4h.weight", "mlp_width", "hidden")
    up_bias: Tensor = source("mlp.dense_h_to_4h.bias", "mlp_width")
    down: Tensor = source("mlp.dense_4h_to_h.weight", "hidden", "mlp_width")
    down_bias: Tensor = source("mlp.dense_4h_to_h.bias", "hidden")


@dataclass(frozen=True)
class Norm:
    weight: Tensor = source("final_layer_norm.weight", "hidden")
    bias: Tensor = source("final_layer_norm.bias", "hidden")


@dataclass(frozen=True)
class Head:
    unembed: Tensor = source("embed_out.weight", "vocab", "hidden")


# --- maths ----------------------------------------------------------------------------------------------------------


def gelu_fast(x: Tensor) -> Tensor:
    """The activation of the 20B model: `F.gelu(tanh)` with other roundings."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


ACTS = {**ACTIVATIONS, "gelu_fast": gelu_fast}


def embed(w: Embedding, c: Config, batch: Batch) -> Tensor:
    """Token ids -> ``[rows, hidden]``."""
    return F.embedding(batch.ids, w.tokens)


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """The block of the config's kind, all ``[rows, hidden]``."""
    return (parallel if c.parallel else sequential)(x, w, c, batch, tap)


def parallel(x: Tensor, w: Layer, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (mlp_out + attn_out) + residual_pre``."""
    x = tap("residual_pre", x)
    a = attend(x, w, c, batch, tap)
    return tap("residual_post", feed(x, w, c, batch, tap) + a + x)


def sequential(x: Tensor, w: Layer, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``."""
    x = tap("residual_pre", x)
    x = tap("residual_mid", x + attend(x, w, c, batch, tap))
    return tap("residual_post", x + feed(x, w, c, batch, tap))


def attend(x: Tensor, w: Layer, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """The attention branch, its norm included, up to ``attn_out``."""
    linear = batch.linear
    a = linear(layer_norm(x, w.attn_norm, w.attn_norm_bias, c.eps), w.qkv, w.qkv_bias)
    q, k, v = rearrange(a, "rows (heads three width) -> three rows heads width", three=3, heads=c.heads)
    q, k, v = tap("q", q), tap("k", k), tap("v", v)
    cos, sin = rotary(c.rope, batch, x.dtype)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    z = attention(q, k, v, batch, tap, c.head_dim**-0.5, eager=joined_probabilities, sdpa=joined_sdpa)
    return tap("attn_out", linear(tap("z", z).flatten(1), w.o, w.o_bias))


def feed(x: Tensor, w: Layer, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """The MLP branch, its norm included, up to ``mlp_out``."""
    linear = batch.linear

    def hidden(m: Tensor) -> Tensor:
        return ACTS[c.act](linear(layer_norm(m, w.mlp_norm, w.mlp_norm_bias, c.eps), w.up, w.up_bias))

    return tap("mlp_out", mlp(x, batch, tap, hidden, lambda m: linear(m, w.down, w.down_bias)))


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
        kv_heads=c.heads,
        head_dim=c.head_dim,
        mlp=dense_hooks(c.mlp_width),
        parallel=c.parallel,
    )


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = Family(
    name="GPT-NeoX",
    model_types=("gpt_neox",),
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
    prefixes=(("gpt_neox.", ""), ("", "")),
    layer_prefix="layers.{i}.",
    embedding="embed_in.weight",
    head="embed_out.weight",
    about="Pythia, GPT-NeoX-20B, Dolly 2, RedPajama-INCITE: parallel branches, rotary on a part of each head",
    ignored=(r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
