"""Llama 1, 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024): pre-norm, grouped-query attention, gated MLP.

    residual_pre --+-- attn_norm -- q, k, v -- rope -- attention -- o --(+)-- residual_mid
                   '---------------------------------------------------'
    residual_mid --+-- mlp_norm -- act(gate) * up -- down --(+)-- residual_post
                   '-----------------------------------------'

Also what is a Llama under another name: Yi, SmolLM, TinyLlama, Vicuna. Does not know windows, caches or generation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.nn import functional as F

from .batch import Batch
from .contract import MOST_LAYERS, ArchError, Family, Keys, Shape, Tap, dense_hooks, layer_hooks, source
from .ops import ACTIVATIONS, attention, heads, mlp, rms_norm
from .rope import Rope, rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model in the words of the maths below."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab: int
    act: str
    eps: float
    rope: Rope
    attention_bias: bool
    mlp_bias: bool
    tied: bool
    max_positions: int | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        config = cls.read(keys)
        keys.finish(HARMLESS)
        return config

    @classmethod
    def read(cls, keys: Keys, **own: Any) -> Self:
        """The words of every Llama-like config; ``own``: what a family has besides, or reads in another way."""
        hidden, n_heads = keys.size("hidden_size"), keys.size("num_attention_heads")
        head_dim = own.get("head_dim") or keys.size("head_dim", hidden // n_heads)
        kv_heads = own.get("kv_heads") or keys.size("num_key_value_heads", n_heads)
        if head_dim == hidden // n_heads and "head_dim" not in keys and hidden % n_heads:
            raise ArchError(f"hidden_size {hidden} is not a multiple of num_attention_heads {n_heads}")
        if n_heads % kv_heads:
            raise ArchError(f"num_attention_heads {n_heads} is not a multiple of num_key_value_heads {kv_heads}")
        if head_dim % 2:
            raise ArchError(f"head_dim {head_dim} is odd: rotary embedding needs pairs")
        words: dict[str, Any] = {
            "layers": keys.size("num_hidden_layers", most=MOST_LAYERS),
            "hidden": hidden,
            "heads": n_heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "mlp_width": keys.size("intermediate_size"),
            "vocab": keys.size("vocab_size"),
            "act": own.get("act") or keys.choice("hidden_act", "silu", ACTIVATIONS),
            "eps": own.get("eps") or keys.number("rms_norm_eps", 1e-6, least=0),
            "rope": own.get("rope") or Rope.from_hf(keys, head_dim, keys.size("max_position_embeddings", 2048)),
        }
        for word, key in {
            "attention_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
            "tied": "tie_word_embeddings",
        }.items():
            words[word] = own[word] if word in own else keys.flag(key, False)
        return cls(**words | own)

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


HARMLESS = frozenset({"attention_dropout"})

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    tokens: Tensor = source("embed_tokens.weight", "vocab", "hidden")


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
    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    gate: Tensor = source("mlp.gate_proj.weight", "mlp_width", "hidden")
    up: Tensor = source("mlp.up_proj.weight", "mlp_width", "hidden")
    down: Tensor = source("mlp.down_proj.weight", "hidden", "mlp_width")
    gate_bias: Tensor | None = source("mlp.gate_proj.bias", "mlp_width", when="mlp_bias")
    up_bias: Tensor | None = source("mlp.up_proj.bias", "mlp_width", when="mlp_bias")
    down_bias: Tensor | None = source("mlp.down_proj.bias", "hidden", when="mlp_bias")


@dataclass(frozen=True)
class Norm:
    weight: Tensor = source("norm.weight", "hidden")


@dataclass(frozen=True)
class Head:
    unembed: Tensor = source("lm_head.weight", "vocab", "hidden")


# --- maths ----------------------------------------------------------------------------------------------------------


def embed(w: Embedding, c: Config, batch: Batch) -> Tensor:
    """Token ids -> ``[rows, hidden]``."""
    return F.embedding(batch.ids, w.tokens)


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
    z = tap("z", attention(q, k, v, batch, tap, scale=c.head_dim**-0.5))
    x = tap("residual_mid", x + tap("attn_out", linear(z.flatten(1), w.o, w.o_bias)))

    def hidden(m: Tensor) -> Tensor:
        m = rms_norm(m, w.mlp_norm, c.eps)
        return ACTIVATIONS[c.act](linear(m, w.gate, w.gate_bias)).mul_(linear(m, w.up, w.up_bias))

    m = mlp(x, batch, tap, hidden, lambda m: linear(m, w.down, w.down_bias))
    return tap("residual_post", x + tap("mlp_out", m))


def final_norm(x: Tensor, w: Norm, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, hidden]``."""
    return rms_norm(x, w.weight, c.eps)


def unembed(x: Tensor, w: Head, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, vocab]``."""
    return batch.linear(x, w.unembed)


def hooks(c: Config, layer: int) -> dict[str, Shape]:
    """Shape behind the rows at every hook of a layer."""
    return layer_hooks(
        hidden=c.hidden, heads=c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim, mlp=dense_hooks(c.mlp_width)
    )


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = Family(
    name="Llama",
    model_types=("llama",),
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
    about="Llama 1 to 3.3, Yi, SmolLM, TinyLlama, Vicuna",
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq"),
)
