"""Replacements for a model's own parts, and how they are removed. Objects, not closures, so that deep copies refer to
their own model."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from vtc.adapters.hooks import unhook
from vtc.adapters.tracing import SCRIPT, Unscriptable

# where a module's own forward may be: accelerate's wrapper calls the second, and restores it when removed
FORWARDS = ("forward", "_old_forward")


class Patch:
    """Replaces one attribute of a module. `name` is the attribute; `replaced` is what the instance had there."""

    installed = False

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.replaced = module.__dict__.get(name)
        method = getattr(type(module), name, None)
        if callable(method):  # `generate` inspects the signature of what it calls
            self.__signature__ = inspect.signature(method.__get__(module))

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What was there before."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        name = "forward" if self.name == "_old_forward" else self.name  # accelerate's name for the forward
        return getattr(type(self.module), name)(self.module, *args, **kwargs)

    def install(self) -> None:
        self.module.__dict__[self.name] = self
        self.installed = True

    def remove(self) -> None:
        """Remove the patch, also if accelerate has since wrapped the forward; its wrapper calls `_old_forward`."""
        self.installed = False
        held = self.module.__dict__
        for name in FORWARDS if self.name in FORWARDS else (self.name,):
            if held.get(name) is not self:
                continue
            if self.replaced is not None:
                held[name] = self.replaced
            elif name == "_old_forward":
                held[name] = type(self.module).forward.__get__(self.module)
            else:
                del held[name]


def forward_name(module: nn.Module) -> str:
    """The attribute that holds a module's own forward: accelerate's wrapper keeps it under another name."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def strip(module: nn.Module) -> None:
    """Remove everything of vtc from one module: patches, including those that only our hooks still refer to because
    other code wrapped them; hooks; and the block on scripting."""
    for held in list(module.__dict__.values()):
        if isinstance(held, Patch):
            held.remove()
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        for patch in getattr(getattr(hook, "target", None), "patches", ()):
            patch.remove()
    if isinstance(module.__dict__.get(SCRIPT), Unscriptable):
        del module.__dict__[SCRIPT]
    unhook(module)
