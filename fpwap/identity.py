"""What makes two runs the same run: all that their bytes depend on, as JSON.

Budgets, tiers, group sizes and progress are not in it: they change no bit. Times are never evidence.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from xxhash import xxh3_128

from . import __version__
from .callbacks.base import Callback, code_of
from .errors import RequestError
from .plan import Plan
from .prepare import Prepared, Request

NUMERICS_VERSION = 1
"""Raised by every change that may change bits, in the shipped callbacks too."""
OPAQUE = "opaque"
RESOLVED = ("target_layers", "target_hooks", "phase", "positions")
"""Of a callback's config: said in resolved form, so that layer -1 is the last one by its number."""


def identity(request: Request, ready: Prepared, callbacks: Sequence[Callback]) -> dict[str, Any]:
    """JSON; two runs with equal identities write equal bytes under ``activations/`` and ``artifacts/``."""
    model, plan = ready.model, ready.plan
    own: dict[str, Any] = {
        "numerics_version": NUMERICS_VERSION,
        "model": {
            "name": model.files.name if model.files.commit else str(model.files.folder),
            "commit": model.files.commit,
            "family": model.family.name,
            "config": dict(model.raw),
            "shards": ready.checkpoint.content(ready.layout.shards(plan.costs.stages)),
        },
        "dataset": {
            "prompts": ready.prompts.n,
            "tokens": ready.prompts.total_tokens,
            "digest": ready.prompts.digest(),
            "metadata": _metadata(ready.prompts.metadata),
            "seq_len": request.seq_len,
            "truncation": request.truncation,
        },
        "numerics": {
            "dtype": _name(plan.dtype),
            "batching": plan.batching,
            "microbatch": plan.microbatch,
            "height": plan.height,
            "sparse_height": plan.sparse_height,
            "attention": plan.attention,
        },
        "callbacks": [
            {
                "class": f"{type(callback).__module__}.{type(callback).__qualname__}",
                "code": None if type(callback).__module__.startswith("fpwap.") else code_of(type(callback)),
                "state_version": callback.state_version,
                "phase": callback.phase,
                "positions": callback.positions if isinstance(callback.positions, str) else list(callback.positions),
                "sites": [list(site) for site in own],
                "config": {key: value for key, value in callback.config().items() if key not in RESOLVED},
            }
            for callback, own in zip(callbacks, ready.targets.bound, strict=True)
        ],
        "environment": {
            "torch": torch.__version__,
            "device": plan.device.type,
            "processor": platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": plan.threads,
        },
    }
    try:
        return dict(json.loads(json.dumps(own)))
    except TypeError as error:
        raise RequestError(f"a callback's config() must be JSON: {error}") from error


ENVIRONMENT = ("torch", "device", "processor", "cpu_capability", "threads")
"""Of a run's environment, what its bits may depend on; a user may allow each of them to differ."""


def manifest(identity: dict[str, Any], plan: Plan, now: dict[str, Any]) -> dict[str, Any]:
    """What a result says of its run, less its files, which the store adds.

    identity: of the run as it began. now: of the one that ended it, whose environment may be another if that was
    allowed.
    """
    other = {} if now["environment"] == identity["environment"] else {"ended_in": now["environment"]}
    return {
        **identity,
        **other,
        "layers": plan.layers,
        "versions": {"fpwap": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "plan": plan.summary(),
    }


def opaque(identity: dict[str, Any]) -> str | None:
    """What of a run has no identity beyond this process, in words; such a run is never taken for a finished one."""
    if identity["dataset"]["metadata"] == OPAQUE:
        return "the samples' metadata is not JSON"
    for callback in identity["callbacks"]:
        names = callback["config"].get("opaque")
        if names:
            return f"{callback['class']} has attributes that are not JSON: {', '.join(names)}"
    return None


def _metadata(samples: Sequence[Mapping[str, Any]] | None) -> str | None:
    """Digest of the samples' metadata, where a callback asks for it."""
    if samples is None:
        return None
    digest = xxh3_128()
    try:
        for sample in samples:
            digest.update(json.dumps(sample, sort_keys=True).encode())
    except TypeError:
        return OPAQUE
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
