"""Multimodal checkpoints whose language model is a family of the table: Gemma 3, Llama 4, LLaVA, Mistral 3.

Their ``config.json`` holds the text model's as ``text_config``, and their tensors lie below one prefix more, beside
those of a vision tower and a projector, which are not read: prompts are text. The text model's bits are those that it
has on its own. `text_config` is what the family's config reads, `wrapped` the family that finds its tensors. Does not
know images, and no maths.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .contract import ArchError, Family, Keys, shown

TEXT = {"gemma3": "gemma3_text", "llama4": "llama4_text", "llava": "llama", "mistral3": "mistral"}
"""``model_type`` of a wrapper -> that of a ``text_config`` that does not name its own."""
ONLY = ("gemma3", "llama4")
"""Wrappers around no other text model."""

SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {**SIZES, "intermediate_size": 11008},
    "mistral": {**SIZES, "intermediate_size": 14336},
}
"""What a text config omits where it is meant."""

HARMLESS = frozenset(
    """boi_token_id boi_token_index eoi_token_id eoi_token_index ignore_index image_seq_length image_token_id
    image_token_index mm_tokens_per_image multimodal_projector_bias projector_hidden_act spatial_merge_size
    vision_config vision_feature_layer vision_feature_select_strategy vocab_size""".split()
)
"""Keys of a wrapper that say how images are seen; the size of the vocabulary is the text config's."""

VISION = r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\..+"


def text_type(hf: Mapping[str, Any]) -> str | None:
    """The model type of the text model in a wrapper's ``config.json``; None for any other."""
    outer = hf.get("model_type")
    if not isinstance(outer, str) or outer not in TEXT:
        return None
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise ArchError(f"config.json of model type {outer!r} lacks 'text_config' (a mapping)")
    inner = str(text.get("model_type") or TEXT[outer])
    if outer in ONLY and inner != TEXT[outer]:
        raise ArchError(f"config.json: {outer!r} around a text model of type {shown(inner)} is not supported")
    return inner


def text_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mapping that a family's config reads: ``config.json`` itself, or the text model's part of a wrapper's.

    That has what it inherits: dtype, quantisation and pad token, and whether embedding and head are tied. Raises
    `ArchError` for a key of the wrapper that is not known.
    """
    inner, outer = text_type(hf), hf.get("model_type")
    if inner is None:
        return hf
    keys = Keys(hf)
    text = {"pad_token_id": keys.get("pad_token_id"), **DEFAULTS.get(inner, {}), **keys.get("text_config")}
    text["model_type"] = inner
    dtype, stored = keys.get("dtype") or keys.get("torch_dtype"), keys.get("quantization_config")
    text |= ({"dtype": dtype} if dtype else {}) | ({"quantization_config": stored} if stored else {})
    tied = keys.flag("tie_word_embeddings", outer in ("gemma3", "mistral3"))
    if outer in ("gemma3", "mistral3") or (outer == "llava" and tied):  # Llama 4's text model decides for itself
        text["tie_word_embeddings"] = tied
    if outer == "gemma3":
        text["final_logit_softcapping"] = None  # the wrapper's head has none, whatever its config says
    keys.finish(HARMLESS)
    return text


def wrapped(text: Family) -> Family:
    """The family of a text model as it lies in a wrapper's files: those on the hub, or those of transformers 5."""
    body = text.prefixes[0][0]
    return dataclasses.replace(
        text,
        prefixes=((f"language_model.{body}", "language_model."), ("model.language_model.", "")),
        ignored=(*text.ignored, VISION),
    )
