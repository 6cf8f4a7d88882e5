"""What is done with activations: the protocol (`base`) and the four reference callbacks (`common`)."""

from .base import Callback, Context, Emit, LayerArtifact, WriteBack

__all__ = ["Callback", "Context", "Emit", "LayerArtifact", "WriteBack"]
