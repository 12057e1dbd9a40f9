"""One file per way of laying out image tokens. `FAMILIES` is the registry."""

from __future__ import annotations

from vtc.adapters.multimodal.families.base import Family
from vtc.adapters.multimodal.families.llava import Llava, PaliGemma
from vtc.adapters.multimodal.families.llava_next import Granite4Vision, LlavaNext, LlavaOnevision
from vtc.adapters.multimodal.families.pooled import Gemma3, Idefics3, InternVL
from vtc.adapters.multimodal.families.qwen_vl import QwenVL

FAMILIES: dict[str, Family] = {
    family.name: family()
    for family in (Llava, LlavaNext, LlavaOnevision, Granite4Vision, QwenVL, InternVL, Idefics3, Gemma3, PaliGemma)
}
