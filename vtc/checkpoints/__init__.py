"""Small real models that run with no network: the weights come out of packages that are already installed."""

from vtc.checkpoints.dinov2 import (
    CheckpointError,
    MissingPackageError,
    SaliencyDecoder,
    SaliencyModel,
    dinov2_saliency,
    dinov2_small,
)

__all__ = [
    "CheckpointError",
    "MissingPackageError",
    "SaliencyDecoder",
    "SaliencyModel",
    "dinov2_saliency",
    "dinov2_small",
]
