"""The replacement for the `forward` of a block; it also reads the block's keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.attention_tap import listen
from vtc.adapters.hooks import Hook, unhook
from vtc.adapters.patch import FORWARDS, Patch, forward_name
from vtc.adapters.tracing import SCRIPT, Unscriptable
from vtc.scores.attention import head_mean, heads_of


class BlockPatch(Patch):
    """Replaces the `forward` of one block."""

    def __init__(self, tower: Any, index: int, module: nn.Module) -> None:
        super().__init__(module, forward_name(module))
        self.tower, self.index = tower, index
        self.source: nn.Module | None = None  # the module whose output holds the keys
        self.attention = type(tower.site.block.parts(module)[0])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.installed:  # other code wrapped this forward while it was ours, and still calls it
            return self.original(*args, **kwargs)
        if args:
            return self.tower.run(self, args[0], args[1:], kwargs)
        name = next(iter(kwargs))  # e.g. hidden_states=
        rest = {k: v for k, v in kwargs.items() if k != name}
        return self.tower.run(self, kwargs[name], (), rest)

    def listen(self) -> None:
        """Hook the module that computes the keys now: LoRA replaces the original one."""
        block = self.tower.site.block
        assert block.keys is not None
        source = block.keys(self.module)
        if source is not self.source:
            if self.source is not None:
                unhook(self.source, self)
            source.register_forward_hook(Hook("heard", self))
            self.source = source

    def heard(self, hook: Hook, args: tuple, output: Tensor) -> None:
        now = self.tower.now
        if now.wanted is self:
            heads = self.tower.site.block.heads(self.module)
            mean = heads_of if self.tower.method.each_head and output.is_cpu else head_mean
            keys = mean(output, heads)
            now.keys = keys if now.keys is None else torch.cat([now.keys, keys])  # images may attend one by one

    def install(self) -> None:
        super().install()
        taps = self.tower.site.block.taps
        for module in () if taps is None else taps(self.module):
            listen(module)
        self.module.__dict__[SCRIPT] = Unscriptable()

    def remove(self) -> None:
        super().remove()
        self.module.__dict__.pop(SCRIPT, None)
        if self.source is not None:
            unhook(self.source, self)


def patch_on(module: nn.Module) -> BlockPatch | None:
    """Our patch on a module, also if accelerate has wrapped it."""
    found = (module.__dict__.get(name) for name in FORWARDS)
    return next((patch for patch in found if isinstance(patch, BlockPatch)), None)
