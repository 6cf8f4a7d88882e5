"""OLMo (Groeneveld et al., 2024): a Llama whose norms have no weights; queries, keys and values may be clipped.

    residual_pre --+-- norm -- q, k, v -- clip -- rope -- attention -- o --(+)-- residual_mid
                   '--------------------------------------------------------'
    residual_mid --+-- norm -- act(gate) * up -- down --(+)-- residual_post
                   '-------------------------------------'

The norm is a LayerNorm in fp32 without weight or bias, whose epsilon is not in the config; the final norm is one too.
Rope is in fp32 throughout. Does not know OLMo 2, another model in all but the name.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from . import llama
from .batch import Batch
from .contract import ArchError, Keys, Tap, source
from .llama import HARMLESS
from .ops import ACTIVATIONS, attention, by_parts, heads, layer_norm, mlp
from .rope import rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words. clip: the largest size of a query's, key's or value's element."""

    clip: float | None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        for key in ("layer_norm_eps", "norm_eps", "rms_norm_eps"):
            if key in keys:
                raise ArchError(f"config.json: {key!r} is not supported by this family, whose epsilon is always 1e-5")
        clip = keys.number("clip_qkv", least=0) if "clip_qkv" in keys else keys.get("clip_qkv")
        config = cls.read(keys, mlp_bias=False, eps=1e-5, clip=clip)
        keys.finish(HARMLESS)
        return config


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    q: Tensor = source("self_attn.q_proj.weight", "q_width", "hidden")
    k: Tensor = source("self_attn.k_proj.weight", "kv_width", "hidden")
    v: Tensor = source("self_attn.v_proj.weight", "kv_width", "hidden")
    o: Tensor = source("self_attn.o_proj.weight", "hidden", "q_width")
    q_bias: Tensor | None = source("self_attn.q_proj.bias", "q_width", when="attention_bias")
    k_bias: Tensor | None = source("self_attn.k_proj.bias", "kv_width", when="attention_bias")
    v_bias: Tensor | None = source("self_attn.v_proj.bias", "kv_width", when="attention_bias")
    o_bias: Tensor | None = source("self_attn.o_proj.bias", "hidden", when="attention_bias")
    gate: Tensor = source("mlp.gate_proj.weight", "mlp_width", "hidden")
    up: Tensor = source("mlp.up_proj.weight", "mlp_width", "hidden")
    down: Tensor = source("mlp.down_proj.weight", "hidden", "mlp_width")


@dataclass(frozen=True)
class Norm:
    """Nothing is stored."""


# --- maths ----------------------------------------------------------------------------------------------------------


def norm(x: Tensor, c: Config) -> Tensor:
    """LayerNorm without weights, in fp32, rounded to the dtype of ``x [rows, width]``."""
    return by_parts(lambda x: layer_norm(x.float(), None, None, c.eps).to(x.dtype), x)


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    def clipped(x: Tensor) -> Tensor:
        return x if c.clip is None else x.clamp_(-c.clip, c.clip)

    a = norm(x, c)
    q = tap("q", heads(clipped(linear(a, w.q, w.q_bias)), c.head_dim))
    k = tap("k", heads(clipped(linear(a, w.k, w.k_bias)), c.head_dim))
    v = tap("v", heads(clipped(linear(a, w.v, w.v_bias)), c.head_dim))
    cos, sin = rotary(c.rope, batch, torch.float32)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    z = tap("z", attention(q, k, v, batch, tap, scale=c.head_dim**-0.5))
    x = tap("residual_mid", x + tap("attn_out", linear(z.flatten(1), w.o, w.o_bias)))

    def hidden(m: Tensor) -> Tensor:
        m = norm(m, c)
        return ACTIVATIONS[c.act](linear(m, w.gate)).mul_(linear(m, w.up))

    m = mlp(x, batch, tap, hidden, lambda m: linear(m, w.down))
    return tap("residual_post", x + tap("mlp_out", m))


def final_norm(x: Tensor, w: Norm, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, hidden]``."""
    return norm(x, c)


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="OLMo",
    model_types=("olmo",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer,
    norm_weights=Norm,
    block=block,
    final_norm=final_norm,
    about="norms without weights, clipped queries, keys and values",
)
