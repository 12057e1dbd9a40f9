"""InternVL, Idefics3, SmolVLM, Gemma 3: square images whose patches are folded or pooled into fewer tokens. The models
assume that the patches form a square; for an image that is not square, a token mixes patches from different places."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.multimodal.families.base import Family, Modality, Projection
from vtc.layout import Grid, Layout, Unit


class InternVL(Family):
    """The budget is per tile: the model does not see which tiles form an image."""

    name = "internvl"
    covers = "InternVL 2.5, 3 and 3.5 (the Hugging Face models)"
    classes = ("InternVLModel",)

    def folded(self, inner: Any, grid: Grid) -> Grid | None:
        return _shrunk(grid, round(1 / inner.config.downsample_ratio))

    def rows_per_image(self, inner: Any, patches: int) -> int:
        return int(patches * inner.config.downsample_ratio**2)

    def patches(self, inner: Any, count: int, rows: int) -> Tensor:
        side = math.isqrt(count)
        index = torch.arange(count).float().view(1, side, side, 1)  # the model's own shuffle, applied to patch numbers
        return inner.pixel_shuffle(index, scale_factor=inner.config.downsample_ratio).reshape(rows, -1).long()


def _shrunk(grid: Grid, factor: int) -> Grid | None:
    """The grid whose cells are `factor` x `factor` patches of `grid`; None unless `grid` is square and divisible by
    `factor`."""
    return (grid[0] // factor,) * 2 if grid[0] == grid[1] and grid[0] % factor == 0 else None


def _fold(module: nn.Module, x: Tensor) -> Tensor:
    return module.modality_projection(x.flatten(-2))  # type: ignore[operator]


class Pooled(Family):
    """The connector makes a token from several patches that are not adjacent in the tower's output."""

    def blocks(self, inner: Any, seen: Tensor, modality: Modality, call: dict[str, Any]) -> Tensor:
        members = self.patches(inner, seen.shape[1], self.rows_per_image(inner, seen.shape[1]))
        return seen[:, members.to(seen.device)].flatten(0, 1)


class Idefics3(Pooled):
    """The budget is per sub-image: each tile of an image, and the downscaled whole image."""

    name = "idefics3"
    covers = "Idefics3, SmolVLM, SmolVLM2"
    classes = ("Idefics3Model", "SmolVLMModel")
    decoder = "text_model"
    in_tower, copied = "", True

    def layout(self, inner: Any, modality: Modality, lengths: list[int], call: dict[str, Any]) -> Layout:
        # one length per prompt; its images follow one another and have the same size; all-zero images are left out
        grids = super().grids(inner, modality, call)
        tile = self.rows_per_image(inner, grids[0][0] * grids[0][1]) if grids else inner.image_seq_len
        grid = self.folded(inner, grids[0]) if grids else None
        rows = torch.arange(sum(lengths)).split(tile)
        return Layout(tuple(Unit(those, item, grid) for item, those in enumerate(rows)))

    def folded(self, inner: Any, grid: Grid) -> Grid | None:
        return _shrunk(grid, inner.connector.scale_factor)

    def tower(self, inner: Any) -> nn.Module:
        return inner.vision_model

    def projector(self, inner: Any) -> nn.Module:
        return inner.connector

    def projection(self, inner: Any) -> Projection:
        return Projection(inner.connector, _fold)

    def rows_per_image(self, inner: Any, patches: int) -> int:
        return patches // inner.connector.scale_factor**2

    def patches(self, inner: Any, count: int, rows: int) -> Tensor:
        index = torch.arange(count).float().view(1, count, 1)
        return inner.connector.pixel_shuffle(index, inner.connector.scale_factor)[0].long()


def _pool(module: nn.Module, x: Tensor) -> Tensor:
    normed = module.mm_soft_emb_norm(x.mean(-2))  # type: ignore[operator]
    return normed @ module.mm_input_projection_weight


class Gemma3(Pooled):
    name = "gemma3"
    covers = "Gemma 3"
    classes = ("Gemma3Model",)

    def projection(self, inner: Any) -> Projection:
        return Projection(inner.multi_modal_projector, _pool)

    def folded(self, inner: Any, grid: Grid) -> Grid:
        return (inner.multi_modal_projector.tokens_per_side,) * 2

    def rows_per_image(self, inner: Any, patches: int) -> int:
        return inner.multi_modal_projector.tokens_per_side**2

    def patches(self, inner: Any, count: int, rows: int) -> Tensor:
        projector = inner.multi_modal_projector
        side, coarse, edge = projector.patches_per_image, projector.tokens_per_side, projector.kernel_size
        cells = torch.arange(count).view(side, side)[: coarse * edge, : coarse * edge]  # the pooling ignores the rest
        return cells.reshape(coarse, edge, coarse, edge).permute(0, 2, 1, 3).reshape(rows, -1)
