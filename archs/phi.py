"""Phi 1, 1.5 and 2 (Gunasekar et al., 2023): one LayerNorm for two parallel branches, partly rotated heads, biases.

    residual_pre --+-- norm --+-- q, k, v -- rope -- attention -- dense --(+)--(+)-- residual_post
                   |          '-- act(fc1) -- fc2 ------------------------'    |
                   '-----------------------------------------------------------'

The sum is ``(attn_out + mlp_out) + residual_pre``. Every matrix has a bias, the head's too. Half of each head is
rotated unless the config says otherwise. With ``qk_layernorm`` queries and keys pass a LayerNorm over a head's width,
shared by all heads. Does not know the files of before transformers' own Phi, whose projections are fused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .batch import Batch
from .contract import MOST_LAYERS, ArchError, Family, Keys, Shape, Tap, dense_hooks, layer_hooks, source
from .ops import ACTIVATIONS, attention, heads, joined_probabilities, joined_sdpa, layer_norm, mlp
from .rope import Rope, rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model in the words of the maths below."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocab: int
    act: str
    eps: float
    rope: Rope
    qk_norm: bool
    tied: bool
    max_positions: int | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        keys = Keys(hf)
        hidden, n_heads = keys.size("hidden_size", 2048), keys.size("num_attention_heads", 32)
        kv_heads, positions = keys.size("num_key_value_heads", n_heads), keys.size("max_position_embeddings", 2048)
        if hidden % n_heads:
            raise ArchError(f"hidden_size {hidden} is not a multiple of num_attention_heads {n_heads}")
        if n_heads % kv_heads:
            raise ArchError(f"num_attention_heads {n_heads} is not a multiple of num_key_value_heads {kv_heads}")
        config = cls(
            layers=keys.size("num_hidden_layers", 24, most=MOST_LAYERS),
            hidden=hidden,
            heads=n_heads,
            kv_heads=kv_heads,
            mlp_width=keys.size("intermediate_size", 8192),
            vocab=keys.size("vocab_size", 51200),
            act=keys.choice("hidden_act", "gelu_new", ACTIVATIONS),
            eps=keys.number("layer_norm_eps", 1e-5, least=0),
            rope=Rope.from_hf(keys, hidden // n_heads, positions, partial=0.5),
            qk_norm=keys.flag("qk_layernorm", False),
            tied=keys.flag("tie_word_embeddings", False),
        )
        keys.finish(HARMLESS)
        return config

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


HARMLESS = frozenset({"attention_dropout", "embd_pdrop", "resid_pdrop"})

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    tokens: Tensor = source("embed_tokens.weight", "vocab", "hidden")


@dataclass(frozen=True)
class Layer:
    norm: Tensor = source("input_layernorm.weight", "hidden")
    norm_bias: Tensor = source("input_layernorm.bias", "hidden")
    q: Tensor = source("self_attn.q_proj.weight", "hidden", "hidden")
    k: Tensor = source("self_attn.k_proj.weight", "kv_width", "hidden")
    v: Tensor = source("self_attn.v_proj.weight", "kv_width", "hidden")
    o: Tensor = source("self_attn.dense.weight", "hidden", "hidden")
    q_bias: Tensor = source("self_attn.q_proj.bias", "hidden")
    k_bias: Tensor = source("self_attn.k_proj.bias", "kv_width")
    v_bias: Tensor = source("self_attn.v_proj.bias", "kv_width")
    o_bias: Tensor = source("self_attn.dense.bias", "hidden")
    q_norm: Tensor | None = source("self_attn.q_layernorm.weight", "head_dim", when="qk_norm")
    q_norm_bias: Tensor | None = source("self_attn.q_layernorm.bias", "head_dim", when="qk_norm")
    k_norm: Tensor | None = source("self_attn.k_layernorm.weight", "head_dim", when="qk_norm")
    k_norm_bias: Tensor | None = source("self_attn.k_layernorm.bias", "head_dim", when="qk_norm")
    up: Tensor = source("mlp.fc1.weight", "mlp_width", "hidden")
    up_bias: Tensor = source("mlp.fc1.bias", "mlp_width")
    down: Tensor = source("mlp.fc2.weight", "hidden", "mlp_width")
    down_bias: Tensor = source("mlp.fc2.bias", "hidden")


@dataclass(frozen=True)
class Norm:
    weight: Tensor = source("final_layernorm.weight", "hidden")
    bias: Tensor = source("final_layernorm.bias", "hidden")


@dataclass(frozen=True)
class Head:
    unembed: Tensor = source("lm_head.weight", "vocab", "hidden")
    bias: Tensor = source("lm_head.bias", "vocab")


# --- maths ----------------------------------------------------------------------------------------------------------


def embed(w: Embedding, c: Config, batch: Batch) -> Tensor:
    """Token ids -> ``[rows, hidden]``."""
    return F.embedding(batch.ids, w.tokens)


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (attn_out + mlp_out) + residual_pre``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    n = layer_norm(x, w.norm, w.norm_bias, c.eps)
    q = heads(linear(n, w.q, w.q_bias), c.head_dim)
    k = heads(linear(n, w.k, w.k_bias), c.head_dim)
    v = heads(linear(n, w.v, w.v_bias), c.head_dim)
    if c.qk_norm:
        q, k = layer_norm(q, w.q_norm, w.q_norm_bias, c.eps), layer_norm(k, w.k_norm, w.k_norm_bias, c.eps)
    q, k, v = tap("q", q), tap("k", k), tap("v", v)
    cos, sin = rotary(c.rope, batch, x.dtype)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    z = attention(q, k, v, batch, tap, c.head_dim**-0.5, eager=joined_probabilities, sdpa=joined_sdpa)
    a = tap("attn_out", linear(tap("z", z).flatten(1), w.o, w.o_bias))

    def hidden(m: Tensor) -> Tensor:
        return ACTIVATIONS[c.act](linear(m, w.up, w.up_bias))

    m = tap("mlp_out", mlp(n, batch, tap, hidden, lambda m: linear(m, w.down, w.down_bias)))
    return tap("residual_post", a + m + x)


def final_norm(x: Tensor, w: Norm, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, hidden]``."""
    return layer_norm(x, w.weight, w.bias, c.eps)


def unembed(x: Tensor, w: Head, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, vocab]``."""
    return batch.linear(x, w.unembed, w.bias)


def hooks(c: Config, layer: int) -> dict[str, Shape]:
    """Shape behind the rows at every hook of a layer."""
    return layer_hooks(
        hidden=c.hidden,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        mlp=dense_hooks(c.mlp_width),
        parallel=True,
    )


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = Family(
    name="Phi",
    model_types=("phi",),
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
    prefixes=(("model.", ""), ("", "")),
    layer_prefix="layers.{i}.",
    embedding="embed_tokens.weight",
    head="lm_head.weight",
    about="Phi 1, 1.5 and 2: parallel branches behind one norm, biases everywhere",
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
