"""Gemma 3 (Gemma Team, 2025), the language model: a Gemma 2 with normalised queries and keys in place of capped scores.

    residual_pre --+-- attn_norm -- q, k, v -- q_norm, k_norm -- rope -- attention -- o -- attn_post_norm --(+)
                   '-----------------------------------------------------------------------------------------'
    residual_mid --+-- mlp_norm -- gelu(gate) * up -- down -- mlp_post_norm --(+)-- residual_post
                   '----------------------------------------------------------'

The two norms are over one head's dimensions, with weights that all heads share. Five layers of six see a window, unless
``layer_types`` or ``sliding_window_pattern`` says otherwise; they have a rope of their own, with a small base and never
scaled in old configs (``rope_local_base_freq``). Does not know images, nor the config that wraps this one around them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from . import gemma2, llama
from .batch import Batch
from .contract import MOST_LAYERS, ArchError, Keys, Tap, source
from .gemma2 import HARMLESS, KINDS
from .ops import ACTIVATIONS, Sees, attention, heads, mlp, rms_norm_gemma
from .rope import Rope, rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
"""What an absent key means."""


@dataclass(frozen=True, kw_only=True)
class Config(gemma2.Config):
    """The words of Gemma 2; ``rope`` is that of the layers that see everything, ``ropes`` has each layer's."""

    ropes: tuple[Rope, ...]

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys({**DEFAULTS, **hf})
        window, pattern = keys.size("sliding_window"), keys.size("sliding_window_pattern", 6)
        if "layer_types" not in keys:
            keys.only("_sliding_window_pattern", pattern, pattern)
        keys.only("attn_logit_softcapping", None, None)
        kinds = keys.layer_types(
            keys.size("num_hidden_layers", most=MOST_LAYERS), KINDS, lambda layer: KINDS[(layer + 1) % pattern == 0]
        )
        full, local = ropes(keys)
        config = cls.read(
            keys,
            rope=full,
            ropes=tuple(local if kind == "sliding_attention" else full for kind in kinds),
            sees=tuple(Sees(window=window if kind == "sliding_attention" else None) for kind in kinds),
            attn_cap=None,
        )
        keys.finish(HARMLESS | {"_sliding_window_pattern"})
        return config


def ropes(keys: Keys) -> tuple[Rope, Rope]:
    """The rope of layers that see everything, and of those with a window: ``rope_parameters`` has them by kind of layer
    (transformers 5), or ``rope_scaling`` has the first (before)."""
    if "rope_parameters" in keys:
        keys.only("rope_scaling", None, None)
        both = keys.nested("rope_parameters")
        full, local = both.nested("full_attention"), both.nested("sliding_attention")
        both.finish()
    else:
        full, local = keys.nested("rope_scaling"), Keys({})
        if "type" in full and "rope_type" not in full:
            raise ArchError(
                "config.json: 'rope_scaling' must name its kind 'rope_type'; transformers ignores 'type' here"
            )
    head_dim, longest = keys.size("head_dim"), keys.size("max_position_embeddings")
    return (
        Rope.read(full, Keys({}), head_dim, longest, keys.number("rope_theta", 1e6)),
        Rope.read(local, Keys({}), head_dim, longest, keys.number("rope_local_base_freq", 1e4)),
    )


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer(gemma2.Layer):
    q_norm: Tensor = source("self_attn.q_norm.weight", "head_dim")
    k_norm: Tensor = source("self_attn.k_norm.weight", "head_dim")


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    a = rms_norm_gemma(x, w.attn_norm, c.eps)
    q = tap("q", rms_norm_gemma(heads(linear(a, w.q, w.q_bias), c.head_dim), w.q_norm, c.eps))
    k = tap("k", rms_norm_gemma(heads(linear(a, w.k, w.k_bias), c.head_dim), w.k_norm, c.eps))
    v = tap("v", heads(linear(a, w.v, w.v_bias), c.head_dim))
    cos, sin = rotary(c.ropes[layer], batch, x.dtype)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    z = tap("z", attention(q, k, v, batch, tap, scale=c.scale, sees=c.sees[layer]))
    a = rms_norm_gemma(linear(z.flatten(1), w.o, w.o_bias), w.attn_post_norm, c.eps)
    x = tap("residual_mid", x + tap("attn_out", a))

    def hidden(m: Tensor) -> Tensor:
        m = rms_norm_gemma(m, w.mlp_norm, c.eps)
        return ACTIVATIONS[c.act](linear(m, w.gate)).mul_(linear(m, w.up))

    m = mlp(x, batch, tap, hidden, lambda m: rms_norm_gemma(linear(m, w.down), w.mlp_post_norm, c.eps))
    return tap("residual_post", x + tap("mlp_out", m))


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    name="Gemma 3",
    model_types=("gemma3_text",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer,
    block=block,
    attention=llama.FAMILY.attention,
    about="normalised queries and keys, windows in five layers of six, a rope for each kind of layer",
)
