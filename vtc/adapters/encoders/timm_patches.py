"""How timm's models cut an image into patches: by one convolution, a network (hybrids), or a Linear on patches that the
caller has cut (NaFlex)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.encoders.copies import bare_copy, on_meta
from vtc.layout import Grid


@dataclass(frozen=True)
class Cut:
    """What was found.

    Attributes:
        module: its output shows how many patches there are.
        weights: how many are applied to each patch; image: one of the size the model was made for, on the meta device.
        naflex: the module that is given patches and their places; fixed: why it takes no smaller image, or "".
    """

    module: nn.Module
    weights: int
    image: Tensor
    naflex: nn.Module | None = None
    fixed: str = ""


def look(model: Any) -> Cut | str:
    """How `model` cuts its images, or why vtc does not know."""
    embed: Any = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    cuts: Any = getattr(embed, "proj", None)
    network = getattr(embed, "backbone", None)
    if isinstance(network, nn.Module):
        image = _image(embed, next(module for module in network.modules() if isinstance(module, nn.Conv2d)))
        fixed = f"its patches come out of a network ({type(network).__name__}), not straight out of the image"
        return Cut(cuts, _network_weights(embed, image), image, fixed=fixed)
    if isinstance(cuts, nn.Linear) and hasattr(embed, "dynamic_feat_size"):
        image = torch.empty(1, embed.in_chans, *(4 * step for step in embed.patch_size), device="meta")
        weights = cuts.in_features * cuts.out_features
        return Cut(
            cuts, weights, image.to(cuts.weight.dtype), embed, "it takes images of any size: give it smaller ones"
        )
    if not isinstance(cuts, nn.Conv2d):
        return "it does not cut images into patches with one convolution"
    fixed = "its positions are fixed: create the model with dynamic_img_size=True"
    return Cut(
        cuts,
        cuts.weight.numel(),
        _image(embed, cuts),
        fixed="" if getattr(model, "dynamic_img_size", False) else fixed,
    )


def _image(embed: Any, first: nn.Conv2d) -> Tensor:
    size = getattr(embed, "img_size", None) or tuple(4 * step for step in first.stride)
    return torch.empty(1, first.in_channels, *size, dtype=first.weight.dtype, device="meta")


def _network_weights(embed: Any, image: Tensor) -> int:
    """The layers of a network work at several resolutions: a copy counts how often each is applied."""
    counts: list[int] = []
    grids: list[int] = []

    def count(module: Any, args: tuple, output: Tensor) -> None:
        weights = module.in_channels // module.groups * module.out_channels * math.prod(module.kernel_size)
        counts.append(output[0, 0].numel() * weights)

    copied = bare_copy(embed, on_meta)
    for module in copied.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    copied.proj.register_forward_hook(lambda module, args, output: grids.append(output[0, 0].numel()))
    with torch.no_grad():
        copied(image)
    return round(sum(counts) / grids[-1])


def naflex_grids(embed: Any, args: tuple, kwargs: dict) -> tuple[Grid, ...] | None:
    """Of images, or of patches whose (row, column) the caller gives: None if those are not all of a grid, row by row,
    with padding behind."""
    given = {**dict(zip(("x", "patch_coord", "patch_valid"), args, strict=False)), **kwargs}
    x, places, real = given["x"], given.get("patch_coord"), given.get("patch_valid")
    if places is None:
        rows, columns = embed.dynamic_feat_size(x.shape[-2:])
        return ((rows, columns),) * x.shape[0]
    found = []
    for at, count in zip(
        places, [places.shape[1]] * len(places) if real is None else real.sum(1).tolist(), strict=True
    ):
        rows, columns = (int(size) + 1 for size in at[:count].amax(0))
        whole = torch.cartesian_prod(*(torch.arange(size, device=at.device) for size in (rows, columns)))
        if not torch.equal(at[:count], whole.to(at.dtype)):
            return None
        found.append((rows, columns))
    return tuple(found)
