"""Runs a method in the blocks of an encoder, between attention and MLP.

A family file (timm, open_clip, Hugging Face) says what its encoders look like (site.py). The state of a call is an
immutable `Stage` (stage.py) that each block hands to the next; it also rides on the block's output, so that activation
checkpointing finds it again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import einops
import torch
from torch import Tensor, nn

from vtc.adapters.rotary import column_slots
from vtc.adapters.site import Site
from vtc.adapters.stage import Grid, Stage, padding_mask
from vtc.errors import InputError, VTCError
from vtc.functional import check_finite
from vtc.methods.base import Method, Tokens
from vtc.methods.downsample import coarse_grid, pool_map
from vtc.positions import members
from vtc.schedule import removals, resized_count

_TAG = "_vtc_stage"  # the storage is shared by a tensor and its detached copies, and lives as long as any of them


class PatchedForward:
    """Stands in for one block's `forward`. An object, not a closure, so that deep copies refer to their own block."""

    def __init__(self, tower: Tower, index: int, block: nn.Module, name: str) -> None:
        self.tower, self.index, self.block, self.name = tower, index, block, name
        self.replaced = block.__dict__.get(name)
        self.keys: Tensor | None = None
        self.listening = False

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.block).forward(self.block, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self.tower.run(self, args[0], args[1:], kwargs)
        name = next(iter(kwargs))  # e.g. hidden_states=
        rest = {k: v for k, v in kwargs.items() if k != name}
        return self.tower.run(self, kwargs[name], (), rest)

    def heard(self, hook: Hook, args: tuple, output: Tensor) -> None:
        if self.listening:
            self.keys = head_mean(output, self.tower.site.block.heads(self.block))

    def install(self) -> None:
        self.block.__dict__[self.name] = self

    @property
    def installed(self) -> bool:
        return self.block.__dict__.get(self.name) is self

    def remove(self) -> None:
        if self.replaced is not None:
            self.block.__dict__[self.name] = self.replaced
        else:
            del self.block.__dict__[self.name]


class Hook:
    """A forward (pre-)hook of ours, told from other people's by its class."""

    def __init__(self, act: str, target: Any, extra: dict | None = None) -> None:
        self.act, self.target, self.extra = act, target, extra or {}

    def __call__(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        return getattr(self.target, self.act)(self, args, *rest)


class Intermediates:
    """Stands in for `forward_intermediates`: while it runs, every block gives its tokens at full length."""

    def __init__(self, tower: Tower, module: nn.Module) -> None:
        self.tower, self.module = tower, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, self.tower.widen_all = self.tower.widen_all, True
        try:
            return type(self.module).forward_intermediates(self.module, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            self.tower.widen_all = before


@dataclass(eq=False)
class Tower:
    """One patched encoder: the site, the method, and the state of the last call."""

    site: Site
    method: Method
    stage: Stage | None = None
    widen_all: bool = False  # every block returns full length, not only the last
    patched: list[PatchedForward] = field(default_factory=list)
    plans: dict[int, tuple[int, ...]] = field(default_factory=dict)
    grid: tuple[Grid, ...] | None = None
    slots: int = 1  # that merged tokens have for their members' positions (PPE)
    slot: Tensor | None = None  # of every column of the rotary table; None = no PPE
    resized: tuple[Grid, Grid] | None = None  # the image's own grid and the one it was resized to, until block 0

    @property
    def where(self) -> str:
        return self.site.path or self.site.kind

    # -- on and off ---------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Patch every block. Whoever calls this takes it off again if it fails: `compress` strips the whole model."""
        if self.method.ppe:
            assert not isinstance(self.site.rotary, str)
            self.slots, self.slot = column_slots(*self.site.rotary(), self.method.ppe)
        for index, block in enumerate(self.site.blocks):
            # accelerate wraps forward and keeps the real one in _old_forward; go below its device moves
            name = "_old_forward" if "_old_forward" in block.__dict__ else "forward"
            patch = PatchedForward(self, index, block, name)
            patch.install()
            self.patched.append(patch)
            if "keys" in self.method.needs and self.site.block.keys is not None:
                self.site.block.keys(block).register_forward_hook(Hook("heard", patch))
        self.site.patchify.register_forward_hook(Hook("saw_patches", self))
        if self.site.naflex is not None:
            self.site.naflex.register_forward_pre_hook(Hook("saw_shapes", self), with_kwargs=True)
        if getattr(self.method, "mode", "") == "resize":
            assert not isinstance(self.site.resizable, str)
            for module, extra in self.site.resizable:
                module.register_forward_pre_hook(Hook("shrink", self, extra), with_kwargs=True)
        for module in self.site.watched:
            module.__dict__["forward_intermediates"] = Intermediates(self, module)

    # -- hooks --------------------------------------------------------------------------------------------------

    def saw_patches(self, hook: Hook, args: tuple, output: Tensor) -> None:
        if self.site.naflex is None:
            rows, columns = output.shape[-2:]
            self.grid = ((rows, columns),) * output.shape[0]

    def saw_shapes(self, hook: Hook, args: tuple, kwargs: dict) -> None:
        shapes = kwargs.get("spatial_shapes", args[1] if len(args) > 1 else None)
        if shapes is not None and "grid" in self.method.needs:
            self.grid = tuple((int(h), int(w)) for h, w in shapes.tolist())

    def shrink(self, hook: Hook, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Resize the pixels so that the encoder sees the budget's grid (Downsample(mode="resize"))."""
        name = None if args else next(iter(kwargs))
        pixels = args[0] if name is None else kwargs[name]
        assert isinstance(self.site.patchify, nn.Conv2d)
        patch = self.site.patchify.stride
        fine = (pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1])
        coarse = coarse_grid(fine, resized_count(self.method, fine[0] * fine[1], self.site.macs))
        self.resized = None if coarse == fine else (fine, coarse)
        if coarse == fine:
            return None
        small = nn.functional.interpolate(
            pixels.float(), (coarse[0] * patch[0], coarse[1] * patch[1]), mode="bicubic", antialias=True
        ).to(pixels.dtype)
        if name is None:
            return (small, *args[1:]), {**kwargs, **hook.extra}
        return args, {**kwargs, name: small, **hook.extra}

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, patch: PatchedForward, x: Tensor, args: tuple, kwargs: dict) -> Any:
        block = self.site.block
        stage = self.enter(patch, x, args, kwargs)
        removed = stage.plan[:, patch.index] if isinstance(stage.plan, Tensor) else stage.plan[patch.index]
        idle = not bool(removed.any()) if isinstance(removed, Tensor) else removed == 0
        if stage.total is None and idle:  # nothing has happened and nothing will: the block's own forward
            out = patch.original(x, *args, **kwargs)
            return self.leave(patch, out, replace(stage, flow=(*stage.flow, (stage.count(), stage.count()))))
        attended = stage.count()
        x = stage.narrow(x)
        patch.listening = not idle and "keys" in self.method.needs
        before = x
        x = x + block.attend(patch.block, x, stage if stage.total is not None else None, args, kwargs)
        if not idle:
            if "keys" in self.method.needs and block.project is not None:
                patch.keys = block.project(patch.block, before)
            x, stage = self.reduce(patch, x, stage, removed)
        x = x + block.feed(patch.block, x)
        return self.leave(patch, x, replace(stage, flow=(*stage.flow, (attended, stage.count()))))

    def reduce(self, patch: PatchedForward, x: Tensor, stage: Stage, removed: int | Tensor) -> tuple[Tensor, Stage]:
        keys, patch.keys, patch.listening = patch.keys, None, False
        if keys is None and "keys" in self.method.needs:
            raise VTCError(
                f"block {patch.index} of {self.site.path or 'the model'} attended without showing its keys, which "
                f'{self.method.name} compares; please report the model, and use metric="hidden" where a method has it'
            )
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if not stage.maps:
                check_finite(
                    x if keys is None else keys, f"tokens of {self.site.path or 'the model'}, layer {patch.index}"
                )
            tokens = Tokens(
                features=x.detach(),
                keys=keys,
                size=stage.size,
                mask=stage.mask,
                prefix=stage.prefix,
                grid=stage.grid,
                layer=patch.index,
                depth=len(self.site.blocks),
            )
            token_map = self.method.decide(tokens, removed)
        x = token_map.merge(x) if self.method.merges else token_map.gather(x)
        total = token_map if stage.total is None else stage.total.compose(token_map)
        mask = None if stage.mask is None else token_map.mask()
        size = token_map.size if self.method.merges or mask is not None else None
        carried = None
        if self.slot is not None:
            carried = members(total.drop_prefix(stage.prefix), self.slots).clamp(min=0)
        maps = (*stage.maps, token_map)
        return x, replace(stage, total=total, size=size, mask=mask, maps=maps, carried=carried, slot=self.slot)

    def enter(self, patch: PatchedForward, x: Tensor, args: tuple, kwargs: dict) -> Stage:
        # In a backward pass that recomputes (activation checkpointing) the state of the last call is another one's, so
        # the stage that rides on the input comes first. Compiled graphs recompute by themselves.
        tag = None if torch.compiler.is_compiling() else getattr(x.untyped_storage(), _TAG, None)
        if tag is not None and tag[0] is self and tag[1].layer == patch.index:
            if patch.index > 0 or torch.is_grad_enabled():
                return tag[1]
        if patch.index == 0:
            stage = self.begin(x, args, kwargs)
            self.tag(x, stage)
            return stage
        if self.stage is None or self.stage.layer != patch.index:
            raise VTCError(
                f"block {patch.index} of {self.site.path or 'the model'} ran without the blocks before it: "
                "run the whole encoder, or call vtc.remove(model) to use its blocks one by one"
            )
        return self.stage

    def begin(self, x: Tensor, args: tuple, kwargs: dict) -> Stage:
        prefix = self.site.prefix
        patches = x.shape[1] - prefix
        stage = Stage(0, prefix, x.shape[1], (), self.grid, batch=x.shape[0])
        if self.resized is not None:
            return self.begin_resized(x, stage)
        mask = None if self.site.block.relative else padding_mask(args, kwargs, x)
        if mask is not None:
            plans = [self.plan(int(n) - prefix) for n in mask.sum(1)]
            plan = torch.tensor(plans, device=x.device)
            return replace(stage, plan=plan, mask=mask, size=mask.float())
        if "grid" in self.method.needs and (self.grid is None or any(h * w != patches for h, w in self.grid)):
            raise InputError(
                f"{self.method.name} needs all patches of the image, but {patches} of the grid {self.grid} reached the "
                "encoder: switch masking or patch dropout off, or use a method that needs no grid"
            )
        return replace(stage, plan=self.plan(patches))

    def plan(self, patches: int) -> tuple[int, ...]:
        if torch.compiler.is_compiling():  # the graph holds the plan, and should not depend on what is in the memory
            return removals(self.method, patches, len(self.site.blocks), self.site.macs)
        if patches not in self.plans:
            self.plans[patches] = removals(self.method, patches, len(self.site.blocks), self.site.macs)
        return self.plans[patches]

    def begin_resized(self, x: Tensor, stage: Stage) -> Stage:
        assert self.resized is not None
        fine, coarse = self.resized
        self.resized = None
        batch, entry = x.shape[0], fine[0] * fine[1] + stage.prefix
        front = pool_map(entry, (fine,) * batch, [coarse] * batch, stage.prefix, device=x.device)
        if front.anchor.shape[1] != x.shape[1]:
            raise VTCError(
                f"resized to {coarse[0]}x{coarse[1]} patches, but {x.shape[1] - stage.prefix} reached the encoder; "
                'use mode="pool"'
            )
        return replace(stage, plan=(0,) * len(self.site.blocks), front=front)

    def leave(self, patch: PatchedForward, x: Tensor, stage: Stage) -> Tensor:
        stage = replace(stage, layer=patch.index + 1)
        self.stage = stage
        last = patch.index + 1 == len(self.site.blocks)
        if last or self.widen_all or patch.block._forward_hooks:  # somebody else sees this output
            x = stage.widen(x, 0 if self.method.merges else "nearest")
        if not last:
            self.tag(x, stage)
        return x

    def tag(self, x: Tensor, stage: Stage) -> None:
        if not torch.compiler.is_compiling():
            setattr(x.untyped_storage(), _TAG, (self, stage))


def head_mean(keys: Tensor, heads: int) -> Tensor:
    """[B, H, N, D] or [B, N, H D] -> [B, N, D] float32, the mean over heads."""
    pattern = "b h n d -> b n d" if keys.ndim == 4 else "b n (h d) -> b n d"
    return einops.reduce(keys.detach().float(), pattern, "mean", h=heads)


def strip(module: nn.Module) -> None:
    """Take our patches and hooks off one module."""
    for name in ("forward", "_old_forward"):
        if isinstance(module.__dict__.get(name), PatchedForward):
            module.__dict__[name].remove()
    if isinstance(module.__dict__.get("forward_intermediates"), Intermediates):
        del module.__dict__["forward_intermediates"]
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(hook, Hook)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
