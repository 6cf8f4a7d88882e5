"""DeepSeek-V3 and R1 (DeepSeek-AI, 2024), Moonlight: a DeepSeek-V2 whose router has sigmoids and a correction.

    residual_mid --+-- mlp_norm --+-- router -- sigmoid --+-- + correction -- best groups -- top k (ids)     |
                   |              |                       '-- of the chosen, renormalised -- experts -- sum -(+)--(+)--
                   |              '-- shared experts --------------------------------------------------------'    |
                   '----------------------------------------------------------------------------------------------'

Attention is that of V2, but for the rotation: real, in the model's dtype, of neighbouring dimensions that come out as
two halves. The correction ``e_score_correction_bias`` stays in fp32; it decides who is chosen, by groups whose score is
the sum of their two best, and not the weights. Multi-token prediction, stored as a layer behind the last one, is not
read. ``mlp_out`` is routed + shared. Does not know the latent cache.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor

from . import deepseek_v2
from .batch import Batch
from .contract import ArchError, Keys, Tap, source
from .deepseek_v2 import Dense, Latent, check_groups, dense, hooks, of_groups, projected, summed
from .ops import attention, joined_probabilities, joined_sdpa, rms_norm
from .rope import rotary, rotate

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config(Latent):
    """The words of V2. interleaved: whether neighbouring dimensions are a pair before the rotation."""

    groups: int
    chosen_groups: int
    renormalised: bool
    interleaved: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        keys = Keys(hf)
        keys.only("topk_method", "noaux_tc", "noaux_tc")
        keys.only("scoring_func", "sigmoid", "sigmoid")
        config = cls.read(
            keys,
            max_positions=keys.size("max_position_embeddings", 4096),
            mlp_bias=False,
            dense_layers=int(keys.number("first_k_dense_replace", 3)),
            experts=keys.size("n_routed_experts", 256),
            chosen=keys.size("num_experts_per_tok", 8),
            expert_width=keys.size("moe_intermediate_size", 2048),
            shared=keys.size("n_shared_experts", 1),
            score_factor=keys.number("routed_scaling_factor", 2.5),
            groups=keys.size("n_group", 8),
            chosen_groups=keys.size("topk_group", 4),
            renormalised=keys.flag("norm_topk_prob", True),
            interleaved=keys.flag("rope_interleave", True),
        )
        check_groups(config)
        if config.experts < 2 * config.groups:
            raise ArchError(f"config.json: 'n_group' {config.groups} leaves fewer than two experts for a group's score")
        keys.finish(deepseek_v2.HARMLESS)
        return config


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sparse(deepseek_v2.Sparse):
    correction: Tensor = source("mlp.gate.e_score_correction_bias", "experts", dtype=torch.float32)


# --- maths ----------------------------------------------------------------------------------------------------------


def block(x: Tensor, w: Dense | Sparse, c: Config, layer: int, batch: Batch, tap: Tap) -> Tensor:
    """``residual_post = (residual_pre + attn_out) + mlp_out``, all ``[rows, hidden]``."""
    x = tap("residual_pre", x)
    q, k, v = projected(rms_norm(x, w.attn_norm, c.eps), w, c, batch, tap)
    q, k = tap("q_rot", rotated(q, c, batch)), tap("k_rot", rotated(k, c, batch))
    z = attention(q, k, v, batch, tap, scale=c.scale, eager=joined_probabilities, sdpa=joined_sdpa)
    x = tap("residual_mid", x + tap("attn_out", batch.linear(tap("z", z).flatten(1), w.o, w.o_bias)))

    m = mixture(x, w, c, batch, tap) if isinstance(w, Sparse) else dense(x, w, c, batch, tap)
    return tap("residual_post", x + tap("mlp_out", m))


def rotated(x: Tensor, c: Config, batch: Batch) -> Tensor:
    """Rope on the last ``rope_dim`` dimensions of ``x [rows, heads, head_dim]``, even ones first in the result."""
    content, turning = torch.split(x, [c.content_dim, c.rope_dim], dim=-1)
    if c.interleaved:
        turning = rearrange(turning, "rows heads (pairs two) -> rows heads (two pairs)", two=2)
    return torch.cat((content, rotate(turning, *rotary(c.rope, batch, x.dtype))), dim=-1)


def mixture(x: Tensor, w: Sparse, c: Config, batch: Batch, tap: Tap) -> Tensor:
    """What chosen and shared experts add to ``x [rows, hidden]``."""
    m = rms_norm(x, w.mlp_norm, c.eps)
    logits = tap("router_logits", batch.linear(m.float(), w.router.float()))
    scores = batch.rows(torch.sigmoid, logits)
    corrected = scores + w.correction
    groups = rearrange(corrected, "rows (groups own) -> rows groups own", groups=c.groups).topk(2, dim=-1)[0].sum(-1)
    ids = of_groups(corrected, groups, c.chosen_groups, -torch.inf).topk(c.chosen, dim=-1, sorted=False)[1]
    ids = tap("expert_ids", ids)
    weights = scores.gather(1, ids)
    if c.renormalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return summed(m, ids, weights * c.score_factor, w, c, batch)


# --- table ----------------------------------------------------------------------------------------------------------

FAMILY = dataclasses.replace(
    deepseek_v2.FAMILY,
    name="DeepSeek V3",
    model_types=("deepseek_v3",),
    config=Config.from_hf,
    layer_weights=lambda c, layer: Dense if layer < c.dense_layers else Sparse,
    block=block,
    hooks=hooks,
    activations=(*deepseek_v2.FAMILY.activations, "experts"),
    about="latent attention, sigmoid experts with a correction beside shared ones; R1, Moonlight",
    ignored=(r"layers\.{layers}\..*",),
)
