"""The towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL on some of an image's patches, at their places in the whole image."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.multimodal.families.base import Shorter
from vtc.adapters.multimodal.kinds import foreign, known_as
from vtc.macs import linear_weights, packed_macs

# The towers, and by what their processors divide the channels of an image.
_CLIP, _HALF = (0.26862954, 0.26130258, 0.27577711), (0.5, 0.5, 0.5)
_TOWERS = {
    "Qwen2VisionTransformerPretrainedModel": _CLIP,
    "Qwen2_5_VisionTransformerPretrainedModel": _CLIP,
    "Qwen3VLVisionModel": _HALF,
}


def refuses(tower: Any) -> str:
    """Why a tower cannot run on some of its patches; "" = it can."""
    name = known_as(tower, _TOWERS)
    if not name or foreign(tower, name):
        return f"its tower ({type(tower).__name__}) is none of transformers' own, whose tables vtc knows how to shorten"
    from transformers import vision_utils

    if "kwargs" not in inspect.signature(vision_utils.get_vision_cu_seqlens).parameters:
        return "this version of transformers lets nobody hand its towers positions and lengths: update it"
    return ""


def image_std(tower: Any) -> tuple[float, float, float]:
    """By what the family's processor divides each channel."""
    return _TOWERS[known_as(tower, _TOWERS)]


def shorter(tower: Any, grid: Tensor, kept: Tensor) -> Shorter:
    """What `tower` needs to know to run on the tokens `kept` [n] bool alone, out of images of grid [items, 3]: the
    whole images' tables, cut."""
    from transformers import vision_utils as tables

    unit = tower.spatial_merge_size**2
    device, grid, kept = grid.device, grid.cpu(), kept.cpu()
    patches = kept.repeat_interleave(unit)
    frames = [rows * columns for times, rows, columns in grid.tolist() for _ in range(times)]
    lengths = [int(part.sum()) for part in patches.split(frames)]
    given: dict[str, Tensor] = {
        "position_ids": tables.get_vision_position_ids(grid, tower.spatial_merge_size)[patches],
        "cu_seqlens": _edges(lengths),
    }
    windows, source = (frames, lengths), None
    if hasattr(tower, "pos_embed"):
        index, weight = tables.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=getattr(tower, "interpolation_mode", "bilinear"),
            align_corners=getattr(tower, "interpolation_align_corners", True),
            spatial_merge_size=tower.spatial_merge_size,
        )
        given |= {"interp_indices": index[patches], "interp_weights": weight[patches]}
    if hasattr(tower, "window_size"):
        order, edges = tables.get_vision_window_index(
            grid,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        sizes = edges.diff().tolist()
        inside = kept[order]  # a window keeps those of its tokens that stay, in its own order
        left = [int(part.sum()) * unit for part in inside.split([size // unit for size in sizes])]
        place = kept.cumsum(0) - 1
        index = place[order[inside]]
        given |= {"window_index": index, "cu_window_seqlens": _edges([n for n in left if n])}
        windows, source = (sizes, left), index.argsort()
    macs = (_macs(tower, frames, windows[0]), _macs(tower, lengths, windows[1]))
    return Shorter(patches, {name: x.to(device) for name, x in given.items()}, lengths, source, macs)


def _macs(tower: Any, frames: list[int], windows: list[int]) -> int:
    """Multiply-adds of `tower` on images or frames, and windows, of so many patches."""
    whole = getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
    lengths = [frames if number in whole else windows for number in range(len(tower.blocks))]
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
    tokens = sum(frames) // tower.spatial_merge_size**2
    ends = sum(frames) * tower.patch_embed.proj.weight.numel() + tokens * sum(map(linear_weights, mergers))
    attention = tower.blocks[0].attn
    return ends + packed_macs(tower.blocks, attention.num_heads * attention.head_dim, lengths)


def _edges(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
