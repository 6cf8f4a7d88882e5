"""Command R (Cohere, 2024): one norm for two parallel branches, neighbouring dimensions rotated, scaled logits.

    residual_pre --+-- norm --+-- q, k, v -- rope -- attention -- o --(+)--.
                   |          '-- act(gate) * up -- down -------------|---(+)-- residual_post
                   '--------------------------------------------------'

The sum is ``(residual_pre + attn_out) + mlp_out``. Norms are LayerNorms without bias, computed and scaled in fp32; with
``use_qk_norm`` (Command R+) queries and keys have them too, with a weight for each head. Rotations are in fp32 by
tables in the model's dtype. Logits are multiplied by ``logit_scale``. Does not know Command R7B and later models
(Cohere 2), which have windows and layers without rotation.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from . import llama
from .batch import Batch
from .contract import Keys, Shape, Tap, dense_hooks, layer_hooks, source
from .llama import Head
from .ops import ACTIVATIONS, attention, by_parts, heads, mlp
from .rope import Rope, rotary, rotate_pairs

# --- config ---------------------------------------------------------------------------------------------------------

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""What an absent key means."""


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words, whether heads have norms, and what logits are multiplied by."""

    qk_norm: bool
    logit_scale: float

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys({**DEFAULTS, **hf})
        head_dim = keys.size("head_dim", keys.size("hidden_size") // keys.size("num_attention_heads"))
        config = cls.read(
            keys,
            eps=keys.number("layer_norm_eps", 1e-5, least=0),
            rope=Rope.from_hf(keys, head_dim, keys.size("max_position_embeddings"), 500000.0),
            mlp_bias=False,
            qk_norm=keys.flag("use_qk_norm", False),
            logit_scale=keys.number("logit_scale", 0.0625),
        )
        keys.finish(HARMLESS)
        return config


HARMLESS = llama.HARMLESS | {"model_max_length"}

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    norm: Tensor = source("input_layernorm.weight", "hidden")
    q: Tensor = source("self_attn.q_proj.weight", "q_width", "hidden")
    k: Tensor = source("self_attn.k_proj.weight", "kv_width", "hidden")
    v: Tensor = source("self_attn.v_proj.weight", "kv_width", "hidden")
    o: Tensor = source("self_attn.o_proj.weight", "hidden", "q_width")
    q_bias: Tensor | None = source("self_attn.q_proj.bias", "q_width", when="attention_bias")
    k_bias: Tensor | None = source("self_attn.k_proj.bias", "kv_width", when="attention_bias")
    v_bias: Tensor | None = source("self_attn.v_proj.bias", "kv_width", when="attention_bias")
    o_bias: Tensor | None = source("self_attn.o_proj.bias", "hidden", when="attention_bias")
    q_norm: Tensor | None = source("self_attn.q_norm.weight", "heads", "head_dim", when="qk_norm")
    k_norm: Tensor | None = source("self_attn.k_norm.weight", "kv_heads", "head_dim", when="qk_norm")
    gate: Tensor = source("mlp.gate_proj.weight", "mlp_width", "hidden")
    up: Tensor = source("mlp.up_proj.weight", "mlp_width", "hidden")
    down: Tensor = source("mlp.down_proj.weight", "hidden", "mlp_width")


# --- maths ----------------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension without bias, in fp32 up to the one rounding at the end."""

    def whole(x: Tensor) -> Tensor:
        exact = x.float()
        centred = exact - exact.mean(-1, keepdim=True)
        scaled = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
        return (weight.float() * scaled).to(x.dtype)

    return by_parts(whole, x)


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    n = norm(x, w.norm, c.eps)
    q = heads(linear(n, w.q, w.q_bias), c.head_dim)
    k = heads(linear(n, w.k, w.k_bias), c.head_dim)
    v = heads(linear(n, w.v, w.v_bias), c.head_dim)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = norm(q, w.q_norm, c.eps), norm(k, w.k_norm, c.eps)
    q, k, v = tap("q", q), tap("k", k), tap("v", v)
    cos, sin = rotary(c.rope, batch, x.dtype)
    q, k = (rotate_pairs(part.float(), cos, sin).to(x.dtype) for part in (q, k))
    z = tap("z", attention(tap("q_rot", q), tap("k_rot", k), v, batch, tap, c.head_dim**-0.5))
    a = tap("attn_out", linear(z.flatten(1), w.o, w.o_bias))

    def hidden(m: Tensor) -> Tensor:
        return ACTIVATIONS[c.act](linear(m, w.gate)).mul_(linear(m, w.up))

    m = tap("mlp_out", mlp(n, batch, tap, hidden, lambda m: linear(m, w.down)))
    return tap("residual_post", x + a + m)


def final_norm(x: Tensor, w: llama.Norm, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, hidden]``."""
    return norm(x, w.weight, c.eps)


def unembed(x: Tensor, w: Head, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, vocab]``."""
    return batch.linear(x, w.unembed) * c.logit_scale


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

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="Cohere",
    model_types=("cohere",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer,
    block=block,
    final_norm=final_norm,
    unembed=unembed,
    hooks=hooks,
    about="Command R and R+, Aya 23: parallel branches behind one norm, interleaved rotary, scaled logits",
)
