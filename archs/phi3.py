"""Phi-3, 3.5 and 4, mini and medium (Abdin et al., 2024): a Llama with fused projections, long rope and a window.

The residual stream is a Llama's. Queries, keys and values come from one projection, gate and up from another. The rope
type ``longrope`` is called ``su`` or ``yarn`` in old files; other types than that and ``default`` are refused, as in
transformers. The original context is ``original_max_position_embeddings`` at the top level, 4,096 where that is absent,
whatever the rope's own mapping says. Does not know Phi-3-small (another architecture) nor images.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from . import llama
from .batch import Batch
from .contract import ArchError, Keys, Tap, source
from .ops import ACTIVATIONS, Sees, attention, heads, joined_probabilities, joined_sdpa, mlp, rms_norm
from .rope import Rope, rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words, and the window."""

    sees: Sees

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys({"original_max_position_embeddings": 4096, **renamed(hf)})
        for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
            keys.only(name, False, False)
        for name in ("full_attn_mod", "interpolate_factor"):
            keys.only(name, 1, 1)
        head_dim = keys.size("head_dim", keys.size("hidden_size") // keys.size("num_attention_heads"))
        rope = Rope.from_hf(keys, head_dim, keys.size("max_position_embeddings", 4096), partial=1.0)
        if rope.kind not in ("default", "longrope"):
            raise ArchError(f"config.json: rope type {rope.kind!r} is not supported; supported: default, longrope")
        keys.get("original_max_position_embeddings")
        config = cls.read(
            keys,
            eps=keys.number("rms_norm_eps", 1e-5, least=0),
            rope=rope,
            attention_bias=False,
            mlp_bias=False,
            sees=Sees(window=keys.optional("sliding_window")),
        )
        keys.finish(HARMLESS)
        return config

    @property
    def qkv_width(self) -> int:
        return self.q_width + 2 * self.kv_width

    @property
    def gate_up_width(self) -> int:
        return 2 * self.mlp_width


def renamed(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config with today's name for its rope: here ``yarn`` never meant what it does elsewhere."""
    out = dict(hf)
    for name in ("rope_scaling", "rope_parameters"):
        scaled = hf.get(name)
        if isinstance(scaled, Mapping):
            kind = scaled.get("rope_type", scaled.get("type"))
            out[name] = {**scaled, "rope_type": "longrope"} if kind in ("su", "yarn") else scaled
    return out


HARMLESS = llama.HARMLESS | {"embd_pdrop", "resid_pdrop"}

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor = source("input_layernorm.weight", "hidden")
    qkv: Tensor = source("self_attn.qkv_proj.weight", "qkv_width", "hidden")
    o: Tensor = source("self_attn.o_proj.weight", "hidden", "q_width")
    mlp_norm: Tensor = source("post_attention_layernorm.weight", "hidden")
    gate_up: Tensor = source("mlp.gate_up_proj.weight", "gate_up_width", "hidden")
    down: Tensor = source("mlp.down_proj.weight", "hidden", "mlp_width")


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    qkv = heads(linear(rms_norm(x, w.attn_norm, c.eps), w.qkv), c.head_dim)
    q = tap("q", qkv[:, : c.heads])
    k = tap("k", qkv[:, c.heads : c.heads + c.kv_heads])
    v = tap("v", qkv[:, c.heads + c.kv_heads :])
    cos, sin = rotary(c.rope, batch, x.dtype)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    scale = c.head_dim**-0.5
    z = attention(q, k, v, batch, tap, scale, sees=c.sees, eager=joined_probabilities, sdpa=joined_sdpa)
    x = tap("residual_mid", x + tap("attn_out", linear(tap("z", z).flatten(1), w.o)))

    def hidden(m: Tensor) -> Tensor:
        gate, up = linear(rms_norm(m, w.mlp_norm, c.eps), w.gate_up).chunk(2, dim=-1)
        return ACTIVATIONS[c.act](gate).mul_(up)

    m = mlp(x, batch, tap, hidden, lambda m: linear(m, w.down))
    return tap("residual_post", x + tap("mlp_out", m))


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="Phi 3",
    model_types=("phi3",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Layer,
    block=block,
    about="fused projections, long rope, a window; Phi 3 to 4",
    ignored=(),
)
