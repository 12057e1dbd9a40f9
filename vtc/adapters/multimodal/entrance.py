"""Patches that leave before the vision tower: it runs on the others alone, at their places in the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.multimodal.families.base import IMAGE, Family, Modality, Shorter
from vtc.adapters.patch import Patch, forward_name
from vtc.checks import check_finite
from vtc.errors import InputError, VTCError


@dataclass(frozen=True)
class Left:
    """What left before the tower in one call of an encoder.

    Attributes:
        kept: [n] bool, which of its tokens did not. shorter: what the tower ran on; None = on all, in a stream.
    """

    kept: Tensor
    shorter: Shorter | None

    @property
    def all(self) -> bool:
        """Whether every patch stayed."""
        return bool(self.kept.all())

    def spread(self, x: Tensor) -> Tensor:
        """[m, ...] of the tokens that stayed -> [n, ...], 0 where one left."""
        return x.new_zeros(len(self.kept), *x.shape[1:]).index_put((self.kept.to(x.device),), x)

    def repeated(self, order: Tensor) -> Left:
        """For tokens that were repeated; `order`: which ones they are."""
        return replace(self, kept=self.kept[order])


class Entrance(Patch):
    """Replaces a tower's forward. Between `begin` and `end` it runs on the patches that stay, and its features have a
    row for every token of the whole image, 0 for those that left."""

    left: Left | None = None
    ran = False

    def __init__(self, family: Family, inner: Any, method: Any) -> None:
        tower = family.tower(inner)
        super().__init__(tower, forward_name(tower))
        self.family, self.inner, self.method = family, inner, method
        self.pixels = next(iter(self.__signature__.parameters))

    def begin(self, modality: Modality, call: dict[str, Any]) -> None:
        """Decide which patches leave of those that an encoder is called with. Frames of videos stay whole."""
        pixels, kept = call[modality.pixels].detach(), []
        with torch.no_grad():
            check_finite(pixels, "pixels")
            for cells, grid, alone in self.family.cells(self.inner, pixels, modality, call):
                own = source = torch.arange(len(cells), device=cells.device)
                if modality == IMAGE and alone:
                    source = self.method.sources(self.scaled(cells)[None], grid)[0]
                kept.append(source == own)
        stay = torch.cat(kept).cpu()
        self.left, self.ran = Left(stay, self.family.shorter(self.inner, modality, call, stay)), False

    def scaled(self, cells: Tensor) -> Tensor:
        """[n, 3, values] as the processor gives them -> [n, values], whose differences are those of values in [0, 1].
        At tolerance 0 they are compared as they are."""
        if self.method.tolerance:
            std = self.method.std or self.family.image_std(self.inner)
            cells = cells.float() * torch.tensor(std, device=cells.device)[:, None]
        return cells.flatten(1)

    def end(self) -> Left | None:
        """Afterwards: what left."""
        left, self.left = self.left, None
        if left is not None and not self.ran:
            raise VTCError(f"{type(self.module).__name__} did not run where images are encoded: vtc.remove(model)")
        return left

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        left, self.ran = self.left, True
        if left is None or left.all or left.shorter is None:
            return self.original(*args, **kwargs)
        given = left.shorter.given
        if set(given) & set(kwargs):
            raise InputError(
                f"{', '.join(sorted(set(given) & set(kwargs)))} of the whole images given: leave them out, since "
                "patches leave before the tower"
            )
        pixels = args[0] if args else kwargs.pop(self.pixels)
        output = self.original(pixels[left.shorter.patches.to(pixels.device)], *args[1:], **kwargs, **given)
        output.pooler_output = left.spread(output.pooler_output)
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [left.spread(level) for level in output.deepstack_features]
        return output


def said(name: str, items: Sequence[Any]) -> str:
    """What a report should say about the encoded items (`PlacedTokens`) of a call."""
    images = [item.encoded.left.kept for item in items if item.modality == IMAGE and item.encoded.left is not None]
    whole = "" if len(images) == len(items) else "; videos stay whole"
    if not images:
        return name + whole
    share = 1 - float(torch.cat(images).float().mean())
    return f"{name}: {share:.1%} of the image patches left before the tower{whole}"


def tower_macs(items: Sequence[Any]) -> tuple[int, int]:
    """The tower's multiply-adds for a call's items, on all patches and on those that stayed; 0, if none could leave."""
    lefts = [item.encoded.left for item in items if item.encoded.left is not None]
    macs = [left.shorter.macs for left in lefts if left.shorter is not None]
    return sum(dense for dense, _ in macs), sum(after for _, after in macs)
