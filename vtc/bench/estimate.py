"""What a multimodal LLM's visual tokens cost, from its configuration alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from vtc.adapters.multimodal.families.prompts import TEXT, picture
from vtc.bench.prefill import site_of
from vtc.macs import decoder_macs

KEEPS = (1.0, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Estimate:
    """A typical prompt: one image, 32 words.

    Attributes:
        size, visual, prompt: the image's size in pixels, its tokens, and all tokens with the text.
        kv_bytes: bytes of one token in the cache, all layers; dtype: its dtype.
        macs: multiply-adds of the decoder's prefill by keep.
    """

    size: tuple[int, int]
    visual: int
    prompt: int
    kv_bytes: int
    dtype: str
    macs: dict[float, int]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "macs": {f"{keep:g}": count for keep, count in self.macs.items()}}

    def __str__(self) -> str:
        high, wide = self.size
        whole = self.macs[1.0]
        left = ", ".join(f"{keep:g}: {count / 1e12:.2f} T ({count / whole:.0%})" for keep, count in self.macs.items())
        return (
            f"A typical image of {high} x {wide} pixels: {self.visual} visual tokens, {self.prompt} with the text "
            f"around them\nKV cache: {self.kv_bytes / 1e3:.1f} kB per visual token in {self.dtype}, "
            f"{self.visual * self.kv_bytes / 1e6:.1f} MB for the image\nMultiply-adds of the decoder's prefill at "
            f"keep {left}"
        )


def estimate(config: Any, model: Any) -> Estimate | None:
    """For a model that vtc can reduce, with or without weights. None if its prompts or layers are of an unknown
    kind."""
    found = picture(config)
    if found is None:
        return None
    inside = site_of(model)
    decoder = getattr(inside.inner, inside.family.decoder)
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    prompt = 1 + found.tokens + TEXT
    try:
        values = sum(
            m.k_proj.out_features + m.v_proj.out_features
            for layer in decoder.layers
            for m in layer.modules()
            if hasattr(m, "k_proj") and hasattr(m, "v_proj")
        )
        gone = {keep: found.tokens - max(1, round(keep * found.tokens)) for keep in KEEPS}
        macs = {keep: decoder_macs(decoder, prompt - less) for keep, less in gone.items()}
    except (AttributeError, StopIteration):  # projections of another kind
        return None
    return Estimate(found.size, found.tokens, prompt, values * dtype.itemsize, str(dtype).removeprefix("torch."), macs)
