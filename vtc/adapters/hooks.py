"""What vtc hangs on modules, told from other people's by its class, and how it comes off."""

from __future__ import annotations

from typing import Any

from torch import nn


class Hook:
    """A forward (pre-)hook of ours."""

    def __init__(self, act: str, target: Any, extra: dict | None = None) -> None:
        self.act, self.target, self.extra = act, target, extra or {}

    def __call__(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        return getattr(self.target, self.act)(self, args, *rest)


class Scope(Hook):
    """One that is told which module begins or ends."""

    def __call__(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        return getattr(self.target, self.act)(module, *rest)


def unhook(module: nn.Module, target: Any = None) -> None:
    """Take our hooks off a module: all of them, or those of `target`."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(hook, Hook) and target in (None, hook.target)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
