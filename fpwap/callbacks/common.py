"""The four reference callbacks: activations as they are, principal axes, class means, and a direction added.

Each is an ordinary `Callback`; nothing here is privileged but the promise of ``borrows``, that ``acts`` is neither kept
nor written. Rows at per-head hooks (``[heads, d]``) are taken flat, ``[heads * d]``. The module does not know how a
prompt got its position in a batch, nor where outputs go.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from archs.contract import MODEL_HOOKS

from ..errors import CallbackError, RequestError
from .base import Callback, Context, Declared, Emit, LayerArtifact, Layers, Phase, Site, State, WriteBack
from .moments import Spread

PATTERN = "attn_pattern"
MOST_LABELS = 1000
"""Distinct labels that `DiffOfMeans` takes; more are no classes but a mistake, such as an id for a label."""

Label = bool | int | str


class RawActivations(Callback):
    """The activations themselves, in the dtype they have or in ``dtype``.

    last_token_only: ``[N, *rest]``; False: every token, ragged, ``[T, *rest]``. positions instead: an int gives
    ``[N, *rest]``, a list of P ints ``[N, P, *rest]``, counted over real tokens, negative from the end.
    hook "attn_pattern": the rows of the chosen queries, ``[N, heads, s]`` for one, ``[N, heads, P, s]`` for a list,
    ``[N, heads, s, s]`` for all tokens; since s is in the shape, all prompts must have one length.
    name: names the output where a site has several. Raises `RequestError` for contradictory arguments.
    """

    borrows = True

    def __init__(
        self,
        layers: Layers = "all",
        hook: str = "residual_post",
        last_token_only: bool = True,
        positions: int | Sequence[int] | None = None,
        *,
        name: str | None = None,
        phase: Phase = "read",
        dtype: torch.dtype | None = None,
    ) -> None:
        if positions is not None and not last_token_only:
            raise RequestError("RawActivations: last_token_only=False means every token; leave it out or positions=")
        self.target_layers, self.target_hooks, self.phase = layers, (hook,), phase
        self.name, self.dtype = name, dtype
        self._single = isinstance(positions, int | np.integer) or (positions is None and last_token_only)
        if positions is None:
            self.positions = "last" if last_token_only else "all"
        elif isinstance(positions, int | np.integer):
            self.positions = [int(positions)]
        else:
            self.positions = [index(position) for position in positions]

    def declare(self, ctx: Context) -> Mapping[str, Declared]:
        (hook,) = self.target_hooks
        rest, dtype = ctx.widths(hook), self.dtype or ctx.dtype_at(hook)
        count: tuple[int, ...] = () if self._single else (len(self.positions),)
        if hook == PATTERN:  # in fp32, unless attention is eager
            length = self._one_length(ctx)
            count = (length,) if self.positions == "all" else count
            return {hook: Declared("prompt", (*rest, *count, length), self.dtype or torch.float32, self.name)}
        if self.positions == "all":
            return {hook: Declared("token", rest, dtype, self.name)}
        return {hook: Declared("prompt", (*count, *rest), dtype, self.name)}

    @staticmethod
    def _one_length(ctx: Context) -> int:
        first = ctx.length(0)
        other = next((i for i in range(ctx.n_prompts) if ctx.length(i) != first), None)
        if other is not None:
            raise RequestError(
                f"RawActivations(hook='attn_pattern') needs prompts of one length: prompt 0 has {first} tokens, "
                f"prompt {other} has {ctx.length(other)}; give equal lengths or reduce it in a callback of your own"
            )
        return first

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> Emit:
        if self._single:
            acts = acts.squeeze(2 if hook == PATTERN else 1)
        per_token = self.positions == "all" and hook != PATTERN
        return Emit(acts, "token" if per_token else "prompt", self.name, self.dtype)


class IncrementalPCA(Callback):
    """Exact principal component analysis, without keeping the rows where there are more of them than dimensions.

    One row a prompt, or a token with last_token_only=False. Artifact "pca_basis": components ``[k, H]``, unit rows,
    largest variance first, the largest coordinate of each positive; mean ``[H]``; explained_variance ``[k]``, divided
    by count - 1, all fp32, computed in fp64; count, int64 scalar. meta: "rest", the shape that the H coordinates had.
    """

    borrows = True

    def __init__(
        self,
        layers: Layers,
        n_components: int,
        hook: str = "residual_post",
        *,
        last_token_only: bool = True,
        phase: Phase = "read",
    ) -> None:
        _refuse_pattern(self, hook)
        self.target_layers, self.target_hooks, self.phase = layers, (hook,), phase
        self.positions = "last" if last_token_only else "all"
        self.n_components = index(n_components)

    def _rows(self, ctx: Context) -> int:
        """How many rows there will be; refused if they have fewer principal components than are asked for."""
        (hook,) = self.target_hooks
        rows, width = ctx.n_prompts if self.positions == "last" else ctx.total_tokens, math.prod(ctx.widths(hook))
        most = min(rows - 1, width)
        if not 1 <= self.n_components <= most:
            raise RequestError(
                f"IncrementalPCA: n_components={self.n_components} at hook {hook!r} must be from 1 to {most}: "
                f"{rows} rows of width {width} have no more principal components"
            )
        return rows

    def state_bytes(self, ctx: Context, layer: int | None, hook: str) -> int:
        return Spread.nbytes(math.prod(ctx.widths(hook)), self._rows(ctx), ctx.dtype_at(hook))

    def on_sweep_start(self, ctx: Context) -> None:
        self._expected, self._device = self._rows(ctx), ctx.device
        self._rest = ctx.widths(self.target_hooks[0])
        self._spreads: dict[Site, Spread] = {}

    def _at(self, site: Site) -> Spread:
        if site not in self._spreads:
            self._spreads[site] = Spread(math.prod(self._rest), self._expected, self._device)
        return self._spreads[site]

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
        self._at((layer_idx, hook)).add(acts.flatten(2).flatten(0, 1))

    def on_layer_end(self, layer_idx: int | None) -> LayerArtifact:
        (hook,) = self.target_hooks
        spread = self._spreads.pop((layer_idx, hook))
        count = torch.tensor(spread.count)
        components, mean, variance = spread.principal(self.n_components)
        tensors = {"components": components, "mean": mean, "explained_variance": variance}
        tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        return LayerArtifact("pca_basis", {**tensors, "count": count}, {"rest": list(self._rest)}, hook)

    def state_dict(self, layer: int | None, hook: str) -> State:
        return self._at((layer, hook)).state_dict()

    def load_state_dict(self, layer: int | None, hook: str, state: Mapping[str, Any]) -> None:
        self._spreads.pop((layer, hook), None)
        self._at((layer, hook)).merge(state)

    def merge(self, layer: int | None, hook: str, other: Mapping[str, Any]) -> None:
        self._at((layer, hook)).merge(other)


class DiffOfMeans(Callback):
    """The mean of each class of prompts, and from one of two classes to the other.

    label_fn: a sample, a dict of its metadata and "input_ids" (int32 tensor), to its label: all bool, all int or all
    str. It is called for every prompt while the plan is made, before any weight is read. One row a prompt, or a token
    with last_token_only=False, where long prompts weigh more. Artifact "diff_of_means": means ``[C, H]`` in the order
    of the sorted labels and, if C is 2, direction ``[H]``, the second less the first; fp32, computed in fp64; counts,
    int64 ``[C]``. meta: "labels", and "rest", the shape that the H coordinates had.
    """

    borrows = True
    needs_metadata = True

    def __init__(
        self,
        layers: Layers,
        label_fn: Callable[[dict[str, Any]], Any],
        hook: str = "residual_post",
        *,
        last_token_only: bool = True,
        phase: Phase = "read",
    ) -> None:
        _refuse_pattern(self, hook)
        self.target_layers, self.target_hooks, self.phase = layers, (hook,), phase
        self.positions = "last" if last_token_only else "all"
        self.label_fn = label_fn
        self._labelled: Context | None = None

    def config(self) -> dict[str, Any]:
        """With the labels themselves once they are known, since a lambda has no identity."""
        if self._labelled is None:
            return super().config()
        config = {name: value for name, value in super().config().items() if name not in ("label_fn", "opaque")}
        return config | {"labels": self._labels, "label_of": xxh3_128_hexdigest(self._codes.numpy().data)}

    def _label(self, ctx: Context) -> None:
        """Label the prompts, once per context: there may be 10^6 of them, and a plan asks for every layer."""
        if self._labelled is not ctx:
            self._labels, self._codes = _labels(self.label_fn, ctx)
            self._labelled = ctx

    def state_bytes(self, ctx: Context, layer: int | None, hook: str) -> int:
        self._label(ctx)
        return len(self._labels) * math.prod(ctx.widths(hook)) * torch.float64.itemsize

    def on_sweep_start(self, ctx: Context) -> None:
        self._label(ctx)
        self._rest, self._device = ctx.widths(self.target_hooks[0]), ctx.device
        self._sums: dict[Site, dict[Label, tuple[int, Tensor]]] = {}

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> None:
        acts, codes = acts.flatten(2), self._codes[sample_ids]
        for code in sorted(set(codes.tolist())):
            # by index, not as a product with zeros and ones: a NaN stays in its own class
            rows = acts[(codes == code).nonzero().flatten().to(acts.device)].flatten(0, 1)
            self._add((layer_idx, hook), self._labels[code], len(rows), rows.sum(0, dtype=torch.float64))

    def _add(self, site: Site, label: Label, count: int, total: Tensor) -> None:
        sums = self._sums.setdefault(site, {})
        before = sums.get(label)
        sums[label] = (count, total) if before is None else (before[0] + count, before[1].add_(total))

    def on_layer_end(self, layer_idx: int | None) -> LayerArtifact:
        (hook,) = self.target_hooks
        state = self.state_dict(layer_idx, hook)
        del self._sums[layer_idx, hook]
        means = state["sums"] / state["counts"].to(state["sums"].device)[:, None]
        tensors = {"means": means.float(), "counts": state["counts"]}
        if len(means) == 2:
            tensors["direction"] = (means[1] - means[0]).float()
        return LayerArtifact("diff_of_means", tensors, {"labels": state["labels"], "rest": list(self._rest)}, hook)

    def state_dict(self, layer: int | None, hook: str) -> State:
        """labels, sorted; counts ``[C]`` and sums ``[C, H]`` in fp64; empty before the first batch."""
        sums = self._sums.get((layer, hook))
        if not sums:
            return {}
        labels = sorted(sums)
        counts = torch.tensor([sums[label][0] for label in labels])
        return {"labels": labels, "counts": counts, "sums": torch.stack([sums[label][1] for label in labels])}

    def load_state_dict(self, layer: int | None, hook: str, state: Mapping[str, Any]) -> None:
        self._sums.pop((layer, hook), None)
        self.merge(layer, hook, state)

    def merge(self, layer: int | None, hook: str, other: Mapping[str, Any]) -> None:
        if not other:
            return
        for label, count, total in zip(other["labels"], other["counts"].tolist(), other["sums"], strict=True):
            if type(label) is not type(self._labels[0]):
                raise CallbackError(f"DiffOfMeans: label {label!r} cannot be merged with labels {self._labels}")
            self._add((layer, hook), label, count, total.to(self._device, copy=True))


class HasTensors(Protocol):
    """An artifact, read back or fresh from a callback."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...


class SteerInBasis(Callback):
    """Adds ``alpha`` times one direction at every position of every prompt, in fp32, cast once to the model's dtype.

    basis_artifact: a "pca_basis" (row ``direction_idx`` of its components), a "diff_of_means" of two classes (its
    direction, which has the length of the difference), or a tensor ``[H]`` or ``[k, H]``. layers: those to write at, to
    be given unless the hook is a model-level one. Raises `RequestError` for anything else; for a width that is not the
    hook's, or an index outside the basis, when the plan is made.
    """

    phase = "write"
    borrows = True

    def __init__(
        self,
        basis_artifact: HasTensors | Tensor,
        direction_idx: int = 0,
        alpha: float = 1.0,
        layers: Layers | None = None,
        hook: str = "residual_post",
    ) -> None:
        if layers is None and hook not in MODEL_HOOKS:
            raise RequestError("SteerInBasis: say at which layers to steer: layers=[45], or layers='all'")
        self.target_layers, self.target_hooks = "all" if layers is None else layers, (hook,)
        self.basis, self.direction_idx, self.alpha = _basis(basis_artifact), index(direction_idx), alpha

    def _direction(self, ctx: Context) -> Tensor:
        """fp32, in the shape of one token at the hook, on the CPU."""
        (hook,) = self.target_hooks
        rest, (count, width) = ctx.widths(hook), self.basis.shape
        if width != math.prod(rest):
            raise RequestError(f"SteerInBasis: the basis has width {width}, hook {hook!r} has {math.prod(rest)}")
        if not 0 <= self.direction_idx < count:
            raise RequestError(
                f"SteerInBasis: direction_idx={self.direction_idx} must be from 0 to {count - 1}: "
                f"the basis has {count} direction{'s' * (count > 1)}"
            )
        return self.basis[self.direction_idx].view(rest)

    def state_bytes(self, ctx: Context, layer: int | None, hook: str) -> int:
        return self._direction(ctx).nbytes

    def on_sweep_start(self, ctx: Context) -> None:
        self._step = (self.alpha * self._direction(ctx)).to(ctx.device)

    def on_batch(self, layer_idx: int | None, hook: str, acts: Tensor, sample_ids: Tensor) -> WriteBack:
        return WriteBack((acts + self._step).to(acts.dtype))  # a half and an fp32 tensor add in fp32

    def state_dict(self, layer: int | None, hook: str) -> State:
        """Nothing is gathered."""
        return {}


def _basis(given: HasTensors | Tensor) -> Tensor:
    """fp32 ``[k, H]`` on the CPU, a copy."""
    if isinstance(given, Tensor):
        rows = given
    else:
        tensors = getattr(given, "tensors", {})
        name = next((name for name in ("components", "direction") if name in tensors), None)
        if name is None:
            raise RequestError(
                "SteerInBasis: basis_artifact must be a tensor, or an artifact with 'components' or 'direction' (a "
                f"diff_of_means has one for two classes); this {type(given).__name__} has {sorted(tensors) or 'none'}"
            )
        rows = tensors[name]
    if rows.ndim not in (1, 2):
        raise RequestError(f"SteerInBasis: a basis has shape [H] or [k, H], not {list(rows.shape)}")
    return rows.detach().to("cpu", torch.float32, copy=True).reshape(-1, rows.shape[-1])


def _refuse_pattern(callback: Callback, hook: str) -> None:
    if hook == PATTERN:
        raise RequestError(f"{type(callback).__name__}: rows of hook {hook!r} have no one width; reduce them yourself")


def _labels(label_fn: Callable[[dict[str, Any]], Any], ctx: Context) -> tuple[list[Label], Tensor]:
    """The distinct labels, as they come, and each prompt's place among them, int32 ``[N]``. Raises `RequestError`."""
    codes: dict[Label, int] = {}
    found: list[int] = []
    kind: Any = None
    for i in range(ctx.n_prompts):
        sample = {**ctx.metadata(i), "input_ids": ctx.tokens(i)}
        try:
            label = label_fn(sample)
            label = label.item() if hasattr(label, "item") else label  # numpy and torch scalars
        except Exception as error:
            keys = ", ".join(map(str, sample))
            raise RequestError(
                f"DiffOfMeans: label_fn raised {type(error).__name__}: {error} on sample {i}, whose keys are {keys}"
            ) from error
        if type(label) not in (bool, int, str):
            raise RequestError(f"DiffOfMeans: the label of sample {i} is {label!r}; a label is a bool, an int or a str")
        if kind not in (None, type(label)):  # True == 1: as keys they would be one class
            was, now = kind.__name__, type(label).__name__
            raise RequestError(
                f"DiffOfMeans: the label of sample {i} is {label!r}, of type {now}; before it came {was}"
            )
        kind = type(label)
        found.append(codes.setdefault(label, len(codes)))
        if len(codes) > MOST_LABELS:
            raise RequestError(f"DiffOfMeans: more than {MOST_LABELS} distinct labels up to sample {i}: not classes")
    if len(codes) < 2:
        raise RequestError(f"DiffOfMeans: label_fn gives every prompt the label {next(iter(codes))!r}: no difference")
    return list(codes), torch.tensor(found, dtype=torch.int32)
