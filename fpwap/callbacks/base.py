"""The protocol between a sweep and what is done with its activations.

A `Callback` says which sites it wants and is shown their values, a few prompts at a time; it answers with an `Emit` (a
row of output per prompt or per token), a `WriteBack` (a new value), both or nothing, and may leave a `LayerArtifact`
when a layer is done.

    on_sweep_start
      on_layer_start(l), on_layer_start(l + 1), ...    layers that are resident together
        on_batch(l, ...), on_batch(l + 1, ...), ...    microbatch by microbatch: layers interleave
      on_layer_end(l), on_layer_end(l + 1), ...        each once, when every prompt has been through it
    on_sweep_end

The module does not know how prompts are batched, nor where outputs go.
"""

# ruff: noqa: B027 - most of the life cycle may be left out

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import CodeType, FunctionType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from xxhash import xxh3_128, xxh3_128_hexdigest

Site = tuple[int | None, str]
"""(layer, hook); the layer is None for the model-level hooks embedding, final_norm and logits."""
Layers = Literal["all"] | Sequence[int]
"""Layers by number, negative ones from the end; "all" means all that have the hook."""
Per = Literal["prompt", "token"]
Phase = Literal["read", "write", "read_after_write"]
State = dict[str, Any]
"""What a callback has gathered at one site, as tensors and JSON values."""


@dataclass(frozen=True)
class Emit:
    """Output: ``values [b, *rest]`` per prompt or ``[b, s, *rest]`` per token, in the order of the batch.

    rest and dtype stay the same over all calls. name: tells several outputs of one site apart. dtype: what is stored;
    None: the dtype of values. ``values`` may alias ``acts``: it is copied before ``on_batch`` is called again.
    """

    values: Tensor
    per: Per = "prompt"
    name: str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor):
            raise TypeError(f"Emit takes a torch tensor, not {type(self.values).__name__}")
        if self.per not in ("prompt", "token"):
            raise ValueError(f"Emit: per must be 'prompt' or 'token', not {self.per!r}")


@dataclass(frozen=True)
class WriteBack:
    """``values`` take the place of ``acts``: same shape, cast once to the model's dtype. Phase "write" only."""

    values: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor):
            raise TypeError(f"WriteBack takes a torch tensor, not {type(self.values).__name__}")


@dataclass(frozen=True)
class LayerArtifact:
    """Named tensors left by a layer. meta: JSON. hook: may be left out by a callback that targets one hook."""

    name: str
    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    hook: str | None = None


@dataclass(frozen=True)
class Declared:
    """One output that a callback is going to emit at a hook, for the plan to check and count; fields as in `Emit`."""

    per: Per
    rest: tuple[int, ...]
    dtype: torch.dtype
    name: str | None = None


class Context(Protocol):
    """What a callback may ask about the sweep: sizes of the model, and per sample id tokens, length and metadata.

    dtype: the model's. device: where ``acts`` are. total_tokens: real tokens of all prompts.
    """

    @property
    def layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def n_prompts(self) -> int: ...
    @property
    def total_tokens(self) -> int: ...

    def widths(self, hook: str) -> tuple[int, ...]:
        """Shape behind ``[b, s]`` at a hook; of "attn_pattern" ``(heads,)``, the part that all prompts share."""
        ...

    def dtype_at(self, hook: str) -> torch.dtype:
        """Of the values at a hook: the model's dtype almost everywhere, int64 at "expert_ids"."""
        ...

    def sites(self, callback: "Callback") -> tuple[Site, ...]:
        """The sites that a callback targets, its layers resolved to numbers from 0."""
        ...

    def tokens(self, sample_id: int) -> Tensor:
        """The prompt's ids, int32 ``[length]``, the caller's to keep."""
        ...

    def length(self, sample_id: int) -> int: ...

    def metadata(self, sample_id: int) -> Mapping[str, Any]:
        """The sample's dict less ids and mask; kept only for a callback that has ``needs_metadata``."""
        ...


class Callback(ABC):
    """Base class; a subclass sets what it wants as class or instance attributes and writes `on_batch`.

    target_layers, target_hooks: the sites; layers mean nothing to model-level hooks.
    phase: "read" sees the value before any write, "write" may replace it, "read_after_write" sees what came of it.
    positions: which tokens `on_batch` gets, "all", "last", or positions over real tokens, negative ones from the end.
    borrows: True promises neither to keep nor to write ``acts``, which then is no copy.
    needs_metadata: True if ``ctx.metadata`` will be asked.
    emits: hook -> (rest, dtype) of what is emitted per prompt, so that the plan counts its bytes.

    state_version: raised when the meaning of `state_dict` changes; part of the identity.

    What is gathered belongs in private attributes, one state per (layer, hook), begun afresh by `on_sweep_start`:
    public attributes are the callback's identity (`config`). There is no ``__init__`` to call.

    An interrupted run goes on from a commit with a new object of the same class: after `on_sweep_start` and
    `on_layer_start` of every layer that has not ended it is given back what `state_dict` said at the commit. So a
    callback that gathers something needs both, or its runs begin again (`unresumable`); one that gathers nothing but
    keeps constants, or does something at the end of a layer, says so by a `state_dict` that returns {}:

        def state_dict(self, layer, hook): return {"sum": self._sums[layer, hook].clone(), "count": self._count}
        def load_state_dict(self, layer, hook, state):
            self._sums[layer, hook], self._count = state["sum"], state["count"]
    """

    target_layers: Layers = "all"
    target_hooks: tuple[str, ...] = ("residual_post",)
    phase: Phase = "read"
    positions: Literal["all", "last"] | Sequence[int] = "all"
    borrows: bool = False
    needs_metadata: bool = False
    state_version: int = 1
    emits: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = {}

    # --- for the plan and the journal ---

    def declare(self, ctx: Context) -> Mapping[str, Declared]:
        """hook -> what will be emitted there, as far as it is known before the run.

        `declare` and `state_bytes` are asked while the plan is made: the place to refuse, by `RequestError`, what
        cannot work with this model or dataset.
        """
        return {hook: Declared("prompt", rest, dtype) for hook, (rest, dtype) in self.emits.items()}

    def state_bytes(self, ctx: Context, layer: int | None, hook: str) -> int:
        """Bytes of state at a site while its layer is resident."""
        return 0

    def config(self) -> dict[str, Any]:
        """The callback's identity, JSON: its sites, phase, positions, and its public instance attributes.

        A tensor counts by its digest, a function by its name and code. Attributes that none of this can express (an
        object, a closure) are named under "opaque": such a run cannot be told from another, and is never reused.
        """
        named = ("target_layers", "target_hooks", "phase", "positions")
        values = {name: getattr(self, name) for name in named}
        values |= {name: value for name, value in vars(self).items() if not name.startswith("_")}
        config: dict[str, Any] = {}
        opaque = []
        for name, value in values.items():
            try:
                config[name] = _plain(value)
            except TypeError:
                opaque.append(name)
        return config | ({"opaque": sorted(opaque)} if opaque else {})

    # --- the life cycle ---

    def on_sweep_start(self, ctx: Context) -> None:
        """Before any weight is read: check the request, forget the sweep before."""

    def on_layer_start(self, layer_idx: int | None) -> None:
        """A layer becomes resident (None: the model-level hooks, at the start)."""

    @abstractmethod
    def on_batch(
        self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor
    ) -> Emit | WriteBack | tuple[Emit | WriteBack, ...] | None:
        """``acts [b, s, *rest]``: b prompts of one length, without padding, at the wanted positions.

        "attn_pattern" is ``[b, heads, s, s]``, positions selecting queries. sample_ids: int64 ``[b]``, on the CPU,
        places in the user's dataset. ``acts`` is on ``ctx.device`` and the callback's own, unless it `borrows`.
        """

    def on_layer_end(self, layer_idx: int | None) -> LayerArtifact | Iterable[LayerArtifact] | None:
        """Every prompt has been through the layer (None: the model-level hooks): what it leaves."""
        return None

    def on_sweep_end(self) -> None:
        """After the last layer's end."""

    # --- state, for who gathers some between on_sweep_start and on_layer_end ---

    def state_dict(self, layer: int | None, hook: str) -> State:
        """A snapshot of what was gathered at a site: tensors and JSON values, sharing no memory with the callback.

        Tuples come back as lists, NumPy's scalars as Python's. Asked between two batches, for every site of a layer
        that has not ended.
        """
        return {}

    def load_state_dict(self, layer: int | None, hook: str, state: Mapping[str, Any]) -> None:
        """Go on from a snapshot, in place of what was gathered; after `on_sweep_start`."""

    def merge(self, layer: int | None, hook: str, other: Mapping[str, Any]) -> None:
        """Add a snapshot of other prompts' state at the same site."""


def unresumable(callback: Callback, ctx: Context) -> str | None:
    """Why a run with this callback cannot go on from the middle, in words; None if it can. After `on_sweep_start`.

    A class that has no `state_dict` of its own must look as if it gathered nothing: no `on_layer_start`,
    `on_layer_end` or `on_sweep_end`, and no private attribute but ``ctx`` that can change inside (a list, a tensor).
    """
    kind = type(callback)
    if kind.state_dict is not Callback.state_dict:
        return None
    for name in ("on_layer_start", "on_layer_end", "on_sweep_end"):
        if getattr(kind, name) is not getattr(Callback, name):
            return f"{kind.__name__} has {name} and no state_dict, which would say what it has gathered"
    for name, value in vars(callback).items():
        if name.startswith("_") and value is not ctx and not _is_constant(value):
            return f"{kind.__name__} keeps a {type(value).__name__} in {name} and has no state_dict, which would say it"
    return None


def _is_constant(value: Any) -> bool:
    """Whether a value cannot change inside."""
    if isinstance(value, tuple | frozenset):
        return all(_is_constant(item) for item in value)
    constant = str | bytes | Integral | Real | torch.dtype | torch.device | torch.Size | range | type | FunctionType
    return value is None or isinstance(value, constant)


def _plain(value: Any) -> Any:
    """``value`` as JSON. Raises TypeError for what has no identity beyond this process."""
    match value:
        case None | bool() | str():
            return value
        case Integral():
            return int(value)
        case Real():
            return float(value)
        case Tensor():
            data = value.detach().cpu().contiguous()
            digest = xxh3_128_hexdigest(data.unsqueeze(-1).view(torch.uint8).numpy().reshape(-1).data)
            return f"{data.dtype} {list(data.shape)} xxh3_128 {digest}"
        case torch.dtype() | torch.device():
            return str(value)
        case Mapping():
            if not all(isinstance(key, str) for key in value):
                raise TypeError(value)
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple() | range():
            return [_plain(item) for item in value]
    if not hasattr(value, "__qualname__") or getattr(value, "__closure__", None):
        raise TypeError(value)
    return f"{value.__module__}.{value.__qualname__} {code_of(value)}"


def code_of(value: Any) -> str:
    """Digest of what a function or a class does, as far as its own code says; a change of the code is another one."""
    digest = xxh3_128()

    def add(item: Any) -> None:
        code = item if isinstance(item, CodeType) else getattr(item, "__code__", None)
        if isinstance(code, CodeType):
            digest.update(code.co_code + repr(code.co_names).encode())
            for constant in code.co_consts:
                if isinstance(constant, CodeType):
                    add(constant)
                else:
                    digest.update(repr(constant).encode())
            digest.update(repr(getattr(item, "__defaults__", None)).encode())
        elif isinstance(item, type):
            for base in item.__mro__:
                if base not in (Callback, object) and issubclass(base, Callback):
                    for name, member in sorted(vars(base).items()):
                        digest.update(name.encode())
                        add(getattr(member, "__func__", getattr(member, "fget", member)))

    add(value)
    return digest.hexdigest()
