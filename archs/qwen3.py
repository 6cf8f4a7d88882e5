"""Qwen 3 (Yang et al., 2025): a Llama that normalises every head's query and key before it rotates them.

    residual_pre --+-- attn_norm -- q, k, v -- q_norm, k_norm -- rope -- attention -- o --(+)-- residual_mid
                   '---------------------------------------------------------------------'
    residual_mid --+-- mlp_norm -- act(gate) * up -- down --(+)-- residual_post
                   '-----------------------------------------'

The two norms are over one head's dimensions, with weights that all heads share. A head has 128 dimensions whatever the
width of the model, unless the config says otherwise. Windows are as in Qwen 2. Does not know caches or generation.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from . import llama, qwen2
from .batch import Batch
from .contract import Keys, Tap, source
from .llama import HARMLESS
from .ops import ACTIVATIONS, attention, heads, mlp, rms_norm
from .qwen2 import windows
from .rope import rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(qwen2.Config):
    """The words of Qwen 2; attention may have biases, then on its output too."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        last_full = keys.number("max_window_layers", 28)
        config = cls.read(
            keys,
            kv_heads=keys.optional("num_key_value_heads", 32),
            head_dim=keys.size("head_dim", 128),
            sees=windows(keys, lambda layer: layer >= last_full),
        )
        keys.finish(HARMLESS)
        return config


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer(llama.Layer):
    q_norm: Tensor = source("self_attn.q_norm.weight", "head_dim")
    k_norm: Tensor = source("self_attn.k_norm.weight", "head_dim")


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    a = rms_norm(x, w.attn_norm, c.eps)
    q = tap("q", rms_norm(heads(linear(a, w.q, w.q_bias), c.head_dim), w.q_norm, c.eps))
    k = tap("k", rms_norm(heads(linear(a, w.k, w.k_bias), c.head_dim), w.k_norm, c.eps))
    v = tap("v", heads(linear(a, w.v, w.v_bias), c.head_dim))
    cos, sin = rotary(c.rope, batch, x.dtype)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    z = tap("z", attention(q, k, v, batch, tap, scale=c.head_dim**-0.5, sees=c.sees[layer]))
    x = tap("residual_mid", x + tap("attn_out", linear(z.flatten(1), w.o, w.o_bias)))

    def hidden(m: Tensor) -> Tensor:
        m = rms_norm(m, w.mlp_norm, c.eps)
        return ACTIVATIONS[c.act](linear(m, w.gate)).mul_(linear(m, w.up))

    m = mlp(x, batch, tap, hidden, lambda m: linear(m, w.down))
    return tap("residual_post", x + tap("mlp_out", m))


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    qwen2.FAMILY,
    name="Qwen 3",
    model_types=("qwen3",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer,
    block=block,
    about="normalised queries and keys; heads of 128 dimensions whatever the width",
)
