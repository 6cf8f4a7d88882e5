"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm before each branch, fused qkv, ungated MLP.

    residual_pre --+-- ln_1 -- q, k, v -- attention -- proj --(+)-- residual_mid
                   '-------------------------------------------'
    residual_mid --+-- ln_2 -- fc -- gelu -- proj --(+)-- residual_post
                   '-------------------------------------'

Matrices are stored ``[in, out]``. Positions are learned: a prompt longer than the table is refused, and a wrong
position is not a rounding error but another model. Does not know cross-attention or the multiple-choice heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .batch import Batch
from .contract import MOST_LAYERS, ArchError, Family, Keys, Shape, Tap, dense_hooks, layer_hooks, source
from .ops import ACTIVATIONS, attention, heads, layer_norm, mlp

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model in the words of the maths below."""

    layers: int
    hidden: int
    heads: int
    mlp_width: int
    vocab: int
    max_positions: int
    act: str
    eps: float
    scale_by_width: bool
    scale_by_layer: bool
    upcast_scores: bool
    tied: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        keys = Keys(hf)
        hidden, n_heads = keys.size("n_embd", 768), keys.size("n_head", 12)
        if hidden % n_heads:
            raise ArchError(f"n_embd {hidden} is not a multiple of n_head {n_heads}")
        config = cls(
            layers=keys.size("n_layer", 12, most=MOST_LAYERS),
            hidden=hidden,
            heads=n_heads,
            mlp_width=keys.size("n_inner", 4 * hidden),
            vocab=keys.size("vocab_size", 50257),
            max_positions=keys.size("n_positions", 1024),
            act=keys.choice("activation_function", "gelu_new", ACTIVATIONS),
            eps=keys.number("layer_norm_epsilon", 1e-5, least=0),
            scale_by_width=keys.flag("scale_attn_weights", True),
            scale_by_layer=keys.flag("scale_attn_by_inverse_layer_idx", False),
            upcast_scores=keys.flag("reorder_and_upcast_attn", False),
            tied=keys.flag("tie_word_embeddings", True),
        )
        keys.finish(HARMLESS)
        return config

    @property
    def qkv_width(self) -> int:
        return 3 * self.hidden

    def scale(self, layer: int) -> float:
        scale = (self.hidden // self.heads) ** -0.5 if self.scale_by_width else 1.0
        return scale / float(layer + 1) if self.scale_by_layer else scale


HARMLESS = frozenset(
    """attn_pdrop embd_pdrop gradient_checkpointing n_ctx resid_pdrop summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj""".split()
)

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    tokens: Tensor = source("wte.weight", "vocab", "hidden")
    positions: Tensor = source("wpe.weight", "max_positions", "hidden")


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor = source("ln_1.weight", "hidden")
    attn_norm_bias: Tensor = source("ln_1.bias", "hidden")
    qkv: Tensor = source("attn.c_attn.weight", "hidden", "qkv_width")
    qkv_bias: Tensor = source("attn.c_attn.bias", "qkv_width")
    o: Tensor = source("attn.c_proj.weight", "hidden", "hidden")
    o_bias: Tensor = source("attn.c_proj.bias", "hidden")
    mlp_norm: Tensor = source("ln_2.weight", "hidden")
    mlp_norm_bias: Tensor = source("ln_2.bias", "hidden")
    fc: Tensor = source("mlp.c_fc.weight", "hidden", "mlp_width")
    fc_bias: Tensor = source("mlp.c_fc.bias", "mlp_width")
    down: Tensor = source("mlp.c_proj.weight", "mlp_width", "hidden")
    down_bias: Tensor = source("mlp.c_proj.bias", "hidden")


@dataclass(frozen=True)
class Norm:
    weight: Tensor = source("ln_f.weight", "hidden")
    bias: Tensor = source("ln_f.bias", "hidden")


@dataclass(frozen=True)
class Head:
    unembed: Tensor = source("lm_head.weight", "vocab", "hidden")


# --- maths ----------------------------------------------------------------------------------------------------------


def embed(w: Embedding, c: Config, batch: Batch) -> Tensor:
    """Token and position embeddings, added: ``[rows, hidden]``."""
    return F.embedding(batch.ids, w.tokens) + F.embedding(batch.positions, w.positions)


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    affine = batch.affine
    x = tap("residual_pre", x)

    a = affine(layer_norm(x, w.attn_norm, w.attn_norm_bias, c.eps), w.qkv, w.qkv_bias)
    q, k, v = (heads(part, c.hidden // c.heads) for part in torch.split(a, c.hidden, dim=1))
    q, k, v = tap("q", q), tap("k", k), tap("v", v)
    q, k = tap("q_rot", q), tap("k_rot", k)
    eager = upcast_probabilities if c.upcast_scores else probabilities
    z = tap("z", attention(q, k, v, batch, tap, c.scale(layer), eager=eager))
    x = tap("residual_mid", x + tap("attn_out", affine(z.flatten(1), w.o, w.o_bias)))

    def hidden(m: Tensor) -> Tensor:
        return ACTIVATIONS[c.act](affine(layer_norm(m, w.mlp_norm, w.mlp_norm_bias, c.eps), w.fc, w.fc_bias))

    m = mlp(x, batch, tap, hidden, lambda m: affine(m, w.down, w.down_bias))
    return tap("residual_post", x + tap("mlp_out", m))


def probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Eager attention with the softmax in the model's dtype, which is not the fp32 softmax rounded."""
    return F.softmax(torch.matmul(q, k.transpose(2, 3)) * scale + mask, dim=-1)


def upcast_probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """``reorder_and_upcast_attn``: scores in fp32, scaled within the product; only eager attention does this."""
    flat_q, flat_kt = q.flatten(0, 1).float(), k.transpose(2, 3).flatten(0, 1).float()  # bits depend on their layout
    out = flat_q.new_empty(len(flat_q), q.shape[2], k.shape[2])
    scores = torch.baddbmm(out, flat_q, flat_kt, beta=0, alpha=scale)
    scores = rearrange(scores, "(b heads) q k -> b heads q k", b=len(q))
    return F.softmax(scores + mask, dim=-1).to(q.dtype)


def final_norm(x: Tensor, w: Norm, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, hidden]``."""
    return layer_norm(x, w.weight, w.bias, c.eps)


def unembed(x: Tensor, w: Head, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, vocab]``."""
    return batch.linear(x, w.unembed)


def hooks(c: Config, layer: int) -> dict[str, Shape]:
    """Shape behind the rows at every hook of a layer."""
    width = c.hidden // c.heads
    return layer_hooks(hidden=c.hidden, heads=c.heads, kv_heads=c.heads, head_dim=width, mlp=dense_hooks(c.mlp_width))


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = Family(
    name="GPT-2",
    model_types=("gpt2",),
    config=Config.from_hf,
    embed_weights=Embedding,
    layer_weights=lambda c, layer: Layer,
    norm_weights=Norm,
    head_weights=Head,
    embed=embed,
    block=block,
    final_norm=final_norm,
    unembed=unembed,
    hooks=hooks,
    prefixes=(("transformer.", ""), ("", "")),
    layer_prefix="h.{i}.",
    embedding="wte.weight",
    head="lm_head.weight",
    about="learned positions, LayerNorm, fused qkv, matrices stored [in, out]",
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
)
