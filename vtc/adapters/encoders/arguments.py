"""What a part of a model is given, by name."""

from __future__ import annotations

import inspect
from typing import Any


def parameters_of(cls: type, behind: int = 2) -> dict[str, inspect.Parameter]:
    """Of a class's forward, behind self and its tokens, by name."""
    every = list(inspect.signature(cls.forward).parameters.values())[behind:]  # type: ignore[attr-defined]
    return {p.name: p for p in every if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def named(part: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A call's arguments, the first as it is, the others by name."""
    names = list(parameters_of(type(part), 1))
    if len(args) > len(names):
        return args, kwargs
    return args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
