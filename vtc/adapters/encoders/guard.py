"""A patched encoder never bypasses its patch: images that reach it go through every patched block, or the call raises.

Every module from the one given to `compress` down to the encoder is watched, and so are the encoder's methods that can
be called instead of its forward. If images were cut into patches while one of them ran, the last patched block must
have run too. `forward_intermediates(stop_early=True)` may stop before it.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import nn

from vtc.adapters.encoders.block_patch import BlockPatch
from vtc.adapters.hooks import Scope
from vtc.adapters.patch import Patch
from vtc.adapters.tracing import SCRIPT, Unscriptable
from vtc.errors import InputError, UnsupportedModelError

METHODS = ("forward_features", "forward_intermediates")


class WatchedMethod(Patch):
    """Replaces one of an encoder's `METHODS`, which callers may use instead of calling the encoder itself."""

    def __init__(self, guard: Guard, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self.guard = guard

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = self.guard.tower.now
        before = now.wide
        self.guard.open(self)
        done = False
        try:  # the caller asks for the tokens of all blocks, or of some, at full length
            now.wide = before or self.name == "forward_intermediates"
            output = self.original(*args, **kwargs)
            done = True
        finally:
            if not done:
                now.wide = before
                self.guard.leave(self)
        self.guard.close(self, output)
        now.wide = before
        return output


class Guard:
    """Watches one tower's encoder in the model that was given to `compress`."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower

    @property
    def patches(self) -> list[BlockPatch]:
        return self.tower.patched

    def install(self, root: nn.Module) -> None:
        site = self.tower.site
        around = enclosing(root, site.patchify, *site.blocks[:1])
        for module in around:
            module.register_forward_pre_hook(Scope("open", self))
            module.register_forward_hook(Scope("close", self), always_call=True)
            module.__dict__[SCRIPT] = Unscriptable()
        for module in dict.fromkeys((*around[-1:], *site.watched)):
            for name in METHODS:
                if callable(getattr(module, name, None)):
                    WatchedMethod(self, module, name).install()

    def open(self, module: Any) -> None:
        if torch.compiler.is_compiling():
            return
        refuse_replica(module)
        now = self.tower.now
        self.leave(module)  # it is still open if a call was interrupted (Ctrl+C)
        if not now.open:
            now.stage = now.grid = now.room = None
        now.open.append((module, now.cut, now.ended))

    def leave(self, module: Any) -> tuple[Any, Any] | None:
        """Forget a module and what began inside it; returns the images and the run that were the last before it."""
        now = self.tower.now
        for place, (opened, *before) in enumerate(now.open):
            if opened is module:
                del now.open[place:]
                return before[0], before[1]
        return None

    def close(self, module: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        now, tower = self.tower.now, self.tower
        before = self.leave(module)
        if before is None or (output is None and sys.exc_info()[1] is not None):  # it raised: nothing more to check
            now.stage = None
            return
        images, run = now.cut is not before[0], now.ended is not before[1]
        if images and not run:
            stage, now.stage = now.stage, None
            if stage is not None and now.wide:
                tower.finish(now, stage)
            elif not tower.idle:
                raise InputError(self.bypassed(0 if stage is None else stage.layer))
        if not now.open and not recomputing():
            tower.idle_calls = 0 if run or images else tower.idle_calls + 1
            tower.others.pop(threading.get_ident(), None)

    def bypassed(self, ran: int) -> str:
        where, depth = self.tower.where, len(self.tower.site.blocks)
        how = f"stopped behind {ran} of {depth} blocks" if ran else f"passed none of the {depth} blocks"
        return (
            f"images went through {where}, but {how} that vtc compressed: if the model has changed, compress it again; "
            "if somebody else runs its blocks, call vtc.remove(model)"
        )


def recomputing() -> bool:
    """Whether this runs inside a backward pass that recomputes (activation checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def refuse_replica(module: Any) -> None:
    if getattr(module, "__dict__", {}).get("_is_replica"):
        raise UnsupportedModelError(
            "torch.nn.DataParallel copies a compressed model by halves, and its copies would run the first one's "
            "weights: use torch.nn.parallel.DistributedDataParallel"
        )


def enclosing(root: nn.Module, *parts: nn.Module) -> list[nn.Module]:
    """The modules of `root` that contain all of `parts`, outermost first."""
    names = {id(module): name for name, module in root.named_modules()}
    found = [root]
    for steps in zip(*(names[id(part)].split(".") for part in parts), strict=False):
        if len(set(steps)) > 1:
            break
        found.append(found[-1].get_submodule(steps[0]))
    return found


def container(root: nn.Module, blocks: tuple[nn.Module, ...]) -> tuple[nn.Module, str] | None:
    """(module, attribute) of the list that begins with `blocks`."""
    for module in root.modules():
        for name, child in module._modules.items():
            if isinstance(child, (nn.ModuleList, nn.Sequential)) and tuple(child)[: len(blocks)] == blocks:
                return module, name
    return None


def changed(place: tuple[nn.Module, str] | None, blocks: tuple[nn.Module, ...]) -> str:
    """How the list of blocks differs from the patched one; "" = it does not. A wrapped block is no difference."""
    if place is None:
        return ""
    now = list(getattr(*place))
    if len(now) < len(blocks):
        return f"{len(blocks)} then, {len(now)} now"
    for index, block in enumerate(blocks):
        if now[index] is not block and not any(part is block for part in now[index].modules()):
            return f"block {index} is another one"
    return ""
