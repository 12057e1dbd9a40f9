"""LLaVA-NeXT, LLaVA-OneVision and Granite 4 Vision: images in crops, stitched together, cut to the image's shape, with
newline tokens."""

from __future__ import annotations

import math
from fractions import Fraction
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.multimodal.families.base import IMAGE, VIDEO, Family, Modality
from vtc.errors import VTCError
from vtc.layout import Layout, Unit

_NEWLINE = -1.0


class LlavaNext(Family):
    """The budget is per crop, and the base image counts as one; newline tokens always stay."""

    name = "llava_next"
    covers = "LLaVA-NeXT (1.6)"
    classes = ("LlavaNextModel",)
    in_tower = ""

    def layout(self, inner: Any, modality: Modality, lengths: list[int], call: dict[str, Any]) -> Layout:
        if modality == VIDEO:
            return self.frames(inner, lengths, call)
        side, crops = self.side(inner), self.crops(inner, call)
        packed = self.pack(inner, [_coordinates(count, side, grid) for count, grid in crops], call)
        units: list[Unit] = []
        sources: list[Tensor] = []
        start = first = 0
        for item, (trace, length, (count, grid)) in enumerate(zip(packed, lengths, crops, strict=True)):
            if len(trace) != length:
                raise VTCError(
                    f"image {item} has {length} tokens, but {len(trace)} by its size: {type(inner).__name__} lays its "
                    "images out in a way that vtc does not know; vtc.remove(model) takes the patch off"
                )
            base, row, column = trace.float().round().long().cpu().unbind(1)
            crop = torch.where(base == 0, 1 + row // side * grid[1] + column // side, 0).masked_fill(base < 0, -1)
            inside = row % side * side + column % side
            sources.append(torch.where(crop < 0, -1, (first + crop) * side * side + inside))
            for index in range(count):
                at = (crop == index).nonzero().flatten()
                if len(at):
                    height, width = row[at].unique().numel(), column[at].unique().numel()
                    units.append(Unit(start + at, item, (height, width) if height * width == len(at) else None))
            start += length
            first += count
        return Layout(tuple(units), torch.cat(sources))

    def side(self, inner: Any) -> int:
        """Tokens along a crop's side."""
        return inner.config.vision_config.image_size // inner.config.vision_config.patch_size

    def crops(self, inner: Any, call: dict[str, Any]) -> list[tuple[int, tuple[int, int]]]:
        """(number of crops with the base image, their rows and columns) of every image."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        config = inner.config
        found = []
        for size in call["image_sizes"]:
            rows, columns = get_anyres_image_grid_shape(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            found.append((1 + int(rows) * int(columns), (int(rows), int(columns))))
        return found

    def pack(self, inner: Any, crops: list[Tensor], call: dict[str, Any]) -> list[Tensor]:
        """The model's own packing, applied to coordinates instead of features: it shows where every token comes
        from."""
        return inner.pack_image_features(
            crops,
            call["image_sizes"],
            vision_feature_select_strategy="full",
            image_newline=torch.full((3,), _NEWLINE),
        )[0]

    def frames(self, inner: Any, lengths: list[int], call: dict[str, Any]) -> Layout:
        raise NotImplementedError


class LlavaOnevision(LlavaNext):
    """In addition: large images whose stitched crops are resized, and video, as frames of pooled patches and one
    newline."""

    name = "llava_onevision"
    covers = "LLaVA-OneVision, images and video"
    classes = ("LlavaOnevisionModel",)
    modalities = (IMAGE, VIDEO)
    ignored = frozenset({"vision_aspect_ratio"})
    in_tower = "its tokens are resized between the tower and the decoder"

    def crops(self, inner: Any, call: dict[str, Any]) -> list[tuple[int, tuple[int, int]]]:
        found = super().crops(inner, call)
        numbers = call.get("batch_num_images")
        if numbers is None:
            return found
        alone = [n == 1 for n in numbers for _ in range(int(n))]
        return [crops if patched else (1, (1, 1)) for crops, patched in zip(found, alone, strict=True)]

    def pack(self, inner: Any, crops: list[Tensor], call: dict[str, Any]) -> list[Tensor]:
        return inner.pack_image_features(
            crops,
            call["image_sizes"],
            image_newline=torch.full((3,), _NEWLINE),
            vision_aspect_ratio=inner.config.vision_aspect_ratio,
        )[0]

    def trailing(self, inner: Any, modality: Modality) -> int:
        """The newline after a video: until transformers 5.18 or later it was not part of the features."""
        return int(modality == VIDEO and VIDEO.pixels not in signature(type(inner).get_video_features).parameters)

    def frames(self, inner: Any, lengths: list[int], call: dict[str, Any]) -> Layout:
        newline = 1 - self.trailing(inner, VIDEO)
        frames = call[VIDEO.pixels].shape[1]
        side = self.side(inner)
        coarse = math.ceil(side / 2)
        cells = torch.arange(coarse)
        near = torch.stack([(cells * 2).clamp(max=side - 1), (cells * 2 + 1).clamp(max=side - 1)], dim=1)
        members = near[:, None, :, None] * side + near[None, :, None, :]  # rows, columns, and the four patches
        members = members.reshape(coarse * coarse, 4)
        units, sources, start = [], [], 0
        for item, length in enumerate(lengths):
            for frame in range(frames):
                rows = torch.arange(coarse * coarse) + start + frame * coarse * coarse
                units.append(Unit(rows, item, (coarse, coarse)))
                sources.append(members + (item * frames + frame) * side * side)
            sources.append(torch.full((newline, 4), -1))
            start += length
        return Layout(tuple(units), torch.cat(sources))


class Granite4Vision(LlavaNext):
    """In addition: every crop is made smaller, and its features are several sets, each added in front of a layer of the
    decoder. Methods decide by the first set."""

    name = "granite4_vision"
    covers = "Granite 4 Vision, methods that read the tokens alone"
    classes = ("Granite4VisionModel",)
    proven = False
    evidence = frozenset()
    in_tower = "its features come from several layers of the tower"

    def side(self, inner: Any) -> int:
        return int(super().side(inner) * Fraction(inner.config.downsample_rate))

    def pack(self, inner: Any, crops: list[Tensor], call: dict[str, Any]) -> list[Tensor]:
        newline = torch.full((3,), _NEWLINE)
        return inner.pack_image_features(crops, call["image_sizes"], "full", image_newline=newline)

    def pooled(self, output: Any) -> Any:
        sets = getattr(output, "deepstack_features", None)
        return None if sets is None else sets[0][1]

    def projector(self, inner: Any) -> nn.Module:
        return inner.layerwise_projectors[0]


def _coordinates(count: int, side: int, grid: tuple[int, int]) -> Tensor:
    """[crops, side * side, 3]: for every patch whether it belongs to the base image, its row and its column. In the
    other crops row and column are those of the stitched image, so that a resized token lies between the patches it is
    made from."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack([torch.ones(side * side), row.flatten(), column.flatten()], dim=1)
    crops = [place]
    for index in range(count - 1):
        shift = torch.tensor([-1, index // grid[1] * side, index % grid[1] * side])
        crops.append(place + shift)
    return torch.stack(crops)
