"""The input checks of all public functions."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError, OptionError


def check_fraction(name: str, value: Any, *, or_count: bool) -> None:
    count = " or a whole number of tokens >= 1" if or_count else ""
    if is_int(value) and or_count:
        if value < 1:
            raise OptionError(f"{name}={value!r}: it takes a fraction in (0, 1]{count}; it says what stays")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionError(f"{name}={value!r}: it takes a fraction in (0, 1]{count}, not {type(value).__name__}")
    elif not 0 < value <= 1:  # also refuses NaN
        raise OptionError(f"{name}={value!r}: out of range, it takes a fraction in (0, 1]{count}; it says what stays")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r}: it takes True or False")


def check_seed(seed: Any) -> None:
    check_number("seed", seed, 0, 2**62, whole=True)  # generators hold 64 bits, and the layer's number is added


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Raise OptionError unless `value` is a number in [low, high]."""
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or math.isinf(value):
        span = f">= {low}" if math.isinf(high) else f"in [{low}, {high}]"
        raise OptionError(f"{name}={value!r}: it takes a {'whole ' if whole else ''}number {span}")


def check(features: Tensor, prefix: int = 0, mask: Tensor | None = None, size: Tensor | None = None) -> None:
    """Raise InputError unless the tensors fit together and the features are finite."""
    if features.ndim != 3 or not features.is_floating_point():
        raise InputError(f"features must be a float tensor [B, N, D], not {features.dtype} {tuple(features.shape)}")
    for name, other in (("mask", mask), ("size", size)):
        if other is not None and other.shape != features.shape[:2]:
            raise InputError(f"{name} must be {tuple(features.shape[:2])} like the features, not {tuple(other.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"mask must be bool (True = real token), not {mask.dtype}")
    if type(prefix) is not int or not 0 <= prefix <= features.shape[1]:
        raise InputError(f"prefix={prefix!r} does not fit {features.shape[1]} tokens")
    check_finite(features, "features")


def check_finite(x: Tensor, what: str) -> None:
    """Raise InputError on NaN or infinity; does nothing inside compiled graphs and CUDA graph capture, which cannot
    inspect values."""
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if not math.isfinite(x.detach().sum(dtype=torch.float32)):
        raise InputError(f"the {what} hold NaN or infinity: no token can be compared; check the input and the weights")


def check_mask(mask: Tensor | None, shape: tuple[int, ...] | torch.Size) -> None:
    """Raise InputError unless the mask is bool and of this shape."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape != torch.Size(shape)):
        raise InputError(f"mask must be bool {tuple(shape)} (True = real), not {mask.dtype} {tuple(mask.shape)}")


def renamed(old: str, new: str) -> None:
    """Warn that a name from the previous version works for the last time in this version."""
    warnings.warn(f"{old} is {new} now; the old name goes with the next version", DeprecationWarning, stacklevel=3)
