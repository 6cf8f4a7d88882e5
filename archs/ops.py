"""The operations that families share: norms, activations, attention, a mixture of experts.

Each is the chain of operations of the Hugging Face forward, in its order of rounding, so that its bits are the same;
where another chain is used it was shown to give equal bits. Attention follows Vaswani et al. (2017), grouped queries
Ainslie et al. (2023), RMSNorm Zhang and Sennrich (2019). Nothing here knows a family.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .batch import Batch, Group
from .contract import Experts, Tap

W = TypeVar("W")

# --- norms ----------------------------------------------------------------------------------------------------------


PART = 1024
"""Rows that a norm takes at once: what it computes in fp32 stays in the cache, and is no memory that is mapped anew."""


def by_parts(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``norm(x)`` for ``x [rows, ...]``, a few rows at a time: each is normalised for itself, so no bit changes."""
    if len(x) <= PART:
        return norm(x)
    out = torch.empty_like(x)
    for part, own in zip(torch.split(x, PART), torch.split(out, PART), strict=True):
        own.copy_(norm(part))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the Llama kind: normalise in fp32, round to the dtype of ``x [rows, width]``, then scale."""
    return by_parts(lambda x: F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype).mul_(weight), x)


def rms_norm_late(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the OLMo 2 kind: scaled in fp32 too, rounded once at the end."""
    return by_parts(lambda x: (weight * F.rms_norm(x.float(), (x.shape[-1],), eps=eps)).to(x.dtype), x)


def rms_norm_gemma(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the Gemma kind: as the late one, and the scale is ``1 + weight``."""
    scale = 1.0 + weight.float()
    return by_parts(lambda x: (F.rms_norm(x.float(), (x.shape[-1],), eps=eps) * scale).to(x.dtype), x)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`torch.nn.LayerNorm` over the last dimension of ``x [rows, width]``."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


# --- activations ----------------------------------------------------------------------------------------------------


def gelu_new(x: Tensor) -> Tensor:
    """GPT-2's GELU: the written formula of Hendrycks and Gimpel (2016); `F.gelu(tanh)` has other bits."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}
"""``hidden_act`` of a config -> what transformers' ``ACT2FN`` computes under that name."""
EXPERT_ACTIVATIONS = frozenset(ACTIVATIONS) - {"gelu"}
"""Those that experts may have: of ``F.gelu`` one row alone has other bits than beside the rows of other experts, which
is how transformers computes it. No published model uses it there."""

# --- the MLP ---------------------------------------------------------------------------------------------------------


def mlp(
    x: Tensor, batch: Batch, tap: Tap, hidden: Callable[[Tensor], Tensor], out: Callable[[Tensor], Tensor]
) -> Tensor:
    """``out(hidden(x))`` for ``x [rows, width]``, with ``mlp_hidden`` shown between the two; both work row by row.

    Unless somebody looks, a tile of rows goes through both at once, so that the wide tensor in the middle never exists
    as a whole. The bits are the same.
    """
    if tap.wants("mlp_hidden"):
        return batch.rows(out, tap("mlp_hidden", batch.rows(hidden, x)))
    return batch.rows(lambda tile: out(hidden(tile)), x)


# --- attention ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sees:
    """Which earlier tokens a query may see; all of them by default.

    window: the last so many, itself included. chunk: those in its own part when a prompt is cut into parts of so many.
    explicit: sdpa is given a mask even where causality is all that it says.
    """

    window: int | None = None
    chunk: int | None = None
    explicit: bool = False

    def all_of(self, length: int) -> bool:
        """Whether transformers leaves the mask to sdpa's own causality at this length."""
        limit = self.window or self.chunk
        return not self.explicit and (limit is None or length < limit)


ALL = Sees()


def heads(x: Tensor, width: int) -> Tensor:
    """``[rows, heads * width] -> [rows, heads, width]``, a view."""
    return rearrange(x, "rows (heads width) -> rows heads width", width=width)


def softmax_probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """HF's eager attention: scores in the model's dtype, softmax in fp32."""
    scores = torch.matmul(q, k.transpose(2, 3)) * scale + mask
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)


def joined_probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same where HF's heads are joined of a rotated and a plain part: bits depend on that layout in memory."""
    return softmax_probabilities(q.contiguous(), k.contiguous(), mask, scale)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """HF's sdpa attention, its choice between ``enable_gqa`` and repeated kv heads included."""
    grouped = k.shape[1] != q.shape[1]
    gqa = grouped and mask is None and k.shape[-1] == v.shape[-1] <= 256
    if grouped and not gqa:
        k, v = _repeat(k, q), _repeat(v, q)
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=gqa)


def joined_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same with the layout of `joined_probabilities`."""
    return sdpa(q.contiguous(), k.contiguous(), v, mask, scale)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: Batch,
    tap: Tap,
    scale: float,
    *,
    sees: Sees = ALL,
    eager: Callable[..., Tensor] = softmax_probabilities,
    sdpa: Callable[..., Tensor] = sdpa,
    bias: Callable[[Group], Tensor] | None = None,
) -> Tensor:
    """Causal attention, a length group at a time: ``[rows, heads, d], [rows, kv_heads, d] x 2 -> [rows, heads, d]``.

    ``scale`` multiplies ``q k^T``. Shows ``attn_pattern`` where it is wanted: the probabilities themselves under eager,
    under sdpa a by-product in fp32 from which nothing else is computed.

    eager: ``(q [b, h, s, d], k [b, h, s, d], additive mask [b | 1, 1, s, s] or [s, s], scale) -> [b, h, s, s]``, for a
    family whose probabilities are written differently. sdpa: ``(q, k, v [b, kv, s, d], bool mask or None, scale) ->
    [b, h, s, d]``. bias: makes ``[b | 1, h, 1, s]`` for a group (alibi), handed to both of them as a last argument.

    At fixed height every prompt is a call of its own, on copies: the bits of a product depend on how many are in the
    batch, and in fp32 on whether addresses are multiples of 16 bytes.
    """
    z = q.new_empty(*q.shape[:-1], v.shape[-1])
    z[batch.tokens :] = 0
    for group in batch.groups:
        added = () if bias is None else (bias(group),)
        whole = tuple(group.sequences(x).transpose(1, 2) for x in (q, k, v, z))
        calls = [whole] if batch.height is None else zip(*(torch.split(x, 1) for x in whole), strict=True)
        patterns: list[Tensor] = []
        for queries, keys, values, out in calls:
            if batch.height is not None:
                queries, keys, values = queries.clone(), keys.clone(), values.clone()
            if batch.attention == "eager":
                keys, values = _repeat(keys, queries), _repeat(values, queries)
                p = eager(queries, keys, _additive(batch, group, sees, q.dtype), scale, *added)
                out.copy_(torch.matmul(p, values))
            else:
                explicit = group.mask is not None or not sees.all_of(group.length)
                mask = _visible(batch, group, sees) if explicit else None
                out.copy_(sdpa(queries, keys, values, mask, scale, *added))
                if tap.wants("attn_pattern"):
                    exact = _repeat(keys, queries).float()
                    p = eager(queries.float(), exact, _additive(batch, group, sees, torch.float32), scale, *added)
            if tap.wants("attn_pattern"):
                patterns.append(p)
        if patterns:
            tap("attn_pattern", torch.cat(patterns), group)
    return z


def alibi_slopes(heads: int, batch: Batch) -> Tensor:
    """Slopes of linear biases (Press et al., 2022), fp32 ``[heads]``: how much a head prefers what is near.

    Powers of ``2 ** (-8 / n)`` for the largest power of two n <= heads; further heads have odd powers of its root. They
    are computed on the batch's device, as HF does.
    """

    def powers(n: int, *exponents: int) -> Tensor:
        base = torch.full((), 2.0 ** (-8 / n), dtype=torch.float32, device=batch.ids.device)
        return torch.pow(base, torch.arange(*exponents, dtype=torch.int32, device=batch.ids.device))

    def build() -> Tensor:
        n = 1 << (heads.bit_length() - 1)
        return torch.cat((powers(n, 1, 1 + n), powers(2 * n, 1, 1 + 2 * (heads - n), 2)))

    return batch.once(("alibi", heads), build, shared=True)


def alibi(slopes: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """``[b | 1, heads, 1, s]``: slopes times the key's position, which counts real tokens from 0 and is 0 at pads.

    The product is in the dtype of the slopes, then rounded to ``dtype``.
    """
    real = torch.ones(1, group.length, dtype=torch.int64, device=slopes.device) if group.mask is None else group.mask
    positions = (real.cumsum(-1) - 1) * real
    return (slopes[:, None, None] * positions[:, None, None]).to(dtype)


def _repeat(x: Tensor, like: Tensor) -> Tensor:
    """``[b, kv_heads, s, d] -> [b, heads, s, d]``: each kv head once for every query head of its group.

    With one kv head this is a view without a copy, as in HF: fp16 products have other bits on a copy.
    """
    times = like.shape[1] // x.shape[1]
    return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


def _visible(batch: Batch, group: Group, sees: Sees) -> Tensor:
    """Bool ``[b, 1, s, s]``, or ``[s, s]`` without padding: which key each query may see."""
    if group.mask is None:
        return _causal(batch, group.length, sees)
    real = group.mask

    def build() -> Tensor:
        if sees.chunk is None:
            return _causal(batch, group.length, sees) & real[:, None, None, :]
        pads = real.cumsum(-1).eq(0).sum(-1, keepdim=True)  # [b, 1]: parts are counted from a prompt's first token
        part = torch.div(torch.arange(group.length, device=real.device) - pads, sees.chunk, rounding_mode="floor")
        same = part[:, None, :, None] == part[:, None, None, :]
        return _causal(batch, group.length, ALL) & same & real[:, None, None, :]

    return batch.once(("visible", group.start, sees), build)


def _causal(batch: Batch, length: int, sees: Sees) -> Tensor:
    """Bool ``[s, s]``: a corner of a larger one that other lengths share, as one for each would not fit."""
    side, device = 1 << (length - 1).bit_length(), batch.ids.device

    def build() -> Tensor:
        square = torch.ones(side, side, dtype=torch.bool, device=device).tril()
        if sees.window is not None:
            square = square.triu(1 - sees.window)
        if sees.chunk is not None:
            part = torch.arange(side, device=device) // sees.chunk
            square &= part[:, None] == part
        return square

    square = batch.once(("causal", side, sees), build, shared=True)
    return square[:length, :length]


def _additive(batch: Batch, group: Group, sees: Sees, dtype: torch.dtype) -> Tensor:
    """The same as 0 and ``finfo(dtype).min``, HF's eager mask: ``[b, 1, s, s]``, or ``[s, s]`` without padding."""

    def build(visible: Tensor) -> Tensor:
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)

    if group.mask is not None:
        return batch.once(("additive", group.start, sees, dtype), lambda: build(_visible(batch, group, sees)))
    side = 1 << (group.length - 1).bit_length()
    square = batch.once(("additive", side, sees, dtype), lambda: build(_causal(batch, side, sees)), shared=True)
    return square[: group.length, : group.length]


# --- a mixture of experts -------------------------------------------------------------------------------------------


def routed(
    x: Tensor,
    ids: Tensor,
    scores: Tensor,
    experts: Experts[W],
    batch: Batch,
    expert: Callable[[W, Tensor], Tensor],
) -> Tensor:
    """What the chosen experts make of each row, times its score, summed in the order of choice: ``[rows, hidden]``.

    x ``[rows, hidden]``; ids int64 and scores ``[rows, k]`` (fp32 scores make the products and the sum fp32, rounded to
    x's dtype at the end); expert: ``(one expert's weights, rows [n, hidden]) -> [n, hidden]``.

    Each expert is asked for once, and sees exactly the rows that HF's ``grouped_mm`` would show it, in its order (that
    of an unstable sort): at natural height a group at a time, pads included; at fixed height tiles of
    ``batch.sparse_height``. Fill rows are not routed.
    """
    k = ids.shape[1]
    parts = [group.rows for group in batch.groups] if batch.height is None else [slice(0, batch.tokens)]
    terms = torch.zeros(*ids.shape, x.shape[-1], dtype=torch.promote_types(x.dtype, scores.dtype), device=x.device)
    chosen = [torch.sort(ids[part].flatten()) for part in parts]
    ends = [values.bincount(minlength=len(experts)).cumsum(0).tolist() for values, _ in chosen]
    for index, weights in experts.each(sorted(set(ids[: batch.tokens].flatten().tolist()))):
        for part, (_, places), end in zip(parts, chosen, ends, strict=True):
            place = places[end[index - 1] if index else 0 : end[index]]
            row, choice = part.start + place // k, place % k
            if len(row):
                made = batch.few(partial(expert, weights), x[row])
                terms[row, choice] = made * scores[row, choice, None]
    return batch.rows(lambda tile: tile.sum(1), terms).to(x.dtype)
