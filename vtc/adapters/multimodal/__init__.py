"""Multimodal LLMs of transformers: one file per way of laying out image tokens. `FAMILIES` is the registry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtc.adapters.multimodal.anyres import LlavaNext, LlavaOnevision
from vtc.adapters.multimodal.family import Family
from vtc.adapters.multimodal.llava import Llava, PaliGemma
from vtc.adapters.multimodal.pooled import Gemma3, Idefics3, InternVL
from vtc.adapters.multimodal.qwen_vl import QwenVL
from vtc.adapters.site import Refusal

FAMILIES: dict[str, Family] = {
    family.name: family()
    for family in (Llava, LlavaNext, LlavaOnevision, QwenVL, InternVL, Idefics3, Gemma3, PaliGemma)
}


@dataclass(frozen=True)
class Gate:
    """One multimodal model that was found: the part without language head, and the models around it that have one."""

    path: str
    family: Family
    inner: Any
    owners: tuple[nn.Module, ...]


def find(model: nn.Module) -> Iterator[Gate | Refusal]:
    """Every multimodal LLM in `model`; those of unknown families as refusals."""
    known = {name: family for family in FAMILIES.values() for name in family.classes}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind in known:
            owners = tuple(
                owner
                for owner in model.modules()
                if owner._modules.get("model") is module and hasattr(owner, "lm_head")
            )
            yield Gate(path, known[kind], module, owners)
        elif hasattr(module, "get_placeholder_mask") and hasattr(module, "language_model"):
            families = "; ".join(family.covers for family in FAMILIES.values())
            yield Refusal(path, kind, f"no adapter for this multimodal family; there are {families}")


__all__ = ["FAMILIES", "Gate", "find"]
