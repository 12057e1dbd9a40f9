"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images of any size packed in one row, 2x2 patches per token, positions on three
axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.multimodal.families import qwen_patches
from vtc.adapters.multimodal.families.base import IMAGE, READ, VIDEO, Family, Modality, Projection, Shorter, axes_of
from vtc.layout import Grid, Layout, Unit


def _merge(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.reshape(-1, x.shape[-1])).view(*x.shape[:-2], -1)


class QwenTower(Family):
    """The tower of Qwen's line, which has put the patches of a token side by side."""

    middle = 0.5

    def windows(self, inner: Any, grid: Tensor) -> Tensor | None:
        """The order into which window attention has put the tokens (Qwen2.5-VL); None = raster order."""
        if not hasattr(inner.visual, "window_size"):
            return None
        from transformers.vision_utils import get_vision_window_index

        visual = inner.visual
        index, _ = get_vision_window_index(
            grid,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        return index.argsort()

    def tower(self, inner: Any) -> nn.Module:
        return inner.visual

    def feature_layer(self, inner: Any) -> int:
        return -1

    def prefix(self, inner: Any, call: dict[str, Any]) -> int:
        return 0

    def segments(self, inner: Any, modality: Modality, call: dict[str, Any]) -> list[int]:
        return [rows * columns for frames, rows, columns in told(modality, call).tolist() for _ in range(frames)]

    def projector(self, inner: Any) -> nn.Module:
        return inner.visual.merger

    def projection(self, inner: Any) -> Projection:
        return Projection(self.projector(inner), _merge)

    def blocks(self, inner: Any, seen: Tensor, modality: Modality, call: dict[str, Any]) -> Tensor:
        return seen.reshape(-1, self.patches_per_token(inner), seen.shape[-1])

    def patches_per_token(self, inner: Any) -> int:
        return inner.visual.spatial_merge_size**2


class QwenVL(QwenTower):
    """The budget is per image, and in a video per pair of frames, as the model pairs them."""

    name = "qwen_vl"
    covers = "Qwen2-VL, Qwen2.5-VL, Qwen3-VL (DeepStack included), images and video"
    classes = ("Qwen2VLModel", "Qwen2_5_VLModel", "Qwen3VLModel")
    modalities = (IMAGE, VIDEO)
    evidence = READ

    def layout(self, inner: Any, modality: Modality, lengths: list[int], call: dict[str, Any]) -> Layout:
        units, start, edge = [], 0, inner.visual.spatial_merge_size
        for item, (frames, rows, columns) in enumerate(told(modality, call).tolist()):
            grid = (rows // edge, columns // edge)
            for _ in range(frames):
                units.append(Unit(torch.arange(start, start + grid[0] * grid[1]), item, grid))
                start += grid[0] * grid[1]
        return Layout(tuple(units), self.windows(inner, told(modality, call)))

    def streams(self, inner: Any) -> str:
        return "frame" if type(inner).__name__ == "Qwen3VLModel" else "video"  # there, times lie between the frames

    def pixels(self, modality: Modality, call: dict[str, Any]) -> Tensor:
        """As the processor has scaled them, of both frames of a pair."""
        count = sum(rows * columns * frames for frames, rows, columns in told(modality, call).tolist())
        return call[modality.pixels].reshape(count, -1)

    def before_tower(self, inner: Any) -> str:
        return qwen_patches.refuses(inner.visual)

    def image_std(self, inner: Any) -> tuple[float, float, float]:
        return qwen_patches.image_std(inner.visual)

    def cells(
        self, inner: Any, pixels: Tensor, modality: Modality, call: dict[str, Any]
    ) -> list[tuple[Tensor, Grid, bool]]:
        """A token's patches lie side by side, each with its channels, and of each channel the frames of a pair."""
        edge, found, start = inner.visual.spatial_merge_size, [], 0
        for frames, rows, columns in told(modality, call).tolist():
            for _ in range(frames):
                part = pixels[start : start + rows * columns]
                part = part.view(-1, edge**2, 3, part.shape[-1] // 3).transpose(1, 2).flatten(2)
                found.append((part, (rows // edge, columns // edge), frames == 1))
                start += rows * columns
        return found

    def shorter(self, inner: Any, modality: Modality, call: dict[str, Any], kept: Tensor) -> Shorter:
        return qwen_patches.shorter(inner.visual, told(modality, call), kept)

    def positions(self, inner: Any, call: dict[str, Any], past: int, embeds: Tensor) -> Tensor:
        found = axes_of(inner, call, embeds)
        return super().positions(inner, call, past, embeds).expand(3, -1, -1) if found is None else found


def told(modality: Modality, call: dict[str, Any]) -> Tensor:
    """[items, 3]: frames, rows and columns of patches."""
    return call[f"{modality.name}_grid_thw"]
