"""The comparison with Hugging Face inside a run, at every layer, with the weights as the run holds them.

For a few chosen prompts `Watch` sees to it that everything below is so, and stops the run where it is not:

* **exact**: our block and HF's layer on the chosen prompts' rows, put together as one padded batch, are equal bit for
  bit, at every hook that HF's modules show;
* **near**: the run's own rows are at most `NEARNESS` times as far from that result as HF's are when HF takes each
  prompt alone: packing may cost what padding costs (or what rounding costs, where HF's two results are equal);
* **continuous**: the rows that enter a layer are those that left the one before, bit for bit, of all prompts;
* **the same prompts**: a stream that HF carries from the tokens on stays nearest to the run's rows, token by token.

Needs transformers. Holds one layer of HF's beside the run's.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from archs.batch import Attention, Group
from archs.contract import Family, Tap

from .errors import VerificationError
from .prompts import Microbatch, View
from .reference import HFLayers
from .schedule import Stage
from .verify import Ours, Rectangle, Row, compare, compare_layer, distance

NEARNESS = 2.0
"""How much farther than HF from itself a run's rows may be from HF."""
CHOSEN, LONGEST = 4, 2048
"""How many prompts a run checks, and the longest that it takes for that."""
FLOORS = {torch.float32: 64.0}
"""Distance from HF, in eps, that a layer's rounding may always cost: products add up in fp32, so in fp32 it grows with
their width; in the narrow dtypes it is one unit in the last place of a row's largest element."""
WATCHED = ("residual_pre", "router_logits", "expert_ids", "residual_post")
"""Hooks at which the run's own rows are kept."""
Seen = dict[str, dict[int, Tensor]]
"""Of one layer: hook -> sample -> its rows."""


class Watcher(Protocol):
    """What the engine tells of a run while it goes."""

    def tap(self, inner: Tap, stage: Stage, microbatch: Microbatch) -> Tap: ...

    def end(self, stage: Stage, weights: Any) -> None: ...


class Unwatched:
    """A run that nobody checks."""

    def tap(self, inner: Tap, stage: Stage, microbatch: Microbatch) -> Tap:
        return inner

    def end(self, stage: Stage, weights: Any) -> None:
        pass

    def certificate(self) -> dict[str, Any]:
        return {}


class Watch:
    """Checks a run while it goes; see the module's words. Raises `VerificationError` where something differs.

    samples: id -> tokens of the chosen prompts. pad: the id of pads. written: layers at which a callback writes, None
    for the embedding: what is behind the first is not what HF computes from the tokens, and the layers themselves are
    checked from the rows that enter them, without the callbacks.
    """

    def __init__(
        self,
        hf: HFLayers,
        family: Family,
        config: Any,
        attention: Attention,
        samples: Mapping[int, Tensor],
        *,
        pad: int,
        dtype: torch.dtype,
        device: torch.device,
        written: Collection[int | None],
    ) -> None:
        self._hf, self._samples, self._eps, self._written = hf, samples, torch.finfo(dtype).eps, written
        self._floor = FLOORS.get(dtype, 1.0) * self._eps
        self._batch = Rectangle.of(list(samples.values()), pad, device)
        self._ours = Ours(family=family, config=config, attention=attention, batch=self._batch)
        self._stream: Tensor | None = None
        self._seen: dict[int, Seen] = defaultdict(lambda: {hook: {} for hook in WATCHED})
        self._left: dict[int, int] = {}
        self._layers: list[int] = []
        self._near_layers: list[int] = []
        self._followed: list[int] = []
        self._parts: list[str] = []
        self._ratio = self._drift = 0.0
        self._flips = 0

    def tap(self, inner: Tap, stage: Stage, microbatch: Microbatch) -> Tap:
        """A tap that also keeps the chosen prompts' rows as they enter and leave a layer, and all prompts' digests."""
        if stage.layer is None:
            return inner
        rows = {
            sample: _rows_of(view, place)
            for view in microbatch.views
            for place, sample in enumerate(view.sample_ids.tolist())
            if sample in self._samples
        }
        return _Watched(inner, stage.layer, self._seen[stage.layer], rows, microbatch.views, self._left)

    @torch.no_grad()
    def end(self, stage: Stage, weights: Any) -> None:
        """All prompts have been through a stage, whose weights are still there."""
        batch, hf = self._batch, self._hf
        match stage.kind:
            case "embed":
                self._stream = hf.embed(batch.ids, batch.mask, batch.positions)
                self._part("embedding", self._ours.embed(weights), self._stream)
            case "layer":
                assert stage.layer is not None
                self._layer(stage.layer, weights)
            case "norm":
                assert self._stream is not None
                self._normed = self._ours.norm(self._stream, weights)
                normed, self._logits = hf.norm_and_logits(self._stream)
                self._part("final_norm", self._normed, normed)
            case "head":
                self._part("logits", self._ours.unembed(self._normed, weights), self._logits)

    def certificate(self) -> dict[str, Any]:
        """What was compared, as an entry of the manifest."""
        certificate = {
            "prompts": list(self._samples),
            "tokens": int(self._batch.mask.sum()),
            "layers": self._layers,
            "parts": self._parts,
            "near_layers": self._near_layers,
            "nearness": round(self._ratio, 3) if self._near_layers else None,
            "followed_layers": self._followed,
            "drift": self._drift if self._followed else None,
            "other_experts": self._flips,
            "versions": {"torch": torch.__version__, "transformers": version("transformers")},
        }
        return {"certificate": certificate}

    def _part(self, hook: str, ours: Tensor, theirs: Tensor) -> None:
        self._equal(compare(None, hook, None, self._batch.real(ours), self._batch.real(theirs)))
        self._parts.append(hook)

    def _equal(self, row: Row) -> None:
        if not row.equal:
            raise VerificationError(
                f"{row.label}: our result and Hugging Face's differ on prompts {list(self._samples)} as one padded "
                f"batch, by {row.largest:.3g} at most ({row.ulps} ulp, {row.share:.2%} of elements)"
            )

    def _layer(self, layer: int, weights: Any) -> None:
        seen, batch = self._seen.pop(layer), self._batch
        entered, left = seen["residual_pre"], seen["residual_post"]
        given = batch.pad([entered[sample] for sample in self._samples])
        ours = self._ours.block(given, weights, layer)
        theirs = self._hf.everything(layer, given, batch.mask, batch.positions, batch.ids)
        for row in compare_layer(ours, theirs, layer, batch):
            self._equal(row)
        self._layers.append(layer)
        if left and layer not in self._written:
            self._near(layer, seen, given, ours, theirs["residual_post"])
        if left and not {None, *range(layer + 1)} & set(self._written):
            self._same_prompts(layer, left)

    def _near(self, layer: int, seen: Seen, given: Tensor, ours: Mapping[str, Tensor], theirs: Tensor) -> None:
        """The run's rows against HF on the padded batch, beside HF on each prompt alone.

        Tokens for which the run chose other experts than the batch are counted and left out: a router's tie is no
        rounding error.
        """
        batch = self._batch
        alone = []
        for row, one in batch.alone():
            own = given[row : row + 1, : one.ids.shape[1]]
            alone.append(self._hf.layer(layer, own, one.mask, one.positions, one.ids)["residual_post"][0])
        expected, found = batch.real(theirs), self._run(seen["residual_post"])
        same = torch.ones(len(expected), dtype=torch.bool, device=expected.device)
        if seen["expert_ids"]:
            same = (self._run(seen["expert_ids"]) == batch.real(ours["expert_ids"])).all(-1)
            self._flips += int((~same).sum())
            self._same_router(layer, self._run(seen["router_logits"]), batch.real(ours["router_logits"]), same)
        far, near = distance(torch.cat(alone)[same], expected[same]), distance(found[same], expected[same])
        far = max(far, self._floor)
        self._near_layers.append(layer)
        self._ratio = max(self._ratio, near / far)
        if near > NEARNESS * far:
            apart = (found.double() - expected.double()).norm(dim=1) * same
            raise VerificationError(
                f"layer {layer}, hook 'residual_post', prompt {self._sample(int(apart.argmax()))}: the run's rows are "
                f"{near:.3g} (relative RMS) from Hugging Face's, which is {far:.3g} from itself on each prompt alone"
            )

    def _same_router(self, layer: int, found: Tensor, expected: Tensor, same: Tensor) -> None:
        """Other experts may be chosen where a router's logits tie within rounding, and nowhere else."""
        apart = distance(found, expected)
        others = int((~same).sum())
        if apart > NEARNESS * self._floor or 2 * others > len(same):
            raise VerificationError(
                f"layer {layer}, hook 'router_logits', prompts {list(self._samples)}: the run's are {apart:.3g} "
                f"(relative RMS) from those of one padded batch, and {others} of {len(same)} tokens have other experts"
            )

    def _same_prompts(self, layer: int, left: Mapping[int, Tensor]) -> None:
        """The run's rows against a stream that HF has carried from the tokens on.

        A row is lost if it is half its length away, or far beyond the usual drift and much nearer to another token's.
        """
        assert self._stream is not None
        batch = self._batch
        self._stream = self._hf.layer(layer, self._stream, batch.mask, batch.positions, batch.ids)["residual_post"]
        self._followed.append(layer)
        expected, found = batch.real(self._stream).double(), self._run(left).double()
        length = expected.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        apart = torch.cdist(found, expected) / length[:, None]
        own, nearest = apart.diagonal(), apart.min(dim=1).values
        self._drift = max(self._drift, float(own.median()))
        lost = (own > 0.5) | ((own > 4 * nearest) & (own > 8 * max(self._drift, self._eps)))
        if bool(lost.any()):
            token = int(lost.nonzero()[0])
            raise VerificationError(
                f"layer {layer}, hook 'residual_post', prompt {self._sample(token)}: a row is {float(own[token]):.3g} "
                "of its length away from the stream that Hugging Face carries from the tokens on"
            )

    def _run(self, rows: Mapping[int, Tensor]) -> Tensor:
        """The chosen prompts' rows as the run had them, ``[tokens, ...]``."""
        return torch.cat([rows[sample] for sample in self._samples])

    def _sample(self, token: int) -> int:
        """Whose token the n-th real token of the batch is."""
        ends = self._batch.mask.sum(-1).cumsum(0).tolist()
        return next(sample for sample, end in zip(self._samples, ends, strict=True) if token < end)


class _Watched:
    """`archs.contract.Tap` that keeps some rows of some hooks: what the block had, or what was written in its place.

    Of every prompt it takes the digest of what leaves a layer into ``left``, and compares what enters the next.
    """

    def __init__(
        self,
        inner: Tap,
        layer: int,
        seen: Seen,
        rows: Mapping[int, Tensor],
        views: Sequence[View],
        left: dict[int, int],
    ) -> None:
        self._inner, self._layer, self._seen, self._rows = inner, layer, seen, rows
        self._views, self._left = views, left

    def wants(self, hook: str) -> bool:
        return self._inner.wants(hook)

    def __call__(self, hook: str, value: Tensor, group: Group | None = None) -> Tensor:
        self._keep(hook, value)  # the last wanted hook does not return
        if hook == "residual_pre" and self._layer:
            self._compare(value)
        shown = self._inner(hook, value, group)
        if hook == "residual_post":
            self._keep(hook, shown)
            self._left.update(_digests(self._views, shown))
        return shown

    def _keep(self, hook: str, value: Tensor) -> None:
        if hook in self._seen:
            self._seen[hook].update({sample: value[rows] for sample, rows in self._rows.items()})

    def _compare(self, value: Tensor) -> None:
        for sample, digest in _digests(self._views, value):
            if self._left.pop(sample) != digest:
                raise VerificationError(
                    f"layer {self._layer}, hook 'residual_pre', prompt {sample}: what enters is not what left layer "
                    f"{self._layer - 1}: rows were exchanged, stale or damaged between the two"
                )


def _digests(views: Sequence[View], value: Tensor) -> Iterator[tuple[int, int]]:
    """(sample, digest of its rows) of every prompt."""
    rows_of = value.cpu()
    for view in views:
        for place, sample in enumerate(view.sample_ids.tolist()):
            own = rows_of[view.rows[place]] if isinstance(view.rows, Tensor) else rows_of[_stretch(view, place)]
            yield sample, xxh3_64_intdigest(own.contiguous().view(torch.uint8).numpy().data)


def _stretch(view: View, place: int) -> slice:
    """The rows of one prompt of a view whose prompts lie one behind the other."""
    assert isinstance(view.rows, slice)
    start = view.rows.start + place * view.length
    return slice(start, start + view.length)


def _rows_of(view: View, place: int) -> Tensor:
    """The rows of one prompt of a view, as indices into the microbatch."""
    if isinstance(view.rows, Tensor):
        return view.rows[place]
    stretch = _stretch(view, place)
    return torch.arange(stretch.start, stretch.stop)


def choose(lengths: Sequence[int]) -> list[int]:
    """Which prompts a run checks: the longest that is not too long, the shortest, and some between."""
    order = sorted(range(len(lengths)), key=lambda sample: (lengths[sample], sample))
    fit = [sample for sample in order if lengths[sample] <= LONGEST] or order[:1]
    places = {round(part * (len(fit) - 1) / (CHOSEN - 1)) for part in range(CHOSEN)}
    return [fit[place] for place in sorted(places)]
