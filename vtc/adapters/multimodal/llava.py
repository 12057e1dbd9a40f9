"""LLaVA-1.5 and what is built like it: one square grid of patches per image, a projector that keeps their number."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtc.adapters.multimodal.family import Family


class Llava(Family):
    name = "llava"
    covers = "LLaVA-1.5 and other LlavaForConditionalGeneration with CLIP, SigLIP or DINOv2 towers"
    classes = ("LlavaModel",)
    in_tower = ""


class PaliGemma(Family):
    name = "paligemma"
    covers = "PaliGemma, PaliGemma 2"
    classes = ("PaliGemmaModel",)
    in_tower = ""

    def positions(self, inner: Any, call: dict[str, Any], past: int, embeds: Tensor) -> Tensor:
        return super().positions(inner, call, past, embeds) + 1  # its positions start at 1
