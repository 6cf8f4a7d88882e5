"""Hand-written transformer families, bit-exact with the Hugging Face forward: one file each, pure functions on tensors.

`family` finds the one for a ``config.json``. A new family is one file and one entry in `FAMILIES`.
"""

from collections.abc import Mapping
from typing import Any

from . import gpt2, llama, mistral, mixtral
from .contract import ArchError, Family

FAMILIES: tuple[Family, ...] = (gpt2.FAMILY, llama.FAMILY, mistral.FAMILY, mixtral.FAMILY)


def family(hf: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``. Raises `ArchError` for a model type that is not in the table."""
    model_type = hf.get("model_type")
    for candidate in FAMILIES:
        if model_type in candidate.model_types:
            return candidate
    known = ", ".join(sorted(name for candidate in FAMILIES for name in candidate.model_types))
    raise ArchError(f"model_type {model_type!r} is not supported; supported: {known}")


__all__ = ["FAMILIES", "ArchError", "Family", "family"]
