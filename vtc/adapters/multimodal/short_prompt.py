"""A call's arguments for the columns of its prompt that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.multimodal import masks
from vtc.adapters.multimodal.cache import Entries
from vtc.adapters.multimodal.columns import shorter
from vtc.adapters.multimodal.families.base import prompt
from vtc.errors import InputError


@dataclass(frozen=True)
class ShortPrompt:
    """The inputs of a model's forward on fewer columns.

    Attributes:
        arguments: of the forward. columns: [B, S] long, which of the call's columns each row is, -1 = padding.
        entries: the cache's entries after the call. past: how many its first layer held before.
        real, words: [B, L] bool, the call's columns that are not padding, and those with text to read; None = all.
    """

    arguments: dict[str, Any]
    columns: Tensor
    entries: Entries
    past: int
    real: Tensor | None
    words: Tensor | None


def shorten_call(
    call: Mapping[str, Any], columns: Tensor | None, past: Entries, positions: Tensor, filler: int, told: bool
) -> ShortPrompt:
    """The call on `columns` [B, S] (None = all of them), after the entries in its cache.

    Args:
        past: the cache's entries.
        positions: [B, L] or [axes, B, L], of all its columns. filler: a token id to use for padding.
        told: the decoder uses positions outside its rotary table, so it is given those of the columns.

    Raises:
        InputError: packed sequences that could no longer be told apart.
    """
    given = prompt(call)
    batch, length = given.shape[:2]
    padded = columns is not None and bool((columns < 0).any())
    if columns is None:
        columns = torch.arange(length, device=given.device).expand(batch, length)
    entries = past.extend(columns, length, padded)
    whole = call.get("attention_mask")
    mask = masks.padding(whole)
    packs = masks.packs(call.get("position_ids"), mask, length)
    if packs is not None and told:
        raise InputError(
            "position_ids pack several sequences in a row, and this decoder uses positions outside of its rotary "
            "table: give one sequence a row, with an attention_mask"
        )
    if packs is not None and entries.padded and (whole is None or mask is not None):
        raise InputError(
            "position_ids pack several sequences in a row, and vtc shortens the rows of this batch to different "
            "lengths, which takes a padding mask: give one packed row a call"
        )
    short = shorter(call, columns, entries, length, filler)
    at = columns.clamp(min=0)
    before = past.columns.shape[1]
    if call.get("cache_position") is not None:
        short["cache_position"] = torch.arange(before, before + columns.shape[1], device=given.device)
    short["position_ids"] = masks.counted(packs, at, before)
    if packs is not None and call["position_ids"].ndim == 3:  # text positions come first: for packed sequences
        short["position_ids"] = short["position_ids"].expand(4, -1, -1)
    short["attention_mask"] = masks.shortened(whole, columns, entries, length)
    short["return_dict"] = True
    if told:
        short["position_ids"] = positions.gather(-1, at.expand(positions.shape[:-1] + at.shape[-1:]))
        if short["attention_mask"] is None:  # with a mask, a gap is no border between packed sequences
            short["attention_mask"] = torch.ones_like(entries.columns)
    real = None if mask is None else mask[:, -length:].bool()
    return ShortPrompt(short, columns, entries, before, real, masks.words(whole, length))
