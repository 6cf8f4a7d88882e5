"""OLMo 3 (OLMo et al., 2025): an OLMo 2 in which three layers of four see a sliding window.

The residual stream is OLMo 2's. Layers of the two kinds have ropes of their own: a stretched one (``rope_scaling``) is
for full layers only. Transformers does not apply a ``rope_theta`` off its default to sliding layers, nor a
``rope_scaling`` under its oldest name, nor ``rope_parameters`` without kinds of layers; such configs are refused.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from . import olmo2
from .batch import Batch
from .contract import MOST_LAYERS, ArchError, Keys, Tap
from .llama import HARMLESS
from .olmo2 import Layer
from .ops import ACTIVATIONS, Sees, attention, heads, mlp, rms_norm_late
from .rope import Rope, rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------

THETA = 500000.0


@dataclass(frozen=True, kw_only=True)
class Config(olmo2.Config):
    """OLMo 2's words, where ``rope`` is that of full layers; ropes, sees: of each layer."""

    ropes: tuple[Rope, ...]
    sees: tuple[Sees, ...]

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        window = keys.optional("sliding_window", 4096)
        sees = {"full_attention": Sees(), "sliding_attention": Sees(window=window)}
        found = keys.layer_types(
            keys.size("num_hidden_layers", most=MOST_LAYERS),
            sees,
            lambda layer: "full_attention" if layer % 4 == 3 else "sliding_attention",
        )
        if window is None and "sliding_attention" in found:
            raise ArchError("config.json: 'sliding_window' is null, yet there are layers of type 'sliding_attention'")
        full, sliding = both(keys)
        ropes = {"full_attention": full, "sliding_attention": sliding}
        config = cls.read(
            keys,
            mlp_bias=False,
            eps=keys.number("rms_norm_eps", 1e-5, least=0),
            rope=full,
            ropes=tuple(ropes[kind] for kind in found),
            sees=tuple(sees[kind] for kind in found),
        )
        keys.finish(HARMLESS)
        return config


def both(keys: Keys) -> tuple[Rope, Rope]:
    """The ropes of full layers and of sliding ones."""
    head_dim = keys.size("head_dim", keys.size("hidden_size") // keys.size("num_attention_heads"))
    most, theta = keys.size("max_position_embeddings", 2048), keys.number("rope_theta", THETA)
    kinds, scaling = keys.nested("rope_parameters"), keys.nested("rope_scaling")
    full, sliding = kinds.nested("full_attention"), kinds.nested("sliding_attention")
    kinds.finish()
    if "rope_scaling" in keys:
        if "rope_parameters" in keys or "rope_type" not in scaling:
            raise ArchError("config.json: 'rope_scaling' needs a 'rope_type', and no 'rope_parameters' beside it")
        full = scaling
    if theta != THETA and "rope_theta" not in sliding:
        raise ArchError(f"config.json: 'rope_theta' = {theta} is not supported; give one to each kind of layers")
    return Rope.read(full, keys, head_dim, most, theta), Rope.read(sliding, keys, head_dim, most, THETA)


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    q = tap("q", heads(rms_norm_late(linear(x, w.q, w.q_bias), w.q_norm, c.eps), c.head_dim))
    k = tap("k", heads(rms_norm_late(linear(x, w.k, w.k_bias), w.k_norm, c.eps), c.head_dim))
    v = tap("v", heads(linear(x, w.v, w.v_bias), c.head_dim))
    cos, sin = rotary(c.ropes[layer], batch, torch.float32)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    z = tap("z", attention(q, k, v, batch, tap, scale=c.head_dim**-0.5, sees=c.sees[layer]))
    a = rms_norm_late(linear(z.flatten(1), w.o, w.o_bias), w.attn_norm, c.eps)
    x = tap("residual_mid", x + tap("attn_out", a))

    def hidden(m: Tensor) -> Tensor:
        return ACTIVATIONS[c.act](linear(m, w.gate)).mul_(linear(m, w.up))

    m = mlp(x, batch, tap, hidden, lambda m: rms_norm_late(linear(m, w.down), w.mlp_norm, c.eps))
    return tap("residual_post", x + tap("mlp_out", m))


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    olmo2.FAMILY,
    name="OLMo 3",
    model_types=("olmo3",),
    config=Config.from_hf,
    block=block,
    about="an OLMo 2 with windows in three layers of four, whose rope is not stretched",
)
