"""What vtc raises. Every message names what was wrong, with which value, and the way out."""

from __future__ import annotations


class VTCError(Exception):
    """Base class of everything vtc raises on purpose."""


class OptionError(VTCError, ValueError):
    """An option is out of range, of the wrong type, or contradicts another."""


class UnsupportedModelError(VTCError, ValueError):
    """The model, or a layer of it, cannot be reduced. Nothing was changed."""


class InputError(VTCError, ValueError):
    """The tensors that reached a method are unusable (NaN, wrong shape)."""


def first_line(error: Exception) -> str:
    """What an error of another library says, in short."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
