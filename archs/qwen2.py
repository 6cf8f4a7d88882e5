"""Qwen 2 and 2.5 (Yang et al., 2024), Qwen 1.5: a Llama with biases on queries, keys and values, and only there.

    residual_pre --+-- attn_norm -- q, k, v (biased) -- rope -- attention -- o --(+)-- residual_mid
                   '------------------------------------------------------------'
    residual_mid --+-- mlp_norm -- act(gate) * up -- down --(+)-- residual_post
                   '-----------------------------------------'

Where ``use_sliding_window`` is on, the layers from ``max_window_layers`` upwards see a sliding window, unless
``layer_types`` says which; published files have it off. Does not know dual chunk attention, which transformers ignores,
nor the positions in three dimensions of Qwen-VL.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from . import llama
from .batch import Batch
from .contract import MOST_LAYERS, ArchError, Keys, Tap, source
from .llama import HARMLESS
from .ops import ACTIVATIONS, Sees, attention, heads, mlp, rms_norm
from .rope import Rope, rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words, and what the queries of each layer see."""

    sees: tuple[Sees, ...]

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        last_full = keys.number("max_window_layers", 28)
        config = cls.read(
            keys,
            kv_heads=keys.optional("num_key_value_heads", 32),
            attention_bias=True,
            sees=windows(keys, lambda layer: layer >= last_full),
        )
        keys.finish(HARMLESS)
        return config

    @classmethod
    def read(cls, keys: Keys, **own: Any) -> Self:
        """The words of every Qwen; ``own``: as for a Llama."""
        usual = keys.size("hidden_size") // keys.size("num_attention_heads")
        head_dim = own.get("head_dim") or keys.size("head_dim", usual)
        rope = Rope.from_hf(keys, head_dim, keys.size("max_position_embeddings", 32768))
        keys.only("use_mrope", False, False)
        return super().read(keys, mlp_bias=False, rope=rope, **own)


def windows(keys: Keys, slides: Callable[[int], bool]) -> tuple[Sees, ...]:
    """What the queries of each layer see: by ``layer_types``, or a window where ``slides(layer)``, if any is used.

    Without ``use_sliding_window`` the window's size stands in the config all the same, and means nothing.
    """
    keys.get("sliding_window")
    window = keys.optional("sliding_window", 4096) if keys.flag("use_sliding_window", False) else None
    kinds = {"full_attention": Sees(), "sliding_attention": Sees(window=window)}
    found = keys.layer_types(
        keys.size("num_hidden_layers", most=MOST_LAYERS),
        kinds,
        lambda layer: "sliding_attention" if window and slides(layer) else "full_attention",
    )
    if window is None and "sliding_attention" in found:
        raise ArchError(
            "config.json: 'layer_types' holds 'sliding_attention' where 'use_sliding_window' and 'sliding_window' say "
            "that there is no window"
        )
    return tuple(kinds[kind] for kind in found)


# --- weights --------------------------------------------------------------------------------------------------------


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
    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    gate: Tensor = source("mlp.gate_proj.weight", "mlp_width", "hidden")
    up: Tensor = source("mlp.up_proj.weight", "mlp_width", "hidden")
    down: Tensor = source("mlp.down_proj.weight", "hidden", "mlp_width")


# --- maths ----------------------------------------------------------------------------------------------------------


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
    z = tap("z", attention(q, k, v, batch, tap, scale=c.head_dim**-0.5, sees=c.sees[layer]))
    x = tap("residual_mid", x + tap("attn_out", linear(z.flatten(1), w.o)))

    def hidden(m: Tensor) -> Tensor:
        m = rms_norm(m, w.mlp_norm, c.eps)
        return ACTIVATIONS[c.act](linear(m, w.gate)).mul_(linear(m, w.up))

    m = mlp(x, batch, tap, hidden, lambda m: linear(m, w.down))
    return tap("residual_post", x + tap("mlp_out", m))


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="Qwen 2",
    model_types=("qwen2",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer,
    block=block,
    about="Qwen 1.5, 2 and 2.5, biased queries, keys and values; windows in the upper layers where they are used",
)
