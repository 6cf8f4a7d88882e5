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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
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

LARGEST, MOST_LAYERS = 2**31 - 1, 1_000
"""Bounds of what a config may ask for."""
LONG, MANY = 80, 12
"""Characters of a value and number of values that an error shows."""


def shown(value: object) -> str:
    """A value of a config or a file as an error shows it: one line, in bounds whatever it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= LONG else value[:LONG] + "...")
    if isinstance(value, dict | list | tuple) and len(value) > LONG:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 2 * LONG else text[:LONG] + "..."


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
            raise ArchError(f"{self._where}: {key!r} must be {kind}, not {shown(value)}")
        return value

    def size(self, key: str, default: int | None = None, most: int = LARGEST) -> int:
        """An integer from 1 to ``most``."""
        value: int = self._checked(key, default, (int,), "a positive integer")
        if not 1 <= value <= most:
            raise ArchError(f"{self._where}: {key!r} must be an integer from 1 to {most}, not {shown(value)}")
        return value

    def number(
        self, key: str, default: float | None = None, *, least: float = -math.inf, above: float = -math.inf
    ) -> float:
        """A finite number, at least ``least`` and larger than ``above``."""
        given = self._checked(key, default, (int, float), "a number")
        try:
            value = float(given)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise ArchError(f"{self._where}: {key!r} must be a finite number, not {shown(given)}")
        if value < least or value <= above:
            bound = f"{least:g} or more" if least > above else f"more than {above:g}"
            raise ArchError(f"{self._where}: {key!r} must be a number, {bound}, not {shown(given)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value: bool = self._checked(key, default, (bool,), "true or false")
        return value

    def choice(self, key: str, default: str | None, choices: Collection[str]) -> str:
        value: str = self._checked(key, default, (str,), "a string")
        if value not in choices:
            raise ArchError(
                f"{self._where}: {key} {shown(value)} is not supported; supported: {', '.join(sorted(choices))}"
            )
        return value

    def optional(self, key: str, default: int | None = None) -> int | None:
        """A positive integer, or None where the key is there and null; ``default`` is for an absent key."""
        if key in self._hf and self._hf[key] is None:
            self._used.add(key)
            return None
        return self.size(key, default) if key in self._hf or default is not None else self.get(key)

    def only(self, key: str, default: Any, *allowed: Any) -> Any:
        """A key that HF reads, of which only ``allowed`` values are computed here."""
        value = self.get(key, default)
        if value not in allowed:
            known = " or ".join(repr(other) for other in allowed)
            raise ArchError(f"{self._where}: {key!r} = {shown(value)} is not supported; supported: {known}")
        return value

    def sequence(self, key: str, kind: type, length: int | None = None) -> tuple[Any, ...] | None:
        """A list of ``kind`` (int, float, str), of ``length`` if given; None if it is absent."""
        value = self.get(key)
        if value is None:
            return None
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, list | tuple) or not all(type(item) in kinds for item in value):
            raise ArchError(f"{self._where}: {key!r} must be a list of {kind.__name__}, not {shown(value)}")
        if len(value) > MOST_LAYERS:
            raise ArchError(f"{self._where}: {key!r} has {len(value)} entries; more than {MOST_LAYERS} are refused")
        if length is not None and len(value) != length:
            raise ArchError(f"{self._where}: {key!r} has {len(value)} entries where {length} are needed")
        try:
            items = tuple(kind(item) for item in value)
            finite = kind is not float or all(map(math.isfinite, items))
        except OverflowError:
            finite = False
        if not finite:
            raise ArchError(f"{self._where}: {key!r} must hold finite numbers, not {shown(value)}")
        return items

    def layer_types(self, layers: int, kinds: Collection[str], default: Callable[[int], str]) -> tuple[str, ...]:
        """Each layer's kind of attention, from ``layer_types`` or by the family's rule."""
        found = self.sequence("layer_types", str, layers) or tuple(default(layer) for layer in range(layers))
        unknown = sorted(set(found) - set(kinds))
        if unknown:
            known = ", ".join(sorted(kinds))
            raise ArchError(f"{self._where}: layer type {shown(unknown[0])} is not supported; supported: {known}")
        return found

    def nested(self, key: str) -> "Keys":
        """The keys of a nested mapping; an absent one is empty. It has its own `finish`."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise ArchError(f"{self._where}: {key!r} must be a mapping, not {shown(value)}")
        return Keys(value, f"{self._where} {key!r}")

    def __contains__(self, key: str) -> bool:
        return self._hf.get(key) is not None

    def finish(self, harmless: Collection[str] = ()) -> None:
        """Refuse every key that was not read and is not known to be harmless."""
        for key in MUST_BE_OFF:
            if self._hf.get(key) and key not in self._used:
                raise ArchError(f"{self._where}: {key!r} = {shown(self._hf[key])} is not supported")
        unknown = sorted(set(self._hf) - self._used - HARMLESS - set(MUST_BE_OFF) - set(harmless))
        if unknown:
            found = ", ".join(f"{shown(key)} = {shown(self._hf[key])}" for key in unknown[:MANY])
            found += f" and {len(unknown) - MANY} more" if len(unknown) > MANY else ""
            raise ArchError(f"{self._where} holds what this family does not implement: {found}")


# --- weights --------------------------------------------------------------------------------------------------------


W = TypeVar("W", covariant=True)


@dataclass(frozen=True, slots=True)
class Source:
    """Where one field of a weights class lies: tensor names below its prefix, and their shape in words of the config.

    Several names are stacked along the first dimension, each of the same shape.
    """

    names: tuple[str, ...]
    dims: tuple[str | int, ...]
    when: str | None = None
    dtype: torch.dtype | None = None

    def shape(self, config: Any) -> tuple[int, ...]:
        """Of each stored tensor."""
        return tuple(dim if isinstance(dim, int) else getattr(config, dim) for dim in self.dims)


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """Where a layer's experts lie: below ``prefix``, ``count`` of them, each an instance of ``weights``."""

    prefix: str
    weights: type
    count: str


def source(
    name: str | tuple[str, ...], *dims: str | int, when: str | None = None, dtype: torch.dtype | None = None
) -> Any:
    """A field of a weights class.

    name: the tensor's name below the layer's (or the model's) prefix; several are stacked into adjacent memory.
    dims: its shape, each an attribute of the config or a number. when: a boolean attribute of the config; where that is
    false the field is None and the tensor must not exist. dtype: of a tensor that is not cast to the model's.
    """
    names = (name,) if isinstance(name, str) else name
    return dataclasses.field(metadata={"source": Source(names, dims, when, dtype)})


def experts(prefix: str, weights: type, count: str) -> Any:
    """A field that holds a layer's `Experts`.

    weights: one expert's weights class; its names come below ``prefix``. With ``{e}`` in the name each expert has
    tensors of its own; without, a stored tensor holds all experts along a first dimension of its own.
    count: an attribute of the config.
    """
    return dataclasses.field(metadata={"experts": ExpertSource(prefix, weights, count)})


def stored(weights: type, config: Any) -> dict[str, Source]:
    """Field name -> `Source` of every tensor that a weights class takes from the checkpoint under this config."""
    sources = {f.name: f.metadata["source"] for f in dataclasses.fields(weights) if "source" in f.metadata}
    return {name: src for name, src in sources.items() if src.when is None or getattr(config, src.when)}


def routed(weights: type) -> dict[str, ExpertSource]:
    """Field name -> `ExpertSource` of every handle to experts that a weights class has."""
    return {f.name: f.metadata["experts"] for f in dataclasses.fields(weights) if "experts" in f.metadata}


class Experts(Protocol[W]):
    """The experts of a layer, resident or read as they are asked for."""

    def __len__(self) -> int: ...

    def each(self, wanted: Sequence[int]) -> Iterator[tuple[int, W]]:
        """Index and weights of the wanted experts, in this order; weights are good until the next are asked for."""
        ...


@dataclass(frozen=True)
class Resident(Generic[W]):
    """`Experts` that are all in memory."""

    held: Sequence[W]

    def __len__(self) -> int:
        return len(self.held)

    def each(self, wanted: Sequence[int]) -> Iterator[tuple[int, W]]:
        return ((index, self.held[index]) for index in wanted)


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

MODEL_HOOKS = ("embedding", "final_norm", "logits")
"""Hooks outside the layers; their ``layer_idx`` is None."""
READ_ONLY_HOOKS = frozenset({"attn_pattern", "logits", "router_logits", "expert_ids"})


Shape = tuple[int, ...]


def layer_hooks(
    *,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    mlp: Mapping[str, Shape],
    parallel: bool = False,
) -> dict[str, Shape]:
    """The hooks of a layer in the order in which they are shown, with their shapes behind the rows.

    mlp: what the MLP shows of its inside. parallel: both branches start from ``residual_pre``: no ``residual_mid``.
    """
    queries, keys, values = (heads, head_dim), (kv_heads, head_dim), value_dim or head_dim
    return {
        "residual_pre": (hidden,),
        "q": queries,
        "k": keys,
        "v": (kv_heads, values),
        "q_rot": queries,
        "k_rot": keys,
        "attn_pattern": (heads,),
        "z": (heads, values),
        "attn_out": (hidden,),
        **({} if parallel else {"residual_mid": (hidden,)}),
        **mlp,
        "mlp_out": (hidden,),
        "residual_post": (hidden,),
    }


def dense_hooks(width: int) -> dict[str, Shape]:
    """What a dense MLP shows."""
    return {"mlp_hidden": (width,)}


def sparse_hooks(experts: int, chosen: int) -> dict[str, Shape]:
    """What a mixture of experts shows: each token's logits over experts, and the ids of the chosen ones."""
    if chosen > experts:
        raise ArchError(f"config.json: each token is to choose {chosen} of {experts} experts")
    return {"router_logits": (experts,), "expert_ids": (chosen,)}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table of families: all that the engine knows of a family.

    model_types: values of ``model_type`` in ``config.json``.
    config: ``from_hf(mapping) -> config``, a frozen dataclass with at least ``layers``, ``hidden``, ``vocab``,
        ``max_positions`` (None: unbounded), ``tied``.
    embed_weights, layer_weights, norm_weights, head_weights: the weights classes; ``layer_weights`` is asked per layer.
    embed, block, final_norm, unembed: the maths, pure functions.
    hooks: the hook points of a layer, in the order in which they come, with their shapes behind the rows; layers may
        differ. dtypes: of hooks that are not in the model's dtype (``expert_ids`` is int64 everywhere).
    prefixes: pairs of what all names but the head's may start with, and what then the head's starts with.
    layer_prefix: a layer's, with ``{i}``.
    embedding, head: the names of the two tensors that may be tied. ignored: patterns (re.fullmatch) below the prefix of
        tensors that may lie in a checkpoint and are not read; ``{layers}`` is the number of layers.
    attention: the implementations HF has for the family, its default first; or how a config decides that.
    final_width: of what the final norm makes and the head takes.
    activations: config words whose values are the widths of the tensors that activation functions see.
    about: what is special, for the table of families. since: the transformers version that it was first proved with.
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
    hooks: Callable[[Any, int], Mapping[str, Shape]]
    prefixes: tuple[tuple[str, str], ...]
    layer_prefix: str
    embedding: str
    head: str
    ignored: tuple[str, ...] = ()
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    attention: tuple[Attention, ...] | Callable[[Any], tuple[Attention, ...]] = ("sdpa", "eager")
    final_width: Callable[[Any], int] = lambda c: c.hidden
    activations: tuple[str, ...] = ("mlp_width",)
    about: str = ""
    since: str = "5.23.0"

    def logits(self, x: Tensor, pieces: Iterable[Any], config: Any, batch: Batch) -> Tensor:
        """``[rows, hidden] -> [rows, vocab]``, by a head whose weights come in pieces of the vocabulary, in order."""
        made = [self.unembed(x, piece, config, batch) for piece in pieces]
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)

    def implementations(self, config: Any) -> tuple[Attention, ...]:
        """Of attention, as HF has them for this config, the default first."""
        return self.attention(config) if callable(self.attention) else self.attention
