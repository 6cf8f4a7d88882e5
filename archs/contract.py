"""What a family of models is to the engine: a config, weights with their places in the checkpoint, maths, a table.

A family file has four sections (see ``archs/llama.py``). This module gives each of them its words:

* config: `Keys` reads ``config.json`` and refuses every key that nobody used;
* weights: `source` says where a field lies in the checkpoint and its shape in config words, `stored` lists them;
* maths: `Tap` is the point where a value is shown and may be replaced, `Batch` the way to sequences;
* table: `Family`.

It does not know files, devices, or any particular family.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .batch import Attention, Batch, Group


class ArchError(ValueError):
    """A config or a checkpoint that no family can compute exactly; the message names the key or the tensor."""


# --- config ---------------------------------------------------------------------------------------------------------

HARMLESS = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range is_decoder label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p unsloth_fixed use_bfloat16
    use_cache
    """.split()
)
"""Keys that any ``config.json`` may hold and that no forward pass depends on: names, tokens, generation defaults."""

MUST_BE_OFF = (
    "add_cross_attention cross_attention_hidden_size is_encoder_decoder pruned_heads quantization_config "
    "tie_encoder_decoder use_bidirectional_attention"
).split()
"""Keys that change the forward pass of any family; tolerated only where they are off (false, null or empty)."""

LARGEST, MOST_LAYERS = 2**31 - 1, 10_000
"""Bounds of what a config may ask for."""


class Keys:
    """Reads ``config.json`` and remembers what was read, so that `finish` can refuse the rest.

    A key whose value is null counts as absent. All errors are `ArchError` and name the key.
    """

    def __init__(self, hf: Mapping[str, Any], where: str = "config.json") -> None:
        self._hf, self._where, self._used = hf, where, set[str]()

    def get(self, key: str, default: Any = None) -> Any:
        self._used.add(key)
        value = self._hf.get(key)
        return default if value is None else value

    def _checked(self, key: str, default: Any, types: tuple[type, ...], kind: str) -> Any:
        value = self.get(key, default)
        if value is None:
            raise ArchError(f"{self._where} lacks {key!r} ({kind})")
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ArchError(f"{self._where}: {key!r} must be {kind}, not {value!r}")
        return value

    def size(self, key: str, default: int | None = None, most: int = LARGEST) -> int:
        """An integer from 1 to ``most``."""
        value: int = self._checked(key, default, (int,), "a positive integer")
        if not 1 <= value <= most:
            raise ArchError(f"{self._where}: {key!r} must be an integer from 1 to {most}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = float(self._checked(key, default, (int, float), "a number"))
        if not math.isfinite(value):
            raise ArchError(f"{self._where}: {key!r} must be a finite number, not {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value: bool = self._checked(key, default, (bool,), "true or false")
        return value

    def choice(self, key: str, default: str | None, choices: Collection[str]) -> str:
        value: str = self._checked(key, default, (str,), "a string")
        if value not in choices:
            raise ArchError(f"{self._where}: {key} {value!r} is not supported; supported: {', '.join(sorted(choices))}")
        return value

    def nested(self, key: str) -> "Keys":
        """The keys of a nested mapping; an absent one is empty. It has its own `finish`."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise ArchError(f"{self._where}: {key!r} must be a mapping, not {value!r}")
        return Keys(value, f"{self._where} {key!r}")

    def __contains__(self, key: str) -> bool:
        return self._hf.get(key) is not None

    def finish(self, harmless: Collection[str] = ()) -> None:
        """Refuse every key that was not read and is not known to be harmless."""
        for key in MUST_BE_OFF:
            if self._hf.get(key):
                raise ArchError(f"{self._where}: {key!r} = {self._hf[key]!r} is not supported")
        unknown = sorted(set(self._hf) - self._used - HARMLESS - set(MUST_BE_OFF) - set(harmless))
        if unknown:
            found = ", ".join(f"{key!r} = {self._hf[key]!r}" for key in unknown)
            raise ArchError(f"{self._where} holds what this family does not implement: {found}")


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """Where one field of a weights class lies: tensor name below its prefix, and its shape in words of the config."""

    name: str
    dims: tuple[str, ...]
    when: str | None = None

    def shape(self, config: Any) -> tuple[int, ...]:
        return tuple(getattr(config, dim) for dim in self.dims)


def source(name: str, *dims: str, when: str | None = None) -> Any:
    """A field of a weights class.

    name: the tensor's name below the layer's (or the model's) prefix. dims: its shape, each an attribute of the config.
    when: a boolean attribute of the config; where that is false the field is None and the tensor must not exist.
    """
    return dataclasses.field(metadata={"source": Source(name, dims, when)})


def stored(weights: type, config: Any) -> dict[str, Source]:
    """Field name -> `Source` of every tensor that a weights class takes from the checkpoint under this config."""
    sources = {field.name: field.metadata["source"] for field in dataclasses.fields(weights)}
    return {name: src for name, src in sources.items() if src.when is None or getattr(config, src.when)}


# --- maths ----------------------------------------------------------------------------------------------------------


class Tap(Protocol):
    """What stands at every hook point of a block."""

    def __call__(self, hook: str, value: Tensor, group: Group | None = None) -> Tensor:
        """Show ``value``; returns it, or what a callback put in its place (same shape and dtype).

        value: flat rows ``[rows, *rest]``; with ``group``, that group's own tensor ``[prompts, *rest]``.
        """
        ...

    def wants(self, hook: str) -> bool:
        """Whether anybody looks, for values that would be computed on the side only."""
        ...


class _NoTap:
    def __call__(self, hook: str, value: Tensor, group: Group | None = None) -> Tensor:
        return value

    def wants(self, hook: str) -> bool:
        return False


no_tap: Tap = _NoTap()
"""The tap of a forward pass that nobody watches."""

# --- table ----------------------------------------------------------------------------------------------------------

RESIDUAL_HOOKS = ("residual_pre", "attn_out", "residual_mid", "mlp_out", "residual_post")
SEQUENTIAL_HOOKS = (
    *("residual_pre", "q", "k", "v", "q_rot", "k_rot", "attn_pattern", "z", "attn_out"),
    *("residual_mid", "mlp_hidden", "mlp_out", "residual_post"),
)
"""The hooks of a block whose MLP comes after its attention, in the order in which they are shown."""
MODEL_HOOKS = ("embedding", "final_norm", "logits")
"""Hooks outside the layers; their ``layer_idx`` is None."""
READ_ONLY_HOOKS = frozenset({"attn_pattern", "logits", "router_logits", "expert_ids"})


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table of families: all that the engine knows of a family.

    model_types: values of ``model_type`` in ``config.json``.
    config: ``from_hf(mapping) -> config``, a frozen dataclass with at least ``layers``, ``hidden``, ``vocab``,
        ``max_positions`` (None: unbounded), ``tied``.
    embed_weights, layer_weights, norm_weights, head_weights: the weights classes; ``layer_weights`` is asked per layer.
    embed, block, final_norm, unembed: the maths, pure functions.
    hooks: the hook points of a layer, in the order in which they come (layers may differ); widths: each one's shape
        behind the rows.
    prefixes: what the names of all tensors but the head's may start with. layer_prefix: a layer's, with ``{i}``.
    embedding, head: the names of the two tensors that may be tied. ignored: patterns (re.fullmatch) below the prefix of
        tensors that may lie in a checkpoint and are not read.
    attention: the implementations HF has for the family, its default first.
    activations: config words whose values are the widths of the tensors that activation functions see.
    """

    name: str
    model_types: tuple[str, ...]
    config: Callable[[Mapping[str, Any]], Any]
    embed_weights: type
    layer_weights: Callable[[Any, int], type]
    norm_weights: type
    head_weights: type
    embed: Callable[[Any, Any, Batch], Tensor]
    block: Callable[[Tensor, Any, Any, int, Batch, Tap], Tensor]
    final_norm: Callable[[Tensor, Any, Any, Batch], Tensor]
    unembed: Callable[[Tensor, Any, Any, Batch], Tensor]
    hooks: Callable[[Any, int], tuple[str, ...]]
    widths: Callable[[Any], Mapping[str, tuple[int, ...]]]
    prefixes: tuple[str, ...]
    layer_prefix: str
    embedding: str
    head: str
    ignored: tuple[str, ...] = ()
    attention: tuple[Attention, ...] = ("sdpa", "eager")
    activations: tuple[str, ...] = ("mlp_width",)
