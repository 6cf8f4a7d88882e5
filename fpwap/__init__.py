"""fpwap: activations from transformer language models that are larger than the accelerator, or than RAM.

Forward Pass Weight Amortization Protocol: each layer's weights are read once, and the whole dataset goes through that
layer before the next. See `Sweep`.
"""

__version__ = "0.1.0"

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
