"""GPT-J (Wang and Komatsuzaki, 2021): one LayerNorm for two parallel branches, neighbouring dimensions rotated.

    residual_pre --+-- norm --+-- q, k, v -- rope -- attention -- out --(+)--(+)-- residual_post
                   |          '-- act(fc_in) -- fc_out -----------------'    |
                   '---------------------------------------------------------'

The sum is ``(attn_out + mlp_out) + residual_pre``. Only the MLP and the head have biases. Scores are computed in fp32
and divided by the square root of a head's width. Positions are rotations from a table: a prompt longer than the table
is refused. Does not know sdpa, which transformers lacks here, or token types.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .batch import Batch
from .contract import MOST_LAYERS, ArchError, Family, Keys, Shape, Tap, dense_hooks, layer_hooks, source
from .ops import ACTIVATIONS, attention, heads, layer_norm, mlp
from .rope import Rope, rotary, rotate_pairs

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
    rope: Rope
    tied: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        keys = Keys(hf)
        hidden, n_heads = keys.size("n_embd", 4096), keys.size("n_head", 16)
        positions, rotated = keys.size("n_positions", 2048), keys.optional("rotary_dim", 64)
        if hidden % n_heads:
            raise ArchError(f"n_embd {hidden} is not a multiple of n_head {n_heads}")
        if rotated is None or rotated % 2 or rotated > hidden // n_heads:
            raise ArchError(f"rotary_dim {rotated} is not an even number up to a head's width, {hidden // n_heads}")
        keys.only("rotary", True, True)
        keys.only("scale_attn_weights", True, True)
        config = cls(
            layers=keys.size("n_layer", 28, most=MOST_LAYERS),
            hidden=hidden,
            heads=n_heads,
            mlp_width=keys.size("n_inner", 4 * hidden),
            vocab=keys.size("vocab_size", 50400),
            max_positions=positions,
            act=keys.choice("activation_function", "gelu_new", ACTIVATIONS),
            eps=keys.number("layer_norm_epsilon", 1e-5, least=0),
            rope=Rope(kind="default", dim=rotated, theta=10000.0, max_positions=positions),
            tied=keys.flag("tie_word_embeddings", False),
        )
        keys.finish(HARMLESS)
        return config

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


HARMLESS = frozenset(
    """attn_pdrop embd_pdrop gradient_checkpointing n_ctx resid_pdrop summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj""".split()
)

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    tokens: Tensor = source("wte.weight", "vocab", "hidden")


@dataclass(frozen=True)
class Layer:
    norm: Tensor = source("ln_1.weight", "hidden")
    norm_bias: Tensor = source("ln_1.bias", "hidden")
    q: Tensor = source("attn.q_proj.weight", "hidden", "hidden")
    k: Tensor = source("attn.k_proj.weight", "hidden", "hidden")
    v: Tensor = source("attn.v_proj.weight", "hidden", "hidden")
    o: Tensor = source("attn.out_proj.weight", "hidden", "hidden")
    up: Tensor = source("mlp.fc_in.weight", "mlp_width", "hidden")
    up_bias: Tensor = source("mlp.fc_in.bias", "mlp_width")
    down: Tensor = source("mlp.fc_out.weight", "hidden", "mlp_width")
    down_bias: Tensor = source("mlp.fc_out.bias", "hidden")


@dataclass(frozen=True)
class Norm:
    weight: Tensor = source("ln_f.weight", "hidden")
    bias: Tensor = source("ln_f.bias", "hidden")


@dataclass(frozen=True)
class Head:
    unembed: Tensor = source("lm_head.weight", "vocab", "hidden")
    bias: Tensor = source("lm_head.bias", "vocab")


# --- maths ----------------------------------------------------------------------------------------------------------


def embed(w: Embedding, c: Config, batch: Batch) -> Tensor:
    """Token ids -> ``[rows, hidden]``."""
    return F.embedding(batch.ids, w.tokens)


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (attn_out + mlp_out) + residual_pre``, all ``[rows, hidden]``."""
    linear = batch.linear
    x = tap("residual_pre", x)

    n = layer_norm(x, w.norm, w.norm_bias, c.eps)
    q, k, v = (heads(linear(n, part), c.head_dim) for part in (w.q, w.k, w.v))
    q, k, v = tap("q", q), tap("k", k), tap("v", v)
    cos, sin = rotary(c.rope, batch, x.dtype)
    q, k = tap("q_rot", rotate_pairs(q, cos, sin)), tap("k_rot", rotate_pairs(k, cos, sin))
    z = tap("z", attention(q, k, v, batch, tap, math.sqrt(c.head_dim), eager=divided_probabilities))
    a = tap("attn_out", linear(z.flatten(1), w.o))

    def hidden(m: Tensor) -> Tensor:
        return ACTIVATIONS[c.act](linear(m, w.up, w.up_bias))

    m = tap("mlp_out", mlp(n, batch, tap, hidden, lambda m: linear(m, w.down, w.down_bias)))
    return tap("residual_post", a + m + x)


def divided_probabilities(q: Tensor, k: Tensor, mask: Tensor, divisor: float) -> Tensor:
    """Eager attention with fp32 scores, divided where other families multiply by a scale."""
    scores = torch.matmul(q.float(), k.float().transpose(2, 3)) / divisor + mask
    return F.softmax(scores, dim=-1).to(q.dtype)


def final_norm(x: Tensor, w: Norm, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, hidden]``."""
    return layer_norm(x, w.weight, w.bias, c.eps)


def unembed(x: Tensor, w: Head, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, vocab]``."""
    return batch.linear(x, w.unembed, w.bias)


def hooks(c: Config, layer: int) -> dict[str, Shape]:
    """Shape behind the rows at every hook of a layer."""
    return layer_hooks(
        hidden=c.hidden,
        heads=c.heads,
        kv_heads=c.heads,
        head_dim=c.head_dim,
        mlp=dense_hooks(c.mlp_width),
        parallel=True,
    )


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = Family(
    name="GPT-J",
    model_types=("gptj",),
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
    attention=("eager",),
    about="parallel branches behind one norm, interleaved rotary, a head with a bias; eager attention only",
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
)
