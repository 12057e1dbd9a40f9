"""The old place of `vtc.harness.timm`."""

import warnings

from vtc.harness.timm import vtc

warnings.warn("vtc.timm_models is vtc.harness.timm now; this name goes in 0.3", DeprecationWarning, stacklevel=2)

__all__ = ["vtc"]
