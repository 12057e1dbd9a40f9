"""Runs a method in the blocks of an encoder, between attention and MLP.

A library file (timm, open_clip, Hugging Face) describes its encoders (site.py). The state of a call is an immutable
`CallState` (state.py) that each block passes to the next; it is also attached to the storage of the block's input, so
that activation checkpointing finds it again in the backward pass.
"""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtc.adapters.encoders.block_patch import BlockPatch
from vtc.adapters.encoders.guard import Guard, changed, container, recomputing
from vtc.adapters.encoders.masks import cut, read
from vtc.adapters.encoders.rotary import column_slots
from vtc.adapters.encoders.site import EncoderSite
from vtc.adapters.encoders.state import CallState, Running, layer_maps, report
from vtc.adapters.hooks import Hook
from vtc.adapters.report import Report
from vtc.adapters.tracing import refuse_traced, rides, tracer
from vtc.budget import per_layer, resized_count
from vtc.checks import check_finite
from vtc.errors import InputError, VTCError
from vtc.layout import Grid
from vtc.methods.base import Method
from vtc.methods.downsample import coarse_grid, pool_map
from vtc.positions import members
from vtc.token_map import TokenMap
from vtc.tokens import Tokens


@dataclass(eq=False)
class EncoderPatch:
    """One patched encoder: the site, the method, and the state of its calls.

    Attributes:
        stage: the state at the end of the last call with images; turn: when that call ended; idle_calls: how many calls
            without an image came after it.
        place: (module, attribute) of the list that holds the blocks.
        plans: by number of patches, what each layer removes.
        slots, slot: how many positions a merged token carries (PPE), and which of them each column of the rotary table
            reads; None = no PPE.
        shared, others: the calls in progress, in the thread that compressed the model (`home`) and in other threads.
    """

    site: EncoderSite
    method: Method
    stage: CallState | None = None
    turn: int = 0
    idle_calls: int = 0
    place: tuple[nn.Module, str] | None = None
    patched: list[BlockPatch] = field(default_factory=list)
    plans: dict[int, tuple[int, ...]] = field(default_factory=dict)
    slots: int = 1
    slot: Tensor | None = None
    home: int = field(default_factory=threading.get_ident)
    shared: Running = field(default_factory=Running)
    others: dict[int, Running] = field(default_factory=dict)
    early: ClassVar[bool] = False  # tokens leave in front of the first block

    def __post_init__(self) -> None:
        self.idle = self.method.budget.everything

    @property
    def now(self) -> Running:
        """The state of this thread's call."""
        if torch.compiler.is_compiling() or threading.get_ident() == self.home:
            return self.shared
        return self.others.setdefault(threading.get_ident(), Running())

    @property
    def where(self) -> str:
        return self.site.path or self.site.type_name

    # -- reports ------------------------------------------------------------------------------------------------

    @property
    def last(self) -> CallState | None:
        return self.stage

    @property
    def maps(self) -> list[TokenMap]:
        assert self.stage is not None
        return layer_maps(self.stage)

    @property
    def grids(self) -> tuple[Grid | None, ...]:
        assert self.stage is not None
        return self.stage.grids

    def report(self, several: str = "") -> Report:
        """What the last call did; `several`: a suffix for the name if there are several encoders."""
        assert self.stage is not None
        notes = ["no image in the last call: this is of an earlier one"] if self.idle_calls else []
        notes += [f"encoder {self.where}{several}"] if several else []
        return replace(report(self.method.name, self.site, self.stage, self.early), notes="; ".join(notes))

    @property
    def installed(self) -> bool:
        return any(patch.installed for patch in self.patched)

    # -- on and off ---------------------------------------------------------------------------------------------

    def install(self, root: nn.Module) -> None:
        """Patch every block. If this fails, the caller must undo it: `compress` removes all patches from the model.

        Args:
            root: the model that contains the encoder.
        """
        Guard(self).install(root)
        self.place = container(root, self.site.blocks)
        if self.method.ppe:
            assert not isinstance(self.site.rotary, str)
            self.slots, self.slot = column_slots(*self.site.rotary(), self.method.ppe)
        for index, block in enumerate(self.site.blocks):
            patch = BlockPatch(self, index, block)
            patch.install()
            self.patched.append(patch)
            if "layer_keys" in self.method.needs and self.site.block.keys is not None:
                patch.listen()
        self.site.patchify.register_forward_hook(Hook("saw_patches", self))
        if self.site.naflex is not None:
            self.site.naflex.register_forward_pre_hook(Hook("saw_shapes", self), with_kwargs=True)
        if self.method.resizes:
            resized = self.site.resized()
            assert not isinstance(resized, str)
            for module, extra in resized:
                module.register_forward_pre_hook(Hook("shrink", self, extra), with_kwargs=True)
        # no longer needed: these served only the checks, and functions of an adapter cannot be pickled
        self.site = replace(self.site, encoder=None, probe=None, rotary="", resizable="")

    # -- hooks --------------------------------------------------------------------------------------------------

    def saw_patches(self, hook: Hook, args: tuple, output: Tensor) -> None:
        now = self.now
        if tracer(output):
            return
        now.cut = output.new_empty(0)
        if self.site.naflex is not None:
            return
        batch, patches = output.shape[0], output.shape[2:].numel()
        now.grid = ((output.shape[-2], output.shape[-1]),) if output.ndim == 4 else None
        each, every = now.room or (0, 0)
        now.room = each + patches, every + batch * patches

    def saw_shapes(self, hook: Hook, args: tuple, kwargs: dict) -> None:
        if "grid" in self.method.needs:
            self.now.grid = self.site.grids(self.site.naflex, args, kwargs)

    def shrink(self, hook: Hook, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Resize the pixels so that the encoder sees the budget's grid (Downsample(mode="resize"))."""
        if self.idle:
            return None
        name = None if args else next(iter(kwargs))
        pixels = args[0] if name is None else kwargs[name]
        refuse_traced(pixels)
        assert isinstance(self.site.patchify, nn.Conv2d)
        patch = self.site.patchify.stride
        fine = (pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1])
        coarse = coarse_grid(fine, resized_count(self.method, fine[0] * fine[1], self.site.macs))
        self.now.resized = None if coarse == fine else (fine, coarse)
        if coarse == fine:
            return None
        small = nn.functional.interpolate(
            pixels.float(), (coarse[0] * patch[0], coarse[1] * patch[1]), mode="bicubic", antialias=True
        ).to(pixels.dtype)
        if name is None:
            return (small, *args[1:]), {**kwargs, **hook.extra}
        return args, {**kwargs, name: small, **hook.extra}

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, patch: BlockPatch, x: Tensor, args: tuple, kwargs: dict) -> Any:
        block, now = self.site.block, self.now
        if self.idle:
            stage = self.passing(patch, now, x, args, kwargs)
            return self.leave(patch, now, *self.own(patch, x, args, kwargs), stage, stage.count())
        stage = self.enter(patch, now, x, args, kwargs)
        removed = stage.plan[:, patch.index] if isinstance(stage.plan, Tensor) else stage.plan[patch.index]
        idle = not bool(removed.any()) if isinstance(removed, Tensor) else removed == 0
        if not idle or stage.total is not None or stage.front is not None:
            self.check_length(patch, x, stage)
            x = stage.narrow(x)
        if stage.total is None and idle:  # nothing has happened and nothing will: the block's own forward
            return self.leave(patch, now, *self.own(patch, x, args, kwargs), stage, stage.count())
        attended, before = stage.count(), x
        if not idle and "layer_keys" in self.method.needs:
            now.wanted, now.keys = patch, None
            if block.keys is not None:
                patch.listen()
        x = x + block.attend(patch.module, x, stage if stage.total is not None else None, args, kwargs)
        if not idle:
            if "layer_keys" in self.method.needs and block.project is not None:
                self.check_attention(patch)
                now.keys = block.project(patch.module, before)
            x, stage = self.reduce(patch, now, x, stage, removed)
        x = x + block.feed(patch.module, x)
        return self.leave(patch, now, x, (), stage, attended)

    def own(self, patch: BlockPatch, x: Tensor, args: tuple, kwargs: dict) -> tuple[Tensor, tuple]:
        """What the block's own forward gives: the tokens, and what comes beside them."""
        out = patch.original(x, *args, **kwargs)
        return (out[0], out[1:]) if self.site.block.wrapped else (out, ())

    def passing(self, patch: BlockPatch, now: Running, x: Tensor, args: tuple, kwargs: dict) -> CallState:
        """The state to report for a block that runs unmodified; blocks may run in any order, on any input."""
        stage = now.stage
        if patch.index == 0 or stage is None or stage.layer != patch.index:
            given = None if self.site.block.relative else self.site.block.mask(patch.module, x, args, kwargs)
            padding = None if given is None or tracer(x) else read(given, x, self.site.prefix)[0]
            stage = replace(self.fresh(now, x), mask=padding)
            stage = replace(stage, flow=((stage.count(), stage.count()),) * patch.index)
        return stage

    def fresh(self, now: Running, x: Tensor) -> CallState:
        site = self.site
        return CallState(0, site.prefix, x.shape[1], (), now.grid, x.new_empty(x.shape[0], 0), suffix=site.suffix)

    def check_length(self, patch: BlockPatch, x: Tensor, stage: CallState) -> None:
        if x.shape[:2] != (stage.batch, stage.length):
            raise InputError(
                f"block {patch.index} of {self.site.path or 'the model'} was given {x.shape[0]} x {x.shape[1]} tokens, "
                f"and {stage.batch} x {stage.length} came out of the block before it: vtc cannot tell tokens apart "
                "that come or go between blocks; call vtc.remove(model)"
            )

    def check_attention(self, patch: BlockPatch) -> None:
        """Raise if the attention was replaced, before keys are computed from its weights."""
        now = type(self.site.block.parts(patch.module)[0])
        if now is not patch.attention:
            raise InputError(
                f"block {patch.index} of {self.site.path or 'the model'} attends with a {now.__name__}, and did with a "
                f"{patch.attention.__name__} when vtc compressed it: compress it again"
            )

    def reduce(
        self, patch: BlockPatch, now: Running, x: Tensor, stage: CallState, removed: int | Tensor
    ) -> tuple[Tensor, CallState]:
        keys, now.keys, now.wanted = now.keys, None, None
        keys = keys if keys is None else keys[-stage.batch :]  # what was heard last
        if keys is None and "layer_keys" in self.method.needs:
            raise VTCError(
                f"block {patch.index} of {self.site.path or 'the model'} attended without showing its keys, which "
                f'{self.method.name} compares; please report the model, and use metric="hidden" where a method has it'
            )
        if stage.total is None:
            x, keys = stage.fronted(x), keys if keys is None else stage.fronted(keys)
        if not stage.maps:
            check_finite(x if keys is None else keys, f"tokens of {self.site.path or 'the model'}, layer {patch.index}")
        tokens = Tokens.of(
            features=x.detach(),
            layer_keys=keys,
            size=stage.size,
            mask=stage.mask,
            prefix=stage.prefix,
            grid=stage.grids if "grid" in self.method.needs else None,
            layer=patch.index,
            depth=len(self.site.blocks),
        )
        kind = x.device.type
        wide = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext(), wide:
            token_map = self.method.decide(tokens, removed)
        x = token_map.merge(x) if self.method.merges else token_map.gather(x)
        total = token_map if stage.total is None else stage.total.compose(token_map)
        mask = None if stage.mask is None else token_map.mask()
        size = token_map.size if self.method.merges or mask is not None else None
        carried = None
        if self.slot is not None:
            carried = members(total.drop_prefix(stage.prefix), self.slots).clamp(min=0)
        pairs = stage.pairs
        if pairs is not None:
            pairs = cut(pairs, token_map, self.method.merges, f"layer {patch.index} of {self.where}")
        fields = {"total": total, "size": size, "mask": mask, "pairs": pairs, "maps": (*stage.maps, token_map)}
        return x, stage.changed(**fields, carried=carried, slot=self.slot)

    def enter(self, patch: BlockPatch, now: Running, x: Tensor, args: tuple, kwargs: dict) -> CallState:
        stage = self.noted(patch, x) if recomputing() else None
        if stage is None and patch.index == 0:
            stage = self.begin(now, x, args, kwargs)
        elif stage is None:
            stage = now.stage
            if stage is None or stage.layer != patch.index:
                raise VTCError(
                    f"block {patch.index} of {self.site.path or 'the model'} ran without the blocks before it: "
                    "run the whole encoder, or call vtc.remove(model) to use its blocks one by one"
                )
        if rides(x):
            setattr(x.untyped_storage(), f"_vtc_{id(self)}", (self, stage, x.shape, x._version))
        return stage

    def noted(self, patch: BlockPatch, x: Tensor) -> CallState | None:
        """The state that belongs to x in a recomputing backward pass (activation checkpointing), where the latest state
        may be another call's. The block gets the same storage again, to which the state was attached; None if that
        storage was written to since, or x is another tensor."""
        note = getattr(x.untyped_storage(), f"_vtc_{id(self)}", None) if rides(x) else None
        if note is None:
            return None
        tower, stage, shape, version = note
        same = tower is self and stage.layer == patch.index and shape == x.shape and version == x._version
        return stage if same else None

    def begin(self, now: Running, x: Tensor, args: tuple, kwargs: dict) -> CallState:
        room, now.room = now.room, None
        depth = len(self.site.blocks)
        refuse_traced(x)
        what = changed(self.place, self.site.blocks)
        if what:
            raise InputError(
                f"the blocks of {self.where} changed since vtc compressed them ({what}): compress it again"
            )
        if kwargs.get("is_causal"):
            raise InputError(
                "is_causal=True: a causal encoder cannot lose tokens; call it without, or vtc.remove(model)"
            )
        if self.site.block.wrapped and kwargs.get("output_attentions"):
            raise InputError("output_attentions=True: layers that lose tokens have no attention map to give")
        prefix = self.site.prefix
        patches = x.shape[1] - prefix
        stage = self.fresh(now, x)
        given = None if self.site.block.relative else self.site.block.mask(self.site.blocks[0], x, args, kwargs)
        if given is not None and self.site.suffix:
            raise InputError(f"{self.where} has tokens behind its patches, and vtc does not cut masks over these")
        if now.resized is not None:
            if given is not None:
                raise InputError(f'{self.method.name}: an attention mask is of one size; use mode="pool", or pass none')
            return self.begin_resized(now, x, stage)
        padding, pairs = read(given, x, prefix)
        if padding is not None:
            if "grid" in self.method.needs and stage.grid is None:
                raise InputError(f"{self.method.name} needs all patches of each image, row by row, and padding behind")
            plans = [self.plan(int(n) - prefix) for n in padding.sum(1)]
            each = torch.tensor(plans, device=x.device).view(-1, depth)
            return replace(stage, plan=each, mask=padding, size=padding.float())
        plan = self.plan(patches)
        if any(plan):
            self.check_patches(stage, patches, room if now.open else None)
        return replace(stage, plan=plan, pairs=pairs)

    def check_patches(self, stage: CallState, patches: int, room: tuple[int, int] | None) -> None:
        """Raise if there are more tokens than patches. `room`: how many patches were cut from an image, and from all
        images."""
        if room is not None and patches > room[0] and stage.batch * patches > room[1]:
            raise InputError(
                f"{stage.entry} tokens of an image reached {self.where}, more than its {room[0]} patches and "
                f"{stage.prefix} prefix tokens: vtc would take the others (prompts, queries) for patches; call "
                "vtc.remove(model)"
            )
        if "grid" in self.method.needs and (stage.grid is None or any(h * w != patches for h, w in stage.grid)):
            raise InputError(
                f"{self.method.name} needs all patches of the image, but {patches} of the grid {stage.grid} reached "
                "the encoder: switch masking or patch dropout off, or use a method that needs no grid"
            )

    def plan(self, patches: int) -> tuple[int, ...]:
        if torch.compiler.is_compiling():  # the graph contains the plan, which should not depend on the cache
            return per_layer(self.method, patches, len(self.site.blocks), self.site.macs)
        if patches not in self.plans:
            self.plans[patches] = per_layer(self.method, patches, len(self.site.blocks), self.site.macs)
        return self.plans[patches]

    def begin_resized(self, now: Running, x: Tensor, stage: CallState) -> CallState:
        assert now.resized is not None
        (fine, coarse), now.resized = now.resized, None
        batch, entry = x.shape[0], fine[0] * fine[1] + stage.prefix
        front = pool_map(entry, (fine,) * batch, [coarse] * batch, stage.prefix, device=x.device)
        if front.slots != x.shape[1]:
            raise VTCError(
                f"resized to {coarse[0]}x{coarse[1]} patches, but {x.shape[1] - stage.prefix} reached the encoder; "
                'use mode="pool"'
            )
        return replace(stage, plan=(0,) * len(self.site.blocks), front=front)

    def leave(self, patch: BlockPatch, now: Running, x: Tensor, more: tuple, stage: CallState, attended: Any) -> Any:
        last = patch.index + 1 == len(self.site.blocks)
        # the model works on this output, or other code reads it
        wide = last or now.wide or self.site.between or bool(patch.module._forward_hooks)
        stage = stage.changed(layer=patch.index + 1, wide=wide, flow=(*stage.flow, (attended, stage.count())))
        if wide:
            x = stage.widen(x, 0 if self.method.merges else "nearest")
        if last:
            self.finish(now, stage)
        else:
            now.stage = stage
        return (x, *more) if self.site.block.wrapped else x

    def finish(self, now: Running, stage: CallState) -> None:
        now.stage, now.ended = None, stage
        if not recomputing() and not torch.compiler.is_exporting():  # which runs it on stand-ins
            self.stage, self.idle_calls = stage, 0
        if not torch.compiler.is_compiling():
            self.turn = time.monotonic_ns()
