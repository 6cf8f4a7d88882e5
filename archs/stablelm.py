"""StableLM 3B and 2 (Bellagente et al., 2024): a Llama with LayerNorm and partly rotated heads; 12B is parallel.

    residual_pre --+-- attn_norm -- q, k, v -- rope -- attention -- o --(+)-- residual_mid
                   '---------------------------------------------------'
    residual_mid --+-- mlp_norm -- act(gate) * up -- down --(+)-- residual_post
                   '-----------------------------------------'

With ``use_parallel_residual`` the MLP reads what the attention reads, behind the one norm there is:
``residual_post = (residual_pre + attn_out) + mlp_out``. With ``qk_layernorm`` each head of the queries and of the keys
has a LayerNorm of its own, without bias. A quarter of each head is rotated unless the config says otherwise. Does not
know StableLM Alpha, which is a GPT-NeoX.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from . import llama
from .batch import Batch
from .contract import ArchError, Keys, Shape, Tap, dense_hooks, layer_hooks, source
from .ops import ACTIVATIONS, attention, heads, joined_probabilities, joined_sdpa, layer_norm, mlp
from .rope import Rope, rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
"""What an absent key means."""


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words, how the branches lie, and whether heads have norms."""

    parallel: bool
    qk_norm: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys({**DEFAULTS, **hf})
        hidden, n_heads = keys.size("hidden_size"), keys.size("num_attention_heads")
        if hidden % n_heads:
            raise ArchError(f"hidden_size {hidden} is not a multiple of num_attention_heads {n_heads}")
        config = cls.read(
            keys,
            head_dim=hidden // n_heads,
            eps=keys.number("layer_norm_eps", 1e-5, least=0),
            rope=Rope.from_hf(keys, hidden // n_heads, keys.size("max_position_embeddings"), partial=0.25),
            attention_bias=keys.flag("use_qkv_bias", False),
            mlp_bias=False,
            parallel=keys.flag("use_parallel_residual", False),
            qk_norm=keys.flag("qk_layernorm", False),
        )
        keys.finish(HARMLESS)
        return config

    @property
    def sequential(self) -> bool:
        return not self.parallel


HARMLESS = llama.HARMLESS | {"hidden_dropout"}

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer; `layer_weights` says where the norms of its heads lie."""

    q_norm: Tensor | None
    k_norm: Tensor | None
    attn_norm: Tensor = source("input_layernorm.weight", "hidden")
    attn_norm_bias: Tensor = source("input_layernorm.bias", "hidden")
    q: Tensor = source("self_attn.q_proj.weight", "q_width", "hidden")
    k: Tensor = source("self_attn.k_proj.weight", "kv_width", "hidden")
    v: Tensor = source("self_attn.v_proj.weight", "kv_width", "hidden")
    o: Tensor = source("self_attn.o_proj.weight", "hidden", "q_width")
    q_bias: Tensor | None = source("self_attn.q_proj.bias", "q_width", when="attention_bias")
    k_bias: Tensor | None = source("self_attn.k_proj.bias", "kv_width", when="attention_bias")
    v_bias: Tensor | None = source("self_attn.v_proj.bias", "kv_width", when="attention_bias")
    mlp_norm: Tensor | None = source("post_attention_layernorm.weight", "hidden", when="sequential")
    mlp_norm_bias: Tensor | None = source("post_attention_layernorm.bias", "hidden", when="sequential")
    gate: Tensor = source("mlp.gate_proj.weight", "mlp_width", "hidden")
    up: Tensor = source("mlp.up_proj.weight", "mlp_width", "hidden")
    down: Tensor = source("mlp.down_proj.weight", "hidden", "mlp_width")


@cache
def layer_weights(n_heads: int, kv_heads: int) -> type[Layer]:
    """`Layer` with ``q_norm [heads * head_dim]`` and ``k_norm``, of which files hold a tensor for each head."""

    def per_head(name: str, count: int) -> Any:
        names = tuple(f"self_attn.{name}.norms.{head}.weight" for head in range(count))
        return source(names, "head_dim", when="qk_norm")

    norms = {"q_norm": per_head("q_layernorm", n_heads), "k_norm": per_head("k_layernorm", kv_heads)}
    fields = [(name, Tensor | None, field) for name, field in norms.items()]
    return dataclasses.make_dataclass("Layer", fields, bases=(Layer,), frozen=True)


@dataclass(frozen=True)
class Norm:
    weight: Tensor = source("norm.weight", "hidden")
    bias: Tensor = source("norm.bias", "hidden")


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    x = tap("residual_pre", x)
    n = layer_norm(x, w.attn_norm, w.attn_norm_bias, c.eps)
    x = x + attend(n, w, c, batch, tap)
    if c.sequential:
        x = tap("residual_mid", x)
        n = layer_norm(x, w.mlp_norm, w.mlp_norm_bias, c.eps)

    def hidden(m: Tensor) -> Tensor:
        return ACTIVATIONS[c.act](batch.linear(m, w.gate)).mul_(batch.linear(m, w.up))

    m = mlp(n, batch, tap, hidden, lambda m: batch.linear(m, w.down))
    return tap("residual_post", x + tap("mlp_out", m))


def attend(n: Tensor, w: Layer, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """The attention branch behind its norm, up to ``attn_out``."""
    linear = batch.linear
    q = heads(linear(n, w.q, w.q_bias), c.head_dim)
    k = heads(linear(n, w.k, w.k_bias), c.head_dim)
    v = heads(linear(n, w.v, w.v_bias), c.head_dim)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = norm_per_head(q, w.q_norm, c.eps), norm_per_head(k, w.k_norm, c.eps)
    q, k, v = tap("q", q), tap("k", k), tap("v", v)
    cos, sin = rotary(c.rope, batch, n.dtype)
    q, k = tap("q_rot", rotate(q, cos, sin)), tap("k_rot", rotate(k, cos, sin))
    z = attention(q, k, v, batch, tap, c.head_dim**-0.5, eager=joined_probabilities, sdpa=joined_sdpa)
    return tap("attn_out", linear(tap("z", z).flatten(1), w.o))


def norm_per_head(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """LayerNorm of ``x [rows, heads, d]`` over d, ``weight [heads * d]``."""
    scales = weight.view(x.shape[1:])
    return torch.stack([layer_norm(x[:, head], scale, None, eps) for head, scale in enumerate(scales)], dim=1)


def final_norm(x: Tensor, w: Norm, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, hidden]``."""
    return layer_norm(x, w.weight, w.bias, c.eps)


def hooks(c: Config, layer: int) -> dict[str, Shape]:
    """Shape behind the rows at every hook of a layer."""
    return layer_hooks(
        hidden=c.hidden,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        mlp=dense_hooks(c.mlp_width),
        parallel=c.parallel,
    )


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="StableLM",
    model_types=("stablelm",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: layer_weights(c.heads, c.kv_heads),
    norm_weights=Norm,
    block=block,
    final_norm=final_norm,
    hooks=hooks,
    about="StableLM 3B, Zephyr, 2 1.6B and 12B: LayerNorm, rotary on a part of each head, a norm for every head",
)
