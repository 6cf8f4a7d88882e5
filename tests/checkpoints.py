"""Tiny checkpoints that can show a fault, written as Hugging Face writes them.

A model with default weights has norms of 1, biases of 0 and nearly uniform attention: swapped norms, a dropped bias, a
wrong rope or mask hardly show. So every tensor is redrawn, config values are off their defaults, and prompts are longer
than every window and every original context. `Checks` says how one family's model is made and looked into, `Variant`
what its config and files can look like; `write` makes one on disk. A family's own are in ``variants/<file>.py``, as
``CHECKS`` and ``VARIANTS``. The reference loader of every test is `transformers`' own ``from_pretrained``.
"""

import importlib
import json
import math
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import variants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import archs

Head = Literal["own", "tied", "other", "alone"]
"""own: untied. tied: only the embedding is stored. other: tied in the config, yet a different head is stored, which
counts. alone: tied, and only the head is stored, which is the embedding too."""

VOCAB = 97
LONGEST = 24
"""Tokens of the longest prompt that tests draw: beyond every ``max_position_embeddings`` below that rope may exceed."""

Tensors = dict[str, Tensor]
Draw = Callable[..., Tensor]
"""``draw(*shape)``: random values in the variant's dtype."""


@dataclass(frozen=True, kw_only=True)
class Checks:
    """How checkpoints of a family are made, and where Hugging Face's model of it shows what the hooks show.

    config: a small ``config.json``, ``model_type`` included. root: what names of the body start with. embedding, head:
    names of the two tensors that may be tied, the first below the root. layers, norm: module paths, from the CausalLM
    model; norm None if there is none. points: hook -> "module side" or "module side which" of a layer: side is "in" or
    "out", which is "[1]" for the second of several outputs, "0/3" for the first third of a fused projection; a layer
    without that module is passed over. sums: how residual_pre (x), attn_out (a) and mlp_out (m) become residual_post,
    as Python on tensors; where it names residual_mid (mid), that is x + a. None where the branches are not added to the
    stream as they are, which the family's docs then explain.
    fused: regular expression of names of projections that make queries and keys, which are drawn large. draw: values
    for tensors that the general rule does not suit; ``(name, like, values) -> values``, None to leave the rule.
    positions: whether HF's forward takes ``position_ids``. auto: the class that loads it.
    """

    config: dict[str, Any]
    root: str = "model."
    embedding: str = "embed_tokens.weight"
    head: str = "lm_head.weight"
    layers: str = "model.layers"
    norm: str | None = "model.norm"
    points: dict[str, str] = field(default_factory=lambda: {"attn_out": "self_attn out", "mlp_out": "mlp out"})
    sums: str | None = "mid + m"
    fused: str = r"q_proj|k_proj|qkv_proj|q_b_proj|query_key_value|c_attn"
    draw: Callable[[str, Tensor, Tensor], Tensor | None] = lambda name, like, values: None
    positions: bool = True
    auto: Any = AutoModelForCausalLM


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One checkpoint: a family's `Checks` by name, config values over its own, and how its files look.

    gain: how far attention is from uniform; the standard deviation of scores is about ``gain ** 2``.
    prefix: whether names start with the family's root. shard: size at which files are split.
    extra: makes tensors that files hold besides, by name. rename: what becomes of a file's tensors as a last step.
    legacy: what becomes of the ``config.json``, for files as old versions wrote them.
    attention: implementations to compare with, all that the family has if empty.
    """

    family: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    gain: float = 1.6
    dtype: torch.dtype = torch.float32
    head: Head = "own"
    prefix: bool = True
    shard: str = "1GB"
    extra: Callable[[dict[str, Any], Draw], Tensors] = lambda config, draw: {}
    rename: Callable[[Tensors], Tensors] = lambda tensors: tensors
    legacy: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    attention: tuple[str, ...] = ()

    @property
    def checks(self) -> Checks:
        return CHECKS[self.family]

    @property
    def values(self) -> dict[str, Any]:
        """The arguments of its config class, ``model_type`` included."""
        values = self.checks.config | self.config
        return values | ({"tie_word_embeddings": True} if self.head != "own" else {})


def head_norms(name: str, like: Tensor, values: Tensor) -> Tensor | None:
    """`Checks.draw` of families that normalise queries and keys: scores are as large as these norms' weights."""
    return 1 + 0.3 * values if name.endswith(("q_norm.weight", "k_norm.weight")) else None


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **parameters}}


def write(variant: Variant, folder: Path, seed: int = 0) -> Path:
    """Makes the checkpoint in an empty folder and returns that."""
    generator = torch.Generator().manual_seed(seed)
    model = build(variant)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = _draw(name, tensor, variant, generator).to(variant.dtype)
    model.save_pretrained(folder, max_shard_size=variant.shard)
    _rewrite_files(folder, variant, lambda *shape: torch.randn(*shape, generator=generator).to(variant.dtype))
    path = folder / "config.json"
    path.write_text(json.dumps(variant.legacy(json.loads(path.read_text()))))
    return folder


def build(variant: Variant) -> PreTrainedModel:
    """HF's model with its own random weights."""
    config: Any = AutoConfig.for_model(**variant.values)
    model: PreTrainedModel = variant.checks.auto.from_config(config)
    return model


def tensors(folder: Path) -> Tensors:
    """All tensors of a checkpoint by their stored names."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _draw(name: str, like: Tensor, variant: Variant, generator: torch.Generator) -> Tensor:
    """A tensor in the place of ``like``: random, and large where a fault could hide behind small numbers."""
    checks = variant.checks
    values = torch.randn(like.shape, generator=generator)
    own = checks.draw(name, like, values)
    if own is not None:
        return own * variant.gain if re.search(checks.fused, name) else own
    if like.ndim < 2:
        return 0.3 * values if name.endswith("bias") else 1 + 0.3 * values
    if "embed" in name or "wte" in name or "wpe" in name:
        return values
    values /= math.sqrt(like.shape[-1])
    return variant.gain * values if re.search(checks.fused, name) else values


def _rewrite_files(folder: Path, variant: Variant, draw: Draw) -> None:
    """Gives the files that `save_pretrained` wrote the names and extra tensors that the variant asks for."""
    checks, files = variant.checks, sorted(folder.glob("*.safetensors"))
    embedding = checks.root + checks.embedding
    places: dict[str, str] = {}
    for file in files:
        held = load_file(file)
        if file == files[0]:
            held |= variant.extra(variant.values, draw)
        if variant.head == "other" and embedding in held:
            held[checks.head] = draw(*held[embedding].shape)
        if variant.head == "alone":
            held = {(checks.head if name == embedding else name): tensor for name, tensor in held.items()}
        if not variant.prefix:
            held = {name.removeprefix(checks.root): tensor for name, tensor in held.items()}
        held = variant.rename(held)
        save_file(held, file, metadata={"format": "pt"})
        places |= dict.fromkeys(held, file.name)
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


# --- all families ---------------------------------------------------------------------------------------------------

CHECKS: dict[str, Checks] = {}
VARIANTS: dict[str, Variant] = {}
"""Every checkpoint that tests know, by name; a family's own names start with the family's."""
REFUSED: list[tuple[str, dict[str, Any], str]] = []
"""(checks, changes of its config, what the message must name): configs that no family computes."""
FAULTS: list[tuple[str, str, str, str]] = []
"""(file of `archs`, text in it, another text, variant): single faults that the conformance suite must catch, in one
dtype at least."""


def _collect() -> None:
    for module in pkgutil.iter_modules(variants.__path__):
        found = importlib.import_module(f"variants.{module.name}")
        CHECKS.update(found.CHECKS)
        VARIANTS.update(found.VARIANTS)
        REFUSED.extend(getattr(found, "REFUSED", []))
        FAULTS.extend((f"{module.name}.py", *fault) for fault in getattr(found, "FAULTS", []))
    tried = {checks.config["model_type"] for checks in CHECKS.values()}
    for family in archs.FAMILIES:  # a family without a file of its own is under test all the same
        for model_type in set(family.model_types) - tried:
            sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "pad_token_id": 0}
            shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
            CHECKS[model_type] = Checks(config={"model_type": model_type, **sizes, **shape})
            VARIANTS[model_type] = Variant(family=model_type)


_collect()
CORE = [name for name, variant in VARIANTS.items() if variant.family in ("llama", "gpt2")]
"""The two families that test_archs.py and test_parity.py look at in every detail; test_conformance.py is over all."""
