"""What takes the place of a model's own parts, and how all of it comes off. Objects, not closures, so that deep copies
refer to their own model."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from vtc.adapters.hooks import unhook
from vtc.adapters.tracing import SCRIPT, Unscriptable

# where a forward of a module's own may be: accelerate's wrapper calls the second, and takes it back when it goes
FORWARDS = ("forward", "_old_forward")


class Patch:
    """Takes the place of one attribute of a module. `name` is the attribute; `replaced` what an instance had there."""

    installed = False

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.replaced = module.__dict__.get(name)
        method = getattr(type(module), name, None)
        if callable(method):  # `generate` looks at the arguments of what it calls
            self.__signature__ = inspect.signature(method.__get__(module))

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What was there before."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        name = "forward" if self.name == "_old_forward" else self.name  # accelerate's name for it
        return getattr(type(self.module), name)(self.module, *args, **kwargs)

    def install(self) -> None:
        self.module.__dict__[self.name] = self
        self.installed = True

    def remove(self) -> None:
        """Take it off, also where accelerate has put a wrapper around a forward since, which calls `_old_forward`."""
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
    """The attribute that holds a module's own forward: accelerate's wrapper calls it by another name."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def strip(module: nn.Module) -> None:
    """Take all that is ours off one module: patches, and those that hooks of ours know of, which somebody may have
    wrapped; hooks; and the refusal to be scripted."""
    for held in list(module.__dict__.values()):
        if isinstance(held, Patch):
            held.remove()
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        for patch in getattr(getattr(hook, "target", None), "patches", ()):
            patch.remove()
    if isinstance(module.__dict__.get(SCRIPT), Unscriptable):
        del module.__dict__[SCRIPT]
    unhook(module)
