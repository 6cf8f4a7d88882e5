"""What a callback may ask about the sweep that it is part of; see `fpwap.callbacks.base.Context`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from archs.contract import Family

from .callbacks.base import Callback, Site
from .errors import RequestError
from .prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class SweepContext:
    """Sizes of the model and the dataset, and per sample id its tokens, length and metadata."""

    dtype: torch.dtype
    device: torch.device
    family: Family
    config: Any
    prompts: Prompts
    bound: Mapping[int, Sequence[Site]]

    @property
    def layers(self) -> int:
        return int(self.config.layers)

    @property
    def hidden(self) -> int:
        return int(self.config.hidden)

    @property
    def vocab(self) -> int:
        return int(self.config.vocab)

    @property
    def n_prompts(self) -> int:
        return self.prompts.n

    @property
    def total_tokens(self) -> int:
        return self.prompts.total_tokens

    def widths(self, hook: str) -> tuple[int, ...]:
        """Shape behind ``[b, s]`` at a hook (behind ``[b]`` at "attn_pattern", whose last two are lengths)."""
        model_level = {
            "embedding": (self.hidden,),
            "final_norm": (self.family.final_width(self.config),),
            "logits": (self.vocab,),
        }
        if hook in model_level:
            return model_level[hook]
        by_layer = (self.family.hooks(self.config, layer) for layer in range(self.layers))
        return next(hooks[hook] for hooks in by_layer if hook in hooks)

    def dtype_at(self, hook: str) -> torch.dtype:
        """The dtype of the values at a hook: the model's, except where the family says otherwise."""
        return torch.int64 if hook == "expert_ids" else self.family.dtypes.get(hook, self.dtype)

    def sites(self, callback: Callback) -> tuple[Site, ...]:
        return tuple(self.bound[id(callback)])

    def tokens(self, sample_id: int) -> Tensor:
        """int32 ``[length]``, a copy."""
        return torch.from_numpy(self.prompts.tokens(sample_id).copy())

    def length(self, sample_id: int) -> int:
        return int(self.prompts.offsets[sample_id + 1] - self.prompts.offsets[sample_id])

    def metadata(self, sample_id: int) -> Mapping[str, Any]:
        """The sample's dict less ids and mask. Raises `RequestError` if no callback said that it needs metadata."""
        if self.prompts.metadata is None:
            raise RequestError("metadata was not kept: set needs_metadata = True on the callback that asks for it")
        return self.prompts.metadata[sample_id]
