"""What callbacks ask for, as sites: resolved, checked and ordered before anything is read.

A site is a (layer, hook) pair; model-level hooks have no layer. Everything that is wrong with a request and can be
known from the config and the lengths of the prompts is a `RequestError` here, and not a surprise after an hour.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeGuard

import numpy as np

from archs.contract import MODEL_HOOKS, READ_ONLY_HOOKS, Family

from .callbacks.base import Callback, Site
from .errors import RequestError
from .schedule import Stage

PHASES = ("read", "write", "read_after_write")
"""In the order in which they come at one site."""
STAGE_OF = {"embedding": Stage("embed"), "final_norm": Stage("norm"), "logits": Stage("head")}
LAST = 2**31
"""Where the model-level hooks behind the layers stand in the order of sites."""


def stage_of(site: Site) -> Stage:
    """The stage whose maths shows a site."""
    layer, hook = site
    return STAGE_OF[hook] if layer is None else Stage("layer", layer)


def where(site: Site) -> str:
    layer, hook = site
    return f"hook {hook!r}" if layer is None else f"layer {layer}, hook {hook!r}"


@dataclass(frozen=True)
class Targets:
    """bound: for each callback, in order of registration, its sites. last: the last wanted one."""

    bound: tuple[tuple[Site, ...], ...]
    last: Site
    warnings: tuple[str, ...]

    @property
    def ends_a_stage(self) -> bool:
        """Whether the last wanted site is the end of its stage, so that nothing of the stage is left out."""
        layer, hook = self.last
        return layer is None or hook == "residual_post"

    def by_callback(self, callbacks: Sequence[Callback]) -> dict[int, tuple[Site, ...]]:
        """id(callback) -> its sites."""
        return {id(callback): own for callback, own in zip(callbacks, self.bound, strict=True)}


def bind(callbacks: Sequence[Callback], family: Family, config: Any) -> Targets:
    """All callbacks' sites. Raises `RequestError`."""
    bound = tuple(resolve_sites(callback, family, config) for callback in callbacks)
    places = {site: order(site, family, config) for own in bound for site in own}
    last = max(places, key=lambda site: places[site])
    return Targets(bound, last, tuple(_unread_writes(callbacks, bound, places)))


def resolve_sites(callback: Callback, family: Family, config: Any) -> tuple[Site, ...]:
    """The sites a callback targets, in the model's order, each once. Raises `RequestError`."""
    who = type(callback).__name__
    if callback.phase not in PHASES:
        raise RequestError(f"{who}: phase {callback.phase!r} is none of {', '.join(PHASES)}")
    hooks = [callback.target_hooks] if isinstance(callback.target_hooks, str) else list(callback.target_hooks)
    if not hooks:
        raise RequestError(f"{who} targets no hook")
    by_layer = [family.hooks(config, layer) for layer in range(config.layers)]
    known = {hook for hooks_here in by_layer for hook in hooks_here}
    sites: set[Site] = set()
    for hook in hooks:
        if callback.phase == "write" and hook in READ_ONLY_HOOKS:
            raise RequestError(f"{who}: hook {hook!r} is read-only; nothing can be written there")
        if hook in MODEL_HOOKS:
            sites.add((None, hook))
            continue
        if hook not in known:
            have = ", ".join((*sorted(known), *MODEL_HOOKS))
            raise RequestError(f"{who}: {family.name} has no hook {hook!r}; its hooks are {have}")
        layers = _layers(callback, config.layers)
        lacking = [layer for layer in layers if hook not in by_layer[layer]]
        if lacking and not _is_all(callback.target_layers):
            raise RequestError(f"{who}: layer {lacking[0]} of this model has no hook {hook!r}")
        sites.update((layer, hook) for layer in layers if hook in by_layer[layer])
    if not sites:
        raise RequestError(f"{who} targets no layer")
    return tuple(sorted(sites, key=lambda site: order(site, family, config)))


def _are_integers(values: object) -> TypeGuard[Sequence[int]]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        return False
    return all(isinstance(value, Integral) and not isinstance(value, bool) for value in values)


def _is_all(layers: object) -> bool:
    return isinstance(layers, str) and layers == "all"


def _layers(callback: Callback, count: int) -> list[int]:
    asked = callback.target_layers
    if _is_all(asked):
        return list(range(count))
    who = type(callback).__name__
    if not _are_integers(asked):
        raise RequestError(f"{who}: layers must be 'all' or a list of integers, not {asked!r}")
    outside = [layer for layer in asked if not -count <= layer < count]
    if outside:
        raise RequestError(
            f"{who}: layer {outside[0]} is out of range: the model has layers 0 to {count - 1} (or -{count} to -1)"
        )
    return sorted({int(layer) % count for layer in asked})


def order(site: Site, family: Family, config: Any) -> tuple[int, int]:
    """Where a site comes in the forward pass."""
    layer, hook = site
    if layer is None:
        return (-1 if hook == "embedding" else LAST, MODEL_HOOKS.index(hook))
    return (layer, list(family.hooks(config, layer)).index(hook))


def check_positions(callback: Callback, lengths: np.ndarray) -> None:
    """Explicit positions must lie within every prompt. Raises `RequestError` naming the first that is too short."""
    positions = callback.positions
    who = type(callback).__name__
    if isinstance(positions, str):
        if positions not in ("all", "last"):
            raise RequestError(f"{who}: positions must be 'all', 'last' or integers, not {positions!r}")
        return
    if not _are_integers(positions) or not len(positions):
        raise RequestError(f"{who}: positions must be 'all', 'last' or a list of integers, not {positions!r}")
    for position in positions:
        short = np.flatnonzero(lengths < (position + 1 if position >= 0 else -position))
        if len(short):
            sample = int(short[0])
            raise RequestError(
                f"{who}: position {position} is outside prompt {sample}, which has {lengths[sample]} tokens "
                f"({len(short)} prompts are too short)"
            )


def _unread_writes(
    callbacks: Sequence[Callback], sites: Sequence[Sequence[Site]], places: Mapping[Site, Any]
) -> list[str]:
    """Warnings: writes after which nobody looks. ``places``: each site's `order`."""
    reads = [
        (places[site], callback.phase)
        for callback, own in zip(callbacks, sites, strict=True)
        for site in own
        if callback.phase != "write"
    ]
    warnings = []
    for callback, own in zip(callbacks, sites, strict=True):
        for site in own:
            seen = any(p > places[site] or (p == places[site] and phase == "read_after_write") for p, phase in reads)
            if callback.phase == "write" and not seen:
                warnings.append(f"{type(callback).__name__} writes at {where(site)} and nothing reads after it")
    return warnings
