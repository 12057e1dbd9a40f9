"""The errors that vtc raises. Every message says what was wrong, with which value, and what to do."""

from __future__ import annotations


class VTCError(Exception):
    """Base class of everything vtc raises on purpose."""


class OptionError(VTCError, ValueError):
    """An option is out of range, of the wrong type, or contradicts another."""


class UnsupportedModelError(VTCError, ValueError):
    """The model, or a layer of it, cannot be reduced. Nothing was changed."""


class InputError(VTCError, ValueError):
    """The tensors given to a method are unusable (NaN, wrong shape)."""


def first_line(error: Exception) -> str:
    """The message of another library's error, shortened."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
