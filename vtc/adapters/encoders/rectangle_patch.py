"""Runs a method in front of one block of an encoder that needs a rectangle of tokens.

Every block gives its tokens at full length, as whoever reads them may expect (a neck, a pyramid of features, hooks);
the next takes from the full grid those that stay: the others are copies, so that nothing is lost on the way.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.encoders.block_patch import BlockPatch
from vtc.adapters.encoders.guard import recomputing
from vtc.adapters.encoders.patch import EncoderPatch
from vtc.adapters.encoders.state import CallState, Running
from vtc.adapters.report import Report
from vtc.adapters.tracing import rides
from vtc.checks import check_finite
from vtc.errors import InputError
from vtc.layout import Grid
from vtc.macs import WindowMACs
from vtc.tokens import Tokens


class RectanglePatch(EncoderPatch):
    """One patched encoder whose blocks run on rectangles, whole: what they do with one of another size (windows cut
    anew and padded, tables of relative positions stretched) is their own business."""

    def report(self, several: str = "") -> Report:
        stage, costs = self.stage, self.site.macs
        assert stage is not None and stage.grid is not None and isinstance(costs, WindowMACs)
        made = super().report(several)
        grid = stage.grid[0]
        few = self.few(grid)
        grids = [few if stage.total is not None and i >= self.method.layer else grid for i in range(stage.layer)]  # type: ignore[attr-defined]
        notes = [made.notes] if made.notes else []
        notes += [f"{grid[0]}x{grid[1]} -> {few[0]}x{few[1]} rows and columns"] if few != grid else []
        return replace(
            made,
            before=(stage.entry,) * stage.batch,
            macs_before=stage.batch * costs.on([grid] * stage.layer, stage.entry),
            macs_after=stage.batch * costs.on(grids, stage.entry),
            notes="; ".join(notes),
        )

    def few(self, grid: Grid) -> Grid:
        """What stays of a grid."""
        return self.method.coarse(grid)  # type: ignore[attr-defined]

    def plan(self, patches: int) -> tuple[int, ...]:
        grid = self.now.grid
        if grid is None:
            raise InputError(f"{self.where} was given tokens that were not cut from an image: no rows and columns")
        few, planned = self.few(grid[0]), [0] * len(self.site.blocks)
        planned[self.method.layer] = grid[0][0] * grid[0][1] - few[0] * few[1]  # type: ignore[attr-defined]
        return tuple(planned)

    def run(self, patch: BlockPatch, x: Tensor, args: tuple, kwargs: dict) -> Any:
        now, whole = self.now, x
        x = self.rows(whole)
        if self.idle:
            stage = self.passing(patch, now, x, (), {})
        else:
            stage = (self.noted(patch, whole) if recomputing() else None) or self.enter(patch, now, x, args, kwargs)
            if rides(whole):  # what a checkpoint holds
                setattr(whole.untyped_storage(), f"_vtc_{id(self)}", (self, stage, whole.shape, whole._version))
        removed = stage.plan[patch.index] if stage.plan else 0
        if removed or stage.total is not None:
            if self.site.block.wrapped and args and args[0] is True:
                raise InputError("output_attentions=True: layers that lose tokens have no attention map to give")
            self.check_length(patch, x, stage)
            x = stage.narrow(x)
        if removed:
            x, stage = self.merged(patch, x, stage)
        if stage.total is None:  # nothing has happened yet: the block's own forward
            out = patch.original(whole, *args, **kwargs)
            self.leave(patch, now, x, (), stage, stage.count())
            return out
        assert stage.grid is not None
        out = patch.original(self.folded(x, self.few(stage.grid[0])), *args, **kwargs)
        first, more = (out[0], out[1:]) if self.site.block.wrapped else (out, ())
        out = self.leave(patch, now, self.rows(first), more, stage, stage.count())
        if self.site.block.wrapped:
            return (self.folded(out[0], stage.grid[0]), *out[1:])
        return self.folded(out, stage.grid[0])

    def merged(self, patch: BlockPatch, x: Tensor, stage: CallState) -> tuple[Tensor, CallState]:
        check_finite(x, f"tokens of {self.where}, layer {patch.index}")
        tokens = Tokens.of(features=x.detach(), grid=stage.grids, layer=patch.index, depth=len(self.site.blocks))
        kind = x.device.type
        wide = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with torch.no_grad(), wide:
            token_map = self.method.decide(tokens, int(stage.plan[patch.index]))
        x = self.method.merged(x, token_map)  # type: ignore[attr-defined]
        return x, stage.changed(total=token_map, maps=(token_map,), wide=False)

    def begin(self, now: Running, x: Tensor, args: tuple, kwargs: dict) -> CallState:
        if now.grid is not None and any(rows * columns != x.shape[1] for rows, columns in now.grid):
            raise InputError(
                f"{self.method.name} needs all patches of the image, but {x.shape[1]} of the grid {now.grid} reached "
                f"{self.where}"
            )
        return super().begin(now, x, args, kwargs)

    # -- rows of tokens [B, N, C] and rectangles ----------------------------------------------------------------------

    def rows(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise InputError(f"a block of {self.where} was given {list(x.shape)}, not a rectangle of tokens")
        return (x if self.site.rectangle == "last" else x.permute(0, 2, 3, 1)).flatten(1, 2)

    def folded(self, x: Tensor, grid: Grid) -> Tensor:
        x = x.unflatten(1, grid)
        return x if self.site.rectangle == "last" else x.permute(0, 3, 1, 2)
