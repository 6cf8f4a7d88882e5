"""Llama 4 (Meta, 2025), its text model: chunked attention, layers without rope, sigmoid experts beside a shared one.

    residual_pre --+-- attn_norm -- q, k, v -- rope -- L2 norm -- attention within a chunk -- o --(+)-- residual_mid
                   |                   '------- temperature ----- attention to everything --'      |
                   '-------------------------------------------------------------------------------'
    residual_mid --+-- mlp_norm --+-- shared expert -----------------------(+)--(+)-- residual_post
                   |              '-- router -- top 1 -- sigmoid * -- expert -'  |
                   '-------------------------------------------------------------'

A layer has rope or none (by default every fourth); without, queries grow with the position, counted from the left edge
of a padded row. A layer is dense or sparse. ``q_rot`` and ``k_rot`` are what attention multiplies: behind the norm, or
with the temperature. The router's score multiplies an expert's input. HF runs every expert on every row; the rows that
did not choose it are zeros and add zeros. So does padded mode, since the number of rows decides bits, but for experts
that nobody chose; packed mode runs an expert on its own rows only. With two chosen at most the order of the sum over
experts decides nothing; more are refused. ``mlp_out`` is shared + routed. Does not know images.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from . import llama
from .batch import Batch
from .contract import (
    ArchError,
    Experts,
    Keys,
    Shape,
    Tap,
    dense_hooks,
    experts,
    layer_hooks,
    source,
    sparse_hooks,
)
from .gpt2 import probabilities
from .ops import ACTIVATIONS, Sees, attention, heads, mlp, rms_norm
from .rope import Rope, rotary_complex, rotate_complex

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """A Llama's words, with ``mlp_width`` that of an expert; what each layer sees, and which have rope and experts."""

    sees: tuple[Sees, ...]
    ropes: tuple[bool, ...]
    normed: bool
    tempered: bool
    floor_scale: float
    attn_scale: float
    sparse: tuple[bool, ...]
    dense_width: int
    experts: int
    chosen: int

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        layers, head_dim = keys.size("num_hidden_layers", 48), keys.optional("head_dim", 128)
        head_dim = head_dim or keys.size("hidden_size") // keys.size("num_attention_heads")
        every, step = keys.size("no_rope_layer_interval", 4), keys.size("interleave_moe_layer_step", 1)
        ropes = tuple(map(bool, keys.sequence("no_rope_layers", int) or ((i + 1) % every for i in range(layers))))
        if len(ropes) != layers:
            raise ArchError(f"config.json: 'no_rope_layers' has {len(ropes)} entries where {layers} are needed")
        kinds = keys.layer_types(
            layers,
            ("chunked_attention", "full_attention"),
            lambda layer: "chunked_attention" if ropes[layer] else "full_attention",
        )
        chunk, sparse = keys.optional("attention_chunk_size", 8192), keys.sequence("moe_layers", int)
        if chunk is None:
            raise ArchError(
                "config.json: 'attention_chunk_size' must be a number; 'layer_types' may free layers from it"
            )
        sparse = tuple(range(step - 1, layers, step)) if sparse is None else sparse
        config = cls.read(
            keys,
            layers=layers,
            head_dim=head_dim,
            kv_heads=keys.optional("num_key_value_heads", 8),
            eps=keys.number("rms_norm_eps", 1e-5, least=0),
            rope=Rope.from_hf(keys, head_dim, keys.size("max_position_embeddings", 131072), 500000.0),
            mlp_bias=False,
            sees=tuple(Sees(chunk=chunk if kind == "chunked_attention" else None) for kind in kinds),
            ropes=ropes,
            normed=keys.flag("use_qk_norm", True),
            tempered=keys.flag("attn_temperature_tuning", True),
            floor_scale=keys.number("floor_scale", 8192, above=0),
            attn_scale=keys.number("attn_scale", 0.1),
            sparse=tuple(layer in sparse for layer in range(layers)),
            dense_width=keys.size("intermediate_size_mlp", 16384),
            experts=keys.size("num_local_experts", 16),
            chosen=keys.only("num_experts_per_tok", 1, 1, 2),
        )
        keys.finish(HARMLESS)
        return config

    @property
    def gate_up_width(self) -> int:
        return 2 * self.mlp_width


HARMLESS = llama.HARMLESS | frozenset(
    "cache_implementation for_llm_compressor output_router_logits router_aux_loss_coef router_jitter_noise".split()
)

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expert:
    gate_up: Tensor = source("gate_up_proj", "hidden", "gate_up_width")
    down: Tensor = source("down_proj", "mlp_width", "hidden")


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


@dataclass(frozen=True)
class Dense(Layer):
    gate: Tensor = source("feed_forward.gate_proj.weight", "dense_width", "hidden")
    up: Tensor = source("feed_forward.up_proj.weight", "dense_width", "hidden")
    down: Tensor = source("feed_forward.down_proj.weight", "hidden", "dense_width")


@dataclass(frozen=True)
class Sparse(Layer):
    router: Tensor = source("feed_forward.router.weight", "experts", "hidden")
    experts: Experts[Expert] = experts("feed_forward.experts.", Expert, "experts")
    gate: Tensor = source("feed_forward.shared_expert.gate_proj.weight", "mlp_width", "hidden")
    up: Tensor = source("feed_forward.shared_expert.up_proj.weight", "mlp_width", "hidden")
    down: Tensor = source("feed_forward.shared_expert.down_proj.weight", "hidden", "mlp_width")


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Dense | Sparse, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    a = rms_norm(x, w.attn_norm, c.eps)
    q = tap("q", heads(linear(a, w.q, w.q_bias), c.head_dim))
    k = tap("k", heads(linear(a, w.k, w.k_bias), c.head_dim))
    v = tap("v", heads(linear(a, w.v, w.v_bias), c.head_dim))
    q, k = rotated(q, k, c, batch) if c.ropes[layer] else (q, k)
    q, k = tap("q_rot", q), tap("k_rot", k)
    q, k = levelled(q, k, c) if c.ropes[layer] else (tempered(q, c, batch), k)
    z = attention(q, k, v, batch, tap, scale=c.head_dim**-0.5, sees=c.sees[layer], eager=probabilities)
    z = tap("z", z)
    x = tap("residual_mid", x + tap("attn_out", linear(z.flatten(1), w.o, w.o_bias)))

    m = mixture(x, w, c, batch, tap) if isinstance(w, Sparse) else dense(x, w, c, batch, tap)
    return tap("residual_post", x + tap("mlp_out", m))


def rotated(q: Tensor, k: Tensor, c: Config, batch: Batch) -> tuple[Tensor, Tensor]:
    turns = rotary_complex(c.rope, batch)
    return rotate_complex(q, turns), rotate_complex(k, turns)


def levelled(q: Tensor, k: Tensor, c: Config) -> tuple[Tensor, Tensor]:
    """Queries and keys behind rope without their lengths, if the config wants that: an RMSNorm without weight."""
    if not c.normed:
        return q, k
    q, k = (F.rms_norm(x.float(), (c.head_dim,), eps=c.eps).to(x.dtype) for x in (q, k))
    return q, k


def tempered(q: Tensor, c: Config, batch: Batch) -> Tensor:
    """Queries times ``1 + attn_scale * log(1 + floor((position + 1) / floor_scale))``, in fp32; pads have positions."""
    if not c.tempered:
        return q
    scales = torch.ones(len(q), 1, 1, device=q.device)
    for group in batch.groups:
        positions = torch.arange(group.length, device=q.device).float()
        grown = torch.log1p(torch.floor((positions + 1.0) / c.floor_scale)) * c.attn_scale + 1.0
        scales[group.rows] = grown.repeat(group.prompts)[:, None, None]
    return (q * scales).to(q.dtype)


def dense(x: Tensor, w: Dense, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """What a dense MLP adds to ``x [rows, hidden]``."""
    return mlp(
        x, batch, tap, lambda m: gated(rms_norm(m, w.mlp_norm, c.eps), w, c, batch), lambda m: batch.linear(m, w.down)
    )


def gated(m: Tensor, w: Dense | Sparse, c: Config, batch: Batch) -> Tensor:
    return ACTIVATIONS[c.act](batch.linear(m, w.gate)).mul_(batch.linear(m, w.up))


def mixture(x: Tensor, w: Sparse, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """What the shared expert and the chosen ones add to ``x [rows, hidden]``."""
    m = rms_norm(x, w.mlp_norm, c.eps)
    logits = tap("router_logits", batch.linear(m, w.router))
    best, ids = logits.topk(c.chosen, dim=-1)
    ids = tap("expert_ids", ids)
    known = torch.full_like(logits, -torch.inf).scatter_(1, ids, best)
    scores = batch.rows(lambda tile: torch.sigmoid(tile.float()).to(tile.dtype), known)

    def expert(e: Expert, rows: Tensor) -> Tensor:
        gate, up = product(rows, e.gate_up).chunk(2, dim=-1)
        return product(up * ACTIVATIONS[c.act](gate), e.down)

    sums, ids = torch.zeros_like(m, dtype=torch.float32), ids[: batch.tokens]
    for index, weights in w.experts.each(sorted(set(ids.flatten().tolist()))):
        own = ids.eq(index).any(1)
        whole = (group.rows for group in batch.groups if own[group.rows].any())
        for rows in whole if batch.height is None else [own.nonzero()[:, 0]]:
            sums[rows] += batch.few(partial(expert, weights), m[rows] * scores[rows, index, None])
    shared = batch.rows(lambda tile: batch.linear(gated(tile, w, c, batch), w.down), m)
    return shared.add_(sums.to(x.dtype))


FEW = 16
"""Rows below which one product of MKL's may be shared out among threads so that its bits are others."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x [n, in] @ weight [in, out]`` with the bits that it has in a batch with other experts', as HF computes it.

    A batch of two has those of any batch; so have many rows alone.
    """
    copies = 2 if len(x) < FEW else 1
    return torch.bmm(x.expand(copies, -1, -1), weight.expand(copies, -1, -1))[0]


def hooks(c: Config, layer: int) -> dict[str, Shape]:
    """Shape behind the rows at every hook of a layer."""
    inside = sparse_hooks(c.experts, c.chosen) if c.sparse[layer] else dense_hooks(c.dense_width)
    return layer_hooks(hidden=c.hidden, heads=c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim, mlp=inside)


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="Llama 4",
    model_types=("llama4_text",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Sparse if c.sparse[layer] else Dense,
    block=block,
    hooks=hooks,
    activations=("mlp_width", "dense_width", "experts"),
    about="chunked attention, layers without rope, sigmoid experts and a shared one",
    ignored=(),
)
