"""Small real models that run without a network: their weights are here, or in installed packages."""

from vtc.checkpoints.dinov2 import (
    CheckpointError,
    MissingPackageError,
    SaliencyDecoder,
    SaliencyModel,
    dinov2_saliency,
    dinov2_small,
)
from vtc.checkpoints.tiny import tiny_colqwen, tiny_llava, tiny_qwen

__all__ = [
    "CheckpointError",
    "MissingPackageError",
    "SaliencyDecoder",
    "SaliencyModel",
    "dinov2_saliency",
    "dinov2_small",
    "tiny_colqwen",
    "tiny_llava",
    "tiny_qwen",
]
