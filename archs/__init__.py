"""Hand-written transformer families, bit-exact with the Hugging Face forward: one file each, pure functions on tensors.

`family` finds the one for a ``config.json``. A new family is one file and one entry in `FAMILIES`.
"""

from collections.abc import Mapping
from typing import Any

from . import (
    bloom,
    cohere,
    deepseek_v2,
    deepseek_v3,
    falcon,
    gemma,
    gemma2,
    gemma3,
    glm4,
    gpt2,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    granitemoe,
    llama,
    llama4,
    mistral,
    mixtral,
    olmo,
    olmo2,
    olmo3,
    opt,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
    starcoder2,
)
from .contract import ArchError, Family, shown
from .wrappers import TEXT as WRAPPERS
from .wrappers import text_config, text_type, wrapped

FAMILIES: tuple[Family, ...] = (
    bloom.FAMILY,
    cohere.FAMILY,
    deepseek_v2.FAMILY,
    deepseek_v3.FAMILY,
    falcon.FAMILY,
    gemma.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    glm4.FAMILY,
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    gpt_oss.FAMILY,
    gptj.FAMILY,
    granite.FAMILY,
    granitemoe.FAMILY,
    llama.FAMILY,
    llama4.FAMILY,
    mistral.FAMILY,
    mixtral.FAMILY,
    olmo.FAMILY,
    olmo2.FAMILY,
    olmo3.FAMILY,
    opt.FAMILY,
    phi.FAMILY,
    phi3.FAMILY,
    qwen2.FAMILY,
    qwen2_moe.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    smollm3.FAMILY,
    stablelm.FAMILY,
    starcoder2.FAMILY,
)


def family(hf: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``, of its text model if that is wrapped.

    Raises `ArchError` for a model type that is not in the table.
    """
    inner = text_type(hf)
    model_type = inner or hf.get("model_type")
    for candidate in FAMILIES:
        if model_type in candidate.model_types:
            return wrapped(candidate) if inner else candidate
    known = ", ".join(sorted([*WRAPPERS, *(name for candidate in FAMILIES for name in candidate.model_types)]))
    raise ArchError(f"model_type {shown(model_type)} is not supported; supported: {known}")


def supported() -> tuple[Family, ...]:
    """The table of families, by name: ``model_types``, ``about`` (what is special), ``since`` (proved against)."""
    return tuple(sorted(FAMILIES, key=lambda row: row.name.lower()))


__all__ = ["FAMILIES", "WRAPPERS", "ArchError", "Family", "family", "supported", "text_config"]
