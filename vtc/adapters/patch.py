"""What stands in for the `forward` of a block, and hears its keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import einops
from torch import Tensor, nn

from vtc.adapters.hooks import Hook, unhook
from vtc.adapters.tracing import SCRIPT, Unscriptable

if TYPE_CHECKING:
    from vtc.adapters.tower import Tower


class PatchedForward:
    """Stands in for one block's `forward`. An object, not a closure, so that deep copies refer to their own block."""

    def __init__(self, tower: Tower, index: int, block: nn.Module, name: str) -> None:
        self.tower, self.index, self.block, self.name = tower, index, block, name
        self.replaced = block.__dict__.get(name)
        self.installed = False
        self.ear: nn.Module | None = None  # whose output holds the keys
        self.attention = type(tower.site.block.parts(block)[0])

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.block).forward(self.block, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.installed:  # somebody wrapped this forward while it was ours, and kept it
            return self.original(*args, **kwargs)
        if args:
            return self.tower.run(self, args[0], args[1:], kwargs)
        name = next(iter(kwargs))  # e.g. hidden_states=
        rest = {k: v for k, v in kwargs.items() if k != name}
        return self.tower.run(self, kwargs[name], (), rest)

    def listen(self) -> None:
        """Hear the keys where they come from now: LoRA puts another module in the place of the one that was there."""
        block = self.tower.site.block
        assert block.keys is not None
        ear = block.keys(self.block)
        if ear is not self.ear:
            if self.ear is not None:
                unhook(self.ear, self)
            ear.register_forward_hook(Hook("heard", self))
            self.ear = ear

    def heard(self, hook: Hook, args: tuple, output: Tensor) -> None:
        now = self.tower.now
        if now.ear is self:
            now.keys = head_mean(output, self.tower.site.block.heads(self.block))

    def install(self) -> None:
        self.block.__dict__[self.name] = self
        self.block.__dict__[SCRIPT] = Unscriptable()
        self.installed = True

    def remove(self) -> None:
        """Take it off, also where accelerate has put a wrapper around it since: that one calls `_old_forward`."""
        self.installed = False
        self.block.__dict__.pop(SCRIPT, None)
        if self.ear is not None:
            unhook(self.ear, self)
        for name in ("forward", "_old_forward"):
            if self.block.__dict__.get(name) is self:
                if self.replaced is not None:
                    self.block.__dict__[name] = self.replaced
                elif name == "_old_forward":
                    self.block.__dict__[name] = type(self.block).forward.__get__(self.block)
                else:
                    del self.block.__dict__[name]


def head_mean(keys: Tensor, heads: int) -> Tensor:
    """[B, H, N, D] or [B, N, H D] -> [B, N, D] float32, the mean over heads."""
    pattern = "b h n d -> b n d" if keys.ndim == 4 else "b n (h d) -> b n d"
    return einops.reduce(keys.detach().float(), pattern, "mean", h=heads)


def patch_on(module: nn.Module) -> PatchedForward | None:
    """Our patch on a module, also under a wrapper of accelerate's."""
    for name in ("forward", "_old_forward"):
        if isinstance(module.__dict__.get(name), PatchedForward):
            return module.__dict__[name]
    return None
