"""SmolLM3 (Hugging Face, 2025): a Llama some of whose layers do not rotate queries and keys.

    residual_pre --+-- attn_norm -- q, k, v -- rope or none -- attention -- o --(+)-- residual_mid
                   '-----------------------------------------------------------'
    residual_mid --+-- mlp_norm -- act(gate) * up -- down --(+)-- residual_post
                   '-----------------------------------------'

In a layer without rope, every fourth by default (Yang et al., 2025, "RoPE to NoRope and back again"), ``q_rot`` is
``q``. Where ``use_sliding_window`` is on, the layers without rope see a window, unless ``layer_types`` says which do;
published files have it off. Does not know caches or generation.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from . import llama
from .batch import Batch
from .contract import MOST_LAYERS, ArchError, Keys, Tap
from .llama import Layer
from .ops import ACTIVATIONS, Sees, attention, heads, mlp, rms_norm
from .rope import Rope, rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words, which layers rotate, and what the queries of each layer see."""

    rotates: tuple[bool, ...]
    sees: tuple[Sees, ...]

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers", most=MOST_LAYERS)
        head_dim = keys.size("head_dim", hidden // keys.size("num_attention_heads"))
        rotates = rotating(keys, layers)
        config = cls.read(
            keys,
            kv_heads=keys.optional("num_key_value_heads", 4),
            rope=Rope.from_hf(keys, head_dim, keys.size("max_position_embeddings", 32768), 2e6),
            tied=keys.flag("tie_word_embeddings", True),
            rotates=rotates,
            sees=windows(keys, rotates),
        )
        keys.finish(HARMLESS)
        return config


def rotating(keys: Keys, layers: int) -> tuple[bool, ...]:
    """Which layers rotate: 1 of ``no_rope_layers``, or all but every fourth."""
    interval, listed = keys.size("no_rope_layer_interval", 4), keys.sequence("no_rope_layers", int)
    if listed is None:
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if len(listed) < layers:
        raise ArchError(f"config.json: 'no_rope_layers' has {len(listed)} entries where {layers} are needed")
    return tuple(map(bool, listed[:layers]))


def windows(keys: Keys, rotates: tuple[bool, ...]) -> tuple[Sees, ...]:
    """What the queries of each layer see."""
    size = keys.optional("sliding_window")
    window = size if keys.flag("use_sliding_window", False) else None
    found = keys.layer_types(
        len(rotates),
        ("full_attention", "sliding_attention"),
        lambda layer: "sliding_attention" if window and not rotates[layer] else "full_attention",
    )
    if window is None and "sliding_attention" in found:
        raise ArchError(
            "config.json: 'layer_types' holds 'sliding_attention' where 'use_sliding_window' and 'sliding_window' say "
            "that there is no window"
        )
    return tuple(Sees(window=window if kind == "sliding_attention" else None) for kind in found)


HARMLESS = llama.HARMLESS | {"max_window_layers"}

# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    a = rms_norm(x, w.attn_norm, c.eps)
    q = tap("q", heads(linear(a, w.q, w.q_bias), c.head_dim))
    k = tap("k", heads(linear(a, w.k, w.k_bias), c.head_dim))
    v = tap("v", heads(linear(a, w.v, w.v_bias), c.head_dim))
    if c.rotates[layer]:
        cos, sin = rotary(c.rope, batch, x.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    q, k = tap("q_rot", q), tap("k_rot", k)
    z = tap("z", attention(q, k, v, batch, tap, scale=c.head_dim**-0.5, sees=c.sees[layer]))
    x = tap("residual_mid", x + tap("attn_out", linear(z.flatten(1), w.o, w.o_bias)))

    def hidden(m: Tensor) -> Tensor:
        m = rms_norm(m, w.mlp_norm, c.eps)
        return ACTIVATIONS[c.act](linear(m, w.gate, w.gate_bias)).mul_(linear(m, w.up, w.up_bias))

    m = mlp(x, batch, tap, hidden, lambda m: linear(m, w.down, w.down_bias))
    return tap("residual_post", x + tap("mlp_out", m))


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="SmolLM3",
    model_types=("smollm3",),
    config=Config.from_hf,
    block=block,
    about="every fourth layer without rope; windows there where they are used",
)
