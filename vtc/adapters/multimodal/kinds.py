"""Which class of a library a module is, and whether it still runs that class's own forward."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from torch import nn

from vtc.adapters.patch import FORWARDS, Patch


def known_as(module: nn.Module, names: Collection[str], home: str = "transformers") -> str:
    """Which of `names`, classes of transformers (or of `home`), a module is an instance of; "" = none of them."""
    for kind in type(module).__mro__:
        if kind.__name__ in names and kind.__module__.split(".")[0] in ("transformers", home):
            return kind.__name__
    return ""


def foreign(module: nn.Module, name: str) -> bool:
    """Whether a module that is known as `name` has another forward than that class, overridden or replaced."""
    kind: Any = next(kind for kind in type(module).__mro__ if kind.__name__ == name)
    own = inspect.unwrap(kind.forward)
    placed = (inspect.unwrap(module.__dict__[key]) for key in FORWARDS if key in module.__dict__)
    replaced = any(getattr(one, "__func__", one) is not own for one in placed if not isinstance(one, Patch))
    writer = next(base for base in kind.__mro__ if "forward" in vars(base))
    return replaced or type(module).forward is not kind.forward or own.__module__ != writer.__module__
