"""Hand-written transformer families, bit-exact with the Hugging Face forward: one file each, pure functions on tensors.

`family` finds the one for a ``config.json``. A new family is one file and one entry in `FAMILIES`.
"""

from collections.abc import Mapping
from typing import Any

from . import (
    bloom,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gpt_oss,
    llama,
    llama4,
    mistral,
    mixtral,
    opt,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from .contract import ArchError, Family

FAMILIES: tuple[Family, ...] = (
    bloom.FAMILY,
    gemma.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    gpt_oss.FAMILY,
    llama.FAMILY,
    llama4.FAMILY,
    mistral.FAMILY,
    mixtral.FAMILY,
    opt.FAMILY,
    qwen2.FAMILY,
    qwen2_moe.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
)


def family(hf: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``. Raises `ArchError` for a model type that is not in the table."""
    model_type = hf.get("model_type")
    for candidate in FAMILIES:
        if model_type in candidate.model_types:
            return candidate
    known = ", ".join(sorted(name for candidate in FAMILIES for name in candidate.model_types))
    raise ArchError(f"model_type {model_type!r} is not supported; supported: {known}")


def supported() -> tuple[Family, ...]:
    """The table of families, by name: ``model_types``, ``about`` (what is special), ``since`` (proved against)."""
    return tuple(sorted(FAMILIES, key=lambda row: row.name.lower()))


__all__ = ["FAMILIES", "ArchError", "Family", "family", "supported"]
