"""Attention masks that callers give an encoder: padding, which is left out of all counts; and all other masks, which
are cut to the tokens that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError
from vtc.token_map import TokenMap


def given_mask(block: Any, x: Tensor, args: tuple, kwargs: dict) -> Tensor | None:
    """The mask among a block's arguments, [B or 1, H or 1, N or 1, N]: bool (True = is seen) or added to the logits.

    This is what transformers passes to its layers: four axes, or [B, N] with True for real tokens.
    """
    for mask in (*args, *kwargs.values()):
        if isinstance(mask, Tensor) and mask.shape[-1:] == x.shape[1:2]:
            if mask.ndim == 4:
                return mask
            if mask.shape == x.shape[:2]:
                return (mask if mask.is_floating_point() else mask.bool())[:, None, None]
    return None


def broadcast_mask(block: Any, x: Tensor, args: tuple, kwargs: dict) -> Tensor | None:
    """The same for `attn_mask=` with the shapes that torch's scaled_dot_product_attention takes: [N, N], [B, 1, N, N],
    or any other that broadcasts to [B, H, N, N]."""
    mask = kwargs.get("attn_mask", args[0] if args else None)
    return None if mask is None else mask[(None,) * (4 - mask.ndim)]


def read(mask: Tensor | None, x: Tensor, prefix: int) -> tuple[Tensor | None, Tensor | None]:
    """(padding mask [B, N], True = real; any other mask, unchanged). None if there is no such mask, or it has no
    effect.

    A mask is padding if it hides the same patches from every token and does nothing else; from padding it may hide
    all.
    """
    if mask is None:
        return None, None
    real = mask if mask.dtype == torch.bool else mask > torch.finfo(x.dtype).min / 2
    if torch.compiler.is_exporting():  # there are no values to look at; transformers makes a mask that hides nothing
        nothing = real.all() if mask.dtype == torch.bool else (mask == 0).all()
        torch._assert_async(nothing, "vtc: an exported encoder takes no attention mask that hides a token")
        return None, None
    plain = mask.dtype == torch.bool or not bool(mask.masked_fill(~real, 0).any())
    if plain and bool(real.all()):
        return None, None
    seen = real[:, :1, :1]
    same = (real == seen).all(-1)
    if real.shape[2] > 1:
        same |= ~real.any(-1) & ~seen[:, :, 0]
    if plain and bool(same.all()) and bool(seen[..., :prefix].all()):
        return seen[:, 0, 0].expand(x.shape[:2]), None
    return None, mask


def cut(mask: Tensor, token_map: TokenMap, merges: bool, where: str) -> Tensor:
    """A mask [B, H, N, N] for the tokens that stay: rows and columns at the anchors, [B, H, M, M].

    Raises:
        InputError: the mask treats tokens that were merged differently.
    """
    small = _at(mask, token_map.anchor.clamp(min=0))
    if merges and not torch.equal(_at(small, token_map.group.clamp(min=0)), mask.expand(len(small), -1, -1, -1)):
        raise InputError(
            f"the attention mask tells tokens apart that were merged in {where}: a method that drops tokens takes any "
            "mask (vtc.Random), one that merges takes padding; or pass no mask"
        )
    return small


def _at(mask: Tensor, index: Tensor) -> Tensor:
    """Rows and columns at `index` [B, M] of a mask [B or 1, H, N or 1, N or 1]; axes of size 1 stay."""
    mask = mask.expand(index.shape[0], -1, -1, -1)
    if mask.shape[2] > 1:
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    if mask.shape[3] > 1:
        mask = mask.gather(3, index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
    return mask
