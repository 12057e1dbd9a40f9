"""Vision encoders in a model, by library."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from vtc.adapters.encoders import open_clip, timm
from vtc.adapters.encoders import transformers as huggingface
from vtc.adapters.encoders.site import EncoderSite, Refusal

ADAPTERS = {adapter.name: adapter for adapter in (timm, open_clip, huggingface)}


def find(model: nn.Module) -> Iterator[tuple[str, EncoderSite | Refusal]]:
    """(adapter name, encoder or refusal) for everything in `model` that an adapter knows."""
    for name, adapter in ADAPTERS.items():
        for found in adapter.find(model):
            yield name, found
