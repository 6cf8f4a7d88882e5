"""The operations that families share: norms, activations, attention.

Each is the chain of operations of the Hugging Face forward, in its order of rounding, so that its bits are the same;
where another chain is used it was shown to give equal bits. Attention follows Vaswani et al. (2017), grouped queries
Ainslie et al. (2023), RMSNorm Zhang and Sennrich (2019). Nothing here knows a family.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .batch import Batch, Group
from .contract import Tap

# --- norms ----------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the Llama kind: normalise in fp32, round to the dtype of ``x [rows, width]``, then scale."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype).mul_(weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
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

Probabilities = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""``(q [b, h, s, d], k [b, h, s, d], additive mask [b, 1, s, s] or [s, s], scale) -> [b, h, s, s]``, dtype of q."""


def heads(x: Tensor, width: int) -> Tensor:
    """``[rows, heads * width] -> [rows, heads, width]``, a view."""
    return rearrange(x, "rows (heads width) -> rows heads width", width=width)


def attention(
    q: Tensor, k: Tensor, v: Tensor, batch: Batch, tap: Tap, scale: float, probabilities: Probabilities | None = None
) -> Tensor:
    """Causal attention, one length group at a time: ``[rows, heads, d], [rows, kv_heads, d] x 2 -> [rows, heads, d]``.

    ``scale`` multiplies ``q k^T``. ``probabilities`` replaces `softmax_probabilities` where a family's eager attention
    is written differently. Shows ``attn_pattern`` where it is wanted: the probabilities themselves under eager, under
    sdpa a by-product in fp32 from which nothing else is computed.

    At fixed height every prompt is a call of its own, on copies: the bits of a product depend on how many are in the
    batch, and in fp32 on whether addresses are multiples of 16 bytes.
    """
    z = q.new_empty(*q.shape[:-1], v.shape[-1])
    z[batch.tokens :] = 0
    for group in batch.groups:
        whole = tuple(group.sequences(x).transpose(1, 2) for x in (q, k, v, z))
        calls = [whole] if batch.height is None else zip(*(torch.split(x, 1) for x in whole), strict=True)
        patterns: list[Tensor] = []
        for queries, keys, values, out in calls:
            if batch.height is not None:
                queries, keys, values = queries.clone(), keys.clone(), values.clone()
            if batch.attention == "eager":
                keys, values = _repeat(keys, queries), _repeat(values, queries)
                p = (probabilities or softmax_probabilities)(queries, keys, _additive(batch, group, q.dtype), scale)
                out.copy_(torch.matmul(p, values))
            else:
                out.copy_(_sdpa(queries, keys, values, None if group.mask is None else _visible(batch, group), scale))
                if tap.wants("attn_pattern"):
                    exact = _repeat(keys, queries).float()
                    p = softmax_probabilities(queries.float(), exact, _additive(batch, group, torch.float32), scale)
            if tap.wants("attn_pattern"):
                patterns.append(p)
        if patterns:
            tap("attn_pattern", torch.cat(patterns), group)
    return z


def softmax_probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """HF's eager attention: scores in the model's dtype, softmax in fp32."""
    scores = torch.matmul(q, k.transpose(2, 3)) * scale + mask
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """HF's sdpa attention, its choice between ``enable_gqa`` and repeated kv heads included."""
    grouped = k.shape[1] != q.shape[1]
    gqa = grouped and mask is None and k.shape[-1] == v.shape[-1] <= 256
    if grouped and not gqa:
        k, v = _repeat(k, q), _repeat(v, q)
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=gqa)


def _repeat(x: Tensor, like: Tensor) -> Tensor:
    """``[b, kv_heads, s, d] -> [b, heads, s, d]``: each kv head once for every query head of its group.

    With one kv head this is a view without a copy, as in HF: fp16 products have other bits on a copy.
    """
    times = like.shape[1] // x.shape[1]
    return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


def _visible(batch: Batch, group: Group) -> Tensor:
    """Bool ``[b, 1, s, s]``: which key each query may see, by causality and padding."""
    assert group.mask is not None
    key = group.mask[:, None, None, :]
    return batch.once(("visible", group.start), lambda: _causal(batch, group.length) & key)


def _causal(batch: Batch, length: int) -> Tensor:
    """Bool ``[s, s]``: a corner of a larger one that other lengths share, as one for each would not fit."""
    side, device = 1 << (length - 1).bit_length(), batch.ids.device
    square = batch.once(
        ("causal", side), lambda: torch.ones(side, side, dtype=torch.bool, device=device).tril(), shared=True
    )
    return square[:length, :length]


def _additive(batch: Batch, group: Group, dtype: torch.dtype) -> Tensor:
    """The same as 0 and ``finfo(dtype).min``, HF's eager mask: ``[b, 1, s, s]``, or ``[s, s]`` without padding."""

    def build(visible: Tensor) -> Tensor:
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)

    if group.mask is not None:
        return batch.once(("additive", group.start, dtype), lambda: build(_visible(batch, group)))
    side = 1 << (group.length - 1).bit_length()
    square = batch.once(("additive", side, dtype), lambda: build(_causal(batch, side)), shared=True)
    return square[: group.length, : group.length]
