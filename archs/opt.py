"""OPT (Zhang et al., 2022) and Galactica (Taylor et al., 2022): learned positions, LayerNorm, biases, an ungated MLP.

    residual_pre --+-- attn_norm -- q, k, v -- attention -- o --(+)-- residual_mid
                   '---------------------------------------------'
    residual_mid --+-- mlp_norm -- fc1 -- act -- fc2 --(+)-- residual_post
                   '------------------------------------'

The 350m model has its norms after the additions, so that branches are not added to the stream as it goes on:
``residual_mid = attn_norm(residual_pre + attn_out)``, ``residual_post = mlp_norm(residual_mid + mlp_out)``. It has no
final norm, and its words are narrower than its layers: one matrix widens embeddings, another narrows what enters the
head, which is what ``final_norm`` shows.

Queries are rounded after they are scaled; the hooks show them before. The table of positions begins with two rows that
no token uses. Does not know layerdrop or other things of training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .batch import Batch
from .contract import MOST_LAYERS, ArchError, Family, Keys, Shape, Tap, dense_hooks, layer_hooks, source
from .ops import ACTIVATIONS, attention, heads, layer_norm, mlp, sdpa, softmax_probabilities

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model in the words of the maths below."""

    layers: int
    hidden: int
    heads: int
    mlp_width: int
    vocab: int
    word_width: int
    max_positions: int
    act: str
    norm_before: bool
    final_norm: bool
    affine: bool
    bias: bool
    tied: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        keys = Keys(hf)
        hidden, n_heads = keys.size("hidden_size", 768), keys.size("num_attention_heads", 12)
        if hidden % n_heads:
            raise ArchError(f"hidden_size {hidden} is not a multiple of num_attention_heads {n_heads}")
        keys.only("learned_embeddings", True, True)
        keys.only("scale_embeddings", False, False)
        norm_before, removed = keys.flag("do_layer_norm_before", True), keys.flag("_remove_final_layer_norm", False)
        config = cls(
            layers=keys.size("num_hidden_layers", 12, most=MOST_LAYERS),
            hidden=hidden,
            heads=n_heads,
            mlp_width=keys.size("ffn_dim", 3072),
            vocab=keys.size("vocab_size", 50272),
            word_width=keys.size("word_embed_proj_dim", hidden),
            max_positions=keys.size("max_position_embeddings", 2048),
            act=keys.choice("activation_function", "relu", ACTIVATIONS),
            norm_before=norm_before,
            final_norm=norm_before and not removed,
            affine=keys.flag("layer_norm_elementwise_affine", True),
            bias=keys.flag("enable_bias", True),
            tied=keys.flag("tie_word_embeddings", True),
        )
        keys.finish(HARMLESS)
        return config

    @property
    def position_rows(self) -> int:
        return self.max_positions + UNUSED

    @property
    def projected(self) -> bool:
        return self.word_width != self.hidden

    @property
    def final_affine(self) -> bool:
        return self.final_norm and self.affine


HARMLESS = frozenset("activation_dropout attention_dropout dropout init_std layerdrop".split())
UNUSED = 2
"""Rows of the table of positions before that of the first token."""
EPS = 1e-5
"""Of all norms; the config has no word for it."""

# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    tokens: Tensor = source("embed_tokens.weight", "vocab", "word_width")
    positions: Tensor = source("embed_positions.weight", "position_rows", "hidden")
    widen: Tensor | None = source("project_in.weight", "hidden", "word_width", when="projected")


@dataclass(frozen=True)
class Layer:
    q: Tensor = source("self_attn.q_proj.weight", "hidden", "hidden")
    k: Tensor = source("self_attn.k_proj.weight", "hidden", "hidden")
    v: Tensor = source("self_attn.v_proj.weight", "hidden", "hidden")
    o: Tensor = source("self_attn.out_proj.weight", "hidden", "hidden")
    q_bias: Tensor | None = source("self_attn.q_proj.bias", "hidden", when="bias")
    k_bias: Tensor | None = source("self_attn.k_proj.bias", "hidden", when="bias")
    v_bias: Tensor | None = source("self_attn.v_proj.bias", "hidden", when="bias")
    o_bias: Tensor | None = source("self_attn.out_proj.bias", "hidden", when="bias")
    attn_norm: Tensor | None = source("self_attn_layer_norm.weight", "hidden", when="affine")
    attn_norm_bias: Tensor | None = source("self_attn_layer_norm.bias", "hidden", when="affine")
    up: Tensor = source("fc1.weight", "mlp_width", "hidden")
    up_bias: Tensor | None = source("fc1.bias", "mlp_width", when="bias")
    down: Tensor = source("fc2.weight", "hidden", "mlp_width")
    down_bias: Tensor | None = source("fc2.bias", "hidden", when="bias")
    mlp_norm: Tensor | None = source("final_layer_norm.weight", "hidden", when="affine")
    mlp_norm_bias: Tensor | None = source("final_layer_norm.bias", "hidden", when="affine")


@dataclass(frozen=True)
class Norm:
    weight: Tensor | None = source("final_layer_norm.weight", "hidden", when="final_affine")
    bias: Tensor | None = source("final_layer_norm.bias", "hidden", when="final_affine")
    narrow: Tensor | None = source("project_out.weight", "word_width", "hidden", when="projected")


@dataclass(frozen=True)
class Head:
    unembed: Tensor = source("lm_head.weight", "vocab", "word_width")


# --- maths ----------------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return layer_norm(x, weight, bias, EPS)


def embed(w: Embedding, c: Config, batch: Batch) -> Tensor:
    """Token and position embeddings, added: ``[rows, hidden]``."""
    x = F.embedding(batch.ids, w.tokens)
    if w.widen is not None:
        x = batch.linear(x, w.widen)
    return x + F.embedding(batch.positions + UNUSED, w.positions)


def block(x: Tensor, w: Layer, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """The block of the config's kind, all ``[rows, hidden]``."""
    return (pre_norm if c.norm_before else post_norm)(x, w, c, batch, tap)


def pre_norm(x: Tensor, w: Layer, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``."""
    x = tap("residual_pre", x)
    x = tap("residual_mid", x + attend(norm(x, w.attn_norm, w.attn_norm_bias), w, c, batch, tap))
    return tap("residual_post", x + feed(norm(x, w.mlp_norm, w.mlp_norm_bias), w, c, batch, tap))


def post_norm(x: Tensor, w: Layer, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = mlp_norm(attn_norm(residual_pre + attn_out) + mlp_out)``."""
    x = tap("residual_pre", x)
    x = tap("residual_mid", norm(x + attend(x, w, c, batch, tap), w.attn_norm, w.attn_norm_bias))
    return tap("residual_post", norm(x + feed(x, w, c, batch, tap), w.mlp_norm, w.mlp_norm_bias))


def attend(a: Tensor, w: Layer, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """The attention branch, up to ``attn_out``."""
    linear, width = batch.linear, c.hidden // c.heads
    q = tap("q", heads(linear(a, w.q, w.q_bias), width))
    k = tap("k", heads(linear(a, w.k, w.k_bias), width))
    v = tap("v", heads(linear(a, w.v, w.v_bias), width))
    q, k = tap("q_rot", q), tap("k_rot", k)
    z = tap("z", attention(q, k, v, batch, tap, width**-0.5, eager=scaled_probabilities, sdpa=scaled_sdpa))
    return tap("attn_out", linear(z.flatten(1), w.o, w.o_bias))


def scaled_probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Eager attention with queries that are scaled, and rounded, before they meet the keys."""
    return softmax_probabilities(q * scale, k, mask, 1.0)


def scaled_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same for sdpa."""
    return sdpa(q * scale, k, v, mask, 1.0)


def feed(m: Tensor, w: Layer, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """The MLP, up to ``mlp_out``."""

    def hidden(m: Tensor) -> Tensor:
        return ACTIVATIONS[c.act](batch.linear(m, w.up, w.up_bias))

    return tap("mlp_out", mlp(m, batch, tap, hidden, lambda m: batch.linear(m, w.down, w.down_bias)))


def final_norm(x: Tensor, w: Norm, c: Config, batch: Batch) -> Tensor:
    """``[rows, hidden] -> [rows, word_width]``, what the head reads."""
    x = norm(x, w.weight, w.bias) if c.final_norm else x
    return x if w.narrow is None else batch.linear(x, w.narrow)


def unembed(x: Tensor, w: Head, c: Config, batch: Batch) -> Tensor:
    """``[rows, word_width] -> [rows, vocab]``."""
    return batch.linear(x, w.unembed)


def hooks(c: Config, layer: int) -> dict[str, Shape]:
    """Shape behind the rows at every hook of a layer."""
    return layer_hooks(
        hidden=c.hidden,
        heads=c.heads,
        kv_heads=c.heads,
        head_dim=c.hidden // c.heads,
        mlp=dense_hooks(c.mlp_width),
    )


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = Family(
    final_width=lambda c: c.word_width,
    name="OPT",
    model_types=("opt",),
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
    prefixes=(("model.decoder.", ""), ("decoder.", "")),
    layer_prefix="layers.{i}.",
    embedding="embed_tokens.weight",
    head="lm_head.weight",
    about="learned positions, LayerNorm; 350m has its norms after the additions",
    ignored=(r"version",),
)
