"""The caller's own attention masks: 4-D masks, cut along rows and columns, and packed sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.adapters.multimodal.cache import Entries
from vtc.errors import InputError

if TYPE_CHECKING:
    from vtc.adapters.multimodal.token_batch import TokenBatch


def padding(mask: Any) -> Tensor | None:
    """A 2-D mask of real columns; None if there is no mask, or one that describes more than padding."""
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def words(mask: Any, rows: int) -> Tensor | None:
    """[B or 1, rows], which of a call's last `rows` columns are real: in a caller's 4-D mask, those that attend to
    themselves."""
    if mask is None or padding(mask) is not None:
        return None if mask is None else mask[:, -rows:].bool()
    shown = _open(next(iter(mask.values())) if isinstance(mask, dict) else mask)[:, 0]
    return shown.diagonal(shown.shape[2] - rows, 1, 2)


def check_text(name: str, call: Mapping[str, Any], batch: TokenBatch, past: int) -> None:
    """Refuse a prompt whose last word does not attend to all its images, for a method that reads the words."""
    mask, visible = call.get("attention_mask"), True
    found = packs(call.get("position_ids"), padding(mask), batch.length)
    if found is not None:
        visible = bool((found == found[:, -1:]).expand(batch.size, -1).flatten()[batch.columns].all())
    if mask is not None and padding(mask) is None:
        for one in mask.values() if isinstance(mask, dict) else [mask]:
            last = _open(one).all(1)[:, -1, past : past + batch.length].expand(batch.size, -1)
            visible &= bool(last.flatten()[batch.columns.to(last.device)].all())
    if not visible:
        raise InputError(
            f"{name} reads a prompt's words, and the last of these does not see all images (several sequences in a "
            "row, or a mask of your own): use a method that reads none, or give one sequence a row"
        )


def shortened(mask: Any, columns: Tensor, entries: Entries, length: int) -> Any:
    """The mask of a call of `length` columns, 2-D or the caller's own, for the rows at `columns` [B, S], which are the
    last of the `entries`; None if everything is real and causal."""
    if mask is None:
        return (entries.columns >= 0).long() if entries.padded else None
    if padding(mask) is None:
        return cut(mask, columns, entries, length)
    if mask.shape[1] != entries.length:
        raise InputError(
            f"attention_mask has {mask.shape[1]} columns, but the conversation has {entries.length}: with a cache the "
            "mask covers the whole conversation, image tokens that vtc removed included"
        )
    return entries.take(mask.long())


def cut(mask: Any, columns: Tensor, entries: Entries, length: int) -> Any:
    """A caller's own mask, [B or 1, H or 1, L, K] or one per kind of layer, cut to the rows at `columns` [B, S] of L
    and the keys at the `entries` [B, E] of K. Padding attends to itself only, and nothing else attends to it."""
    if isinstance(mask, dict):
        return {kind: cut(one, columns, entries, length) for kind, one in mask.items()}
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise InputError(f"attention_mask is a {type(mask).__name__}, which vtc cannot cut: give a tensor [B, 1, L, L]")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(f"attention_mask is 4-D and {mask.dtype}: give a boolean one, or one to add to the logits")
    if mask.ndim != 4 or mask.shape[2] != length or mask.shape[3] < entries.length:
        raise InputError(
            f"attention_mask is {list(mask.shape)}, and the call has {length} columns of a conversation of "
            f"{entries.length}: give [B, {entries.length}], or [B, 1, {length}, {entries.length}]"
        )
    batch, rows = columns.shape
    keys, spare = entries.columns, mask.shape[3] - entries.length
    if bool(_open(mask[..., entries.length :]).any()):
        raise InputError(
            f"attention_mask is {list(mask.shape)}, and its last {spare} columns, which the conversation of "
            f"{entries.length} does not have, are not masked"
        )
    device = mask.device
    at, columns, keys = columns.clamp(min=0).to(device), columns.to(device), keys.to(device)
    short = mask.expand(batch, *mask.shape[1:])
    short = short.gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    short = short.gather(3, keys.clamp(min=0)[:, None, None].expand(-1, mask.shape[1], rows, -1))
    first = keys.shape[1] - rows
    itself = torch.arange(keys.shape[1], device=device) == torch.arange(first, first + rows, device=device)[:, None]
    absent = (columns < 0)[:, None, :, None]
    opened, shut = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    short = short.masked_fill((keys < 0)[:, None, None], shut).masked_fill(absent, shut)
    short = short.masked_fill(absent & itself, opened)
    if spare:  # the unused entries of a static cache
        short = torch.nn.functional.pad(short, (0, mask.shape[3] - keys.shape[1]), value=shut)
    return short


def _open(mask: Tensor) -> Tensor:
    """Which pairs of query and key a mask allows: True in a boolean mask, near 0 in an additive one."""
    return mask if mask.dtype == torch.bool else mask > -1e3


def packs(positions: Tensor | None, mask: Any, length: int) -> Tensor | None:
    """[B or 1, L] long, which of several packed sequences each column belongs to, as transformers reads it from the
    caller's positions [B, L] or [4, B, L] (text first): a new one begins where positions do not increase by 1. None =
    one sequence per row, also if there is a padding mask."""
    if positions is None or positions.ndim == 3 and len(positions) != 4:
        return None
    if mask is not None and not (mask.ndim == 2 and bool(mask.all())):
        return None
    text = (positions[0] if positions.ndim == 3 else positions)[:, -length:]
    found = (text.diff(dim=1, prepend=text[:, :1] - 1) != 1).cumsum(1)
    return found if bool(found.any()) else None


def counted(packs: Tensor | None, at: Tensor, start: int) -> Tensor:
    """[B, S], consecutive positions of the rows at the columns `at` [B, S], from which masks are made: counted from
    `start`, and from 0 in each further packed sequence."""
    place = torch.arange(at.shape[1], device=at.device).expand_as(at)
    if packs is None:
        return place + start
    which = packs.to(at.device).expand(len(at), -1).gather(1, at)
    begun = ((which.diff(dim=1, prepend=which[:, :1]) != 0) * place).cummax(1).values
    return place - begun + start * (begun == 0)
