"""The old place of `vtc.models.images`."""

import warnings

from vtc.models.images import ImageError, example_photo, load_image, preprocess

warnings.warn("vtc.images is vtc.models.images now; this name goes in 0.3", DeprecationWarning, stacklevel=2)

__all__ = ["ImageError", "example_photo", "load_image", "preprocess"]
