"""The hooks that vtc registers on modules, recognisable by their class, and how they are removed."""

from __future__ import annotations

from typing import Any

from torch import nn


class Hook:
    """A forward (pre-)hook of vtc."""

    def __init__(self, act: str, target: Any, extra: dict | None = None) -> None:
        self.act, self.target, self.extra = act, target, extra or {}

    def __call__(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        return getattr(self.target, self.act)(self, args, *rest)


class Scope(Hook):
    """A hook that is passed the module that begins or ends."""

    def __call__(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        return getattr(self.target, self.act)(module, *rest)


def unhook(module: nn.Module, target: Any = None) -> None:
    """Remove our hooks from a module: all of them, or those of `target`."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(hook, Hook) and target in (None, hook.target)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
