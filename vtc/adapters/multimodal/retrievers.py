"""Models for retrieval by many vectors a page, ColPali and its kin: a decoder's hidden states, projected and multiplied
by the mask of the prompt.

The patch sits on their own forward, so that ids and mask are short before they are projected. Known are the classes of
transformers and those of colpali-engine, which are built on a multimodal model or hold one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.multimodal.families.base import IMAGE, Family, Modality, prompt
from vtc.adapters.multimodal.kinds import foreign, known_as
from vtc.errors import InputError


class Retriever:
    """A model that hands its call on to the multimodal model inside it, and projects what comes back.

    Attributes:
        module: the retrieval model. inner: the multimodal model without language head; `module` itself where that is
            built on it.
        bare: its output is the embeddings alone, and it takes no return_dict, as in colpali-engine.
    """

    def __init__(self, module: Any, inner: Any, bare: bool) -> None:
        self.module, self.inner, self.bare = module, inner, bare

    def pixels(self, call: dict[str, Any], modality: Modality) -> Tensor:
        """A call's pixels as the encoder takes them."""
        pixels: Tensor = call[modality.pixels]
        return pixels.to(self.module.dtype) if pixels.is_floating_point() else pixels

    def placed(self, family: Family, call: dict[str, Any], past: int) -> Tensor:
        """The positions of all of a call's columns, as the model inside gives them."""
        return family.placed(self.inner, call, past)

    def filled(self, call: dict[str, Any], features: Tensor) -> dict[str, Any]:
        """The call with the image features [n, C] of its placeholders, where the model does not ask its encoder for
        them."""
        return call


class Packed(Retriever):
    """Pixels come with a row for each image, as long as the longest: [B, patches, D] -> [all patches, D]."""

    def pixels(self, call: dict[str, Any], modality: Modality) -> Tensor:
        pixels: Tensor = call[modality.pixels]
        grid = call.get(f"{modality.name}_grid_thw")
        if grid is None or pixels.ndim < 3:
            return pixels
        lengths = (grid[:, 1] * grid[:, 2]).tolist()
        if len(lengths) != len(pixels) or max(lengths) > pixels.shape[1]:
            raise InputError(
                f"{modality.pixels} are {list(pixels.shape)}, and {modality.name}_grid_thw tells of {len(lengths)} "
                f"images of up to {max(lengths, default=0)} patches: give a row for each image, as the processor does"
            )
        return torch.cat([row[:length] for row, length in zip(pixels, lengths, strict=True)])


class Embedding(Packed):
    """ColQwen2 of transformers puts the features of its tower among the embeddings itself, and hands on these and no
    ids: positions count columns."""

    _OWN = ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")

    def pixels(self, call: dict[str, Any], modality: Modality) -> Tensor:
        if call.get("inputs_embeds") is not None:
            raise InputError(
                f"{type(self.module).__name__} leaves {modality.pixels} aside when inputs_embeds come with them: give "
                "input_ids"
            )
        return super().pixels(call, modality)

    def placed(self, family: Family, call: dict[str, Any], past: int) -> Tensor:
        given = prompt(call)
        embeds = self.inner.get_input_embeddings()(given) if given.ndim == 2 else given
        call = {name: value for name, value in call.items() if name not in self._OWN}
        return family.placed(self.inner, {**call, "inputs_embeds": embeds}, past)

    def filled(self, call: dict[str, Any], features: Tensor) -> dict[str, Any]:
        ids = call["input_ids"]
        embeds = self.inner.get_input_embeddings()(ids)
        places = (ids == getattr(self.inner.config, IMAGE.token))[..., None]
        embeds = embeds.masked_scatter(places, features.to(embeds.device, embeds.dtype))
        return {name: value for name, value in call.items() if name not in self._OWN} | {"inputs_embeds": embeds}


_TRANSFORMERS: dict[str, type[Retriever]] = {"ColPaliForRetrieval": Retriever, "ColQwen2ForRetrieval": Embedding}
_ENGINE: dict[str, type[Retriever]] = {
    **dict.fromkeys(("ColPali", "ColIdefics3", "ColGemma3"), Retriever),
    **dict.fromkeys(("ColQwen2", "ColQwen2_5", "ColQwen3"), Packed),
}


def retriever(module: nn.Module, inner: nn.Module) -> Retriever | str | None:
    """A module as a retrieval model around `inner`; None if it is none, or why it cannot be served."""
    for names, home in ((_TRANSFORMERS, "transformers"), (_ENGINE, "colpali_engine")):
        kind = known_as(module, names, home)
        if kind and foreign(module, kind):
            return f"{type(module).__name__} has a forward that is not that of {home}'s {kind}; use {kind} itself"
        if kind:
            return names[kind](module, inner, home == "colpali_engine")
    return None
