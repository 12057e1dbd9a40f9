"""LLaVA-1.5 and models built like it: one grid of patches per image, a projector that keeps their number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.adapters.multimodal.families.base import Family, Modality
from vtc.layout import Grid


class Llava(Family):
    """Pixtral's tower takes images of any size, padded to a batch, and packs their patches into one row."""

    name = "llava"
    covers = "LLaVA-1.5 and other LlavaForConditionalGeneration with CLIP, SigLIP, DINOv2 or Pixtral towers"
    classes = ("LlavaModel",)
    passed = frozenset({"image_sizes", "interpolate_pos_encoding"})
    in_tower = ""

    def lengths(self, inner: Any, modality: Modality, features: list[int], call: dict[str, Any]) -> list[int]:
        own = self.segments(inner, modality, call)
        return own if own and sum(own) == sum(features) else features

    def grids(self, inner: Any, modality: Modality, call: dict[str, Any]) -> list[Grid]:
        sizes, patch = call.get("image_sizes"), self.patch(inner)
        if sizes is None or patch is None:
            return super().grids(inner, modality, call)
        return [(int(high) // patch[0], int(wide) // patch[1]) for high, wide in torch.as_tensor(sizes).tolist()]

    def segments(self, inner: Any, modality: Modality, call: dict[str, Any]) -> list[int] | None:
        if getattr(self.tower(inner).config, "model_type", "") != "pixtral":
            return None
        return [rows * columns for rows, columns in self.grids(inner, modality, call)]


class PaliGemma(Family):
    name = "paligemma"
    covers = "PaliGemma, PaliGemma 2"
    classes = ("PaliGemmaModel",)
    in_tower = ""

    def positions(self, inner: Any, call: dict[str, Any], past: int, embeds: Tensor) -> Tensor:
        return super().positions(inner, call, past, embeds) + 1  # its positions start at 1
