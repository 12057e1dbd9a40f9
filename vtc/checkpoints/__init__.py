"""Small real models that run with no network: their weights lie here, or in packages that are already installed."""

from vtc.checkpoints.dinov2 import (
    CheckpointError,
    MissingPackageError,
    SaliencyDecoder,
    SaliencyModel,
    dinov2_saliency,
    dinov2_small,
)
from vtc.checkpoints.tiny import tiny_llava, tiny_qwen

__all__ = [
    "CheckpointError",
    "MissingPackageError",
    "SaliencyDecoder",
    "SaliencyModel",
    "dinov2_saliency",
    "dinov2_small",
    "tiny_llava",
    "tiny_qwen",
]
