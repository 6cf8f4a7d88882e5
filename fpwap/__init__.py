"""fpwap: activations from transformer language models that are larger than the accelerator, or than RAM.

Forward Pass Weight Amortization Protocol: each layer's weights are read once, and the whole dataset goes through that
layer before the next. See `Sweep`.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_found = find_spec("archs")
if _found is None or _found.origin is None or Path(_found.origin).parent.parent != Path(__file__).parent.parent:
    raise ImportError(
        f"fpwap needs its own package 'archs' beside it, and Python finds {_found and _found.origin}: "
        "remove or rename that one, or put fpwap's folder first on the path"
    )

if TYPE_CHECKING:
    from .callbacks.base import Callback, Emit, LayerArtifact, WriteBack
    from .errors import FpwapError, Interrupted
    from .progress import ProgressEvent
    from .result import Result
    from .sweep import Sweep

__all__ = [
    "Callback",
    "Emit",
    "FpwapError",
    "Interrupted",
    "LayerArtifact",
    "ProgressEvent",
    "Result",
    "Sweep",
    "WriteBack",
]

_HOME = {
    **dict.fromkeys(("Callback", "Emit", "LayerArtifact", "WriteBack"), ".callbacks.base"),
    **dict.fromkeys(("FpwapError", "Interrupted"), ".errors"),
    "ProgressEvent": ".progress",
    "Result": ".result",
    "Sweep": ".sweep",
}


def __getattr__(name: str) -> object:
    """The public names, imported when first asked for: `fpwap --help` need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
