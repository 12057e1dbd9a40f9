"""Arguments that refer to columns of the caller's full prompt: logits_to_keep, and those with one entry per column."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.multimodal.cache import Entries
from vtc.adapters.multimodal.token_batch import CallRecord, present
from vtc.errors import InputError

# Arguments with one column per token that are cut, or that are unused after the language head.
_CUT = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"}
TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_CUT |= {"cache_position", *TYPES}
_FOR_HEADS = ("labels", "shift_labels", "logits_to_keep")  # wrapping models pass them down, unused here
_PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def check_arguments(call: Mapping[str, Any], own: Collection[str], length: int, total: int) -> None:
    """Refuse arguments with one entry per column of the prompt (`length`, or `total` with the cache) that are not cut.
    `own`: the names of arguments that the model's forward and its encoders take."""
    for name, value in call.items():
        if name in _PACKED:
            raise InputError(
                f"{name} counts the prompt's columns, and vtc does not cut it: leave it out, and give position_ids "
                "that start anew with every packed sequence"
            )
        if name in own or name in _CUT or name in _FOR_HEADS:
            continue
        shape = next((list(x.shape) for x in _tensors(value) if {length, total} & set(x.shape)), None)
        if shape:
            raise InputError(
                f"{name} is {shape}, which seems to have a place for each of the prompt's {length} columns, and vtc "
                "does not cut it: leave it out"
            )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def shorter(call: Mapping[str, Any], columns: Tensor, entries: Entries, length: int, filler: int) -> dict[str, Any]:
    """The arguments of a call of `length` columns, cut to the rows at `columns` [B, S], -1 = padding: ids, embeddings
    and token types. Together with the rows cached before they are `entries`. Arguments meant for wrapping models are
    dropped."""
    short = {name: value for name, value in call.items() if name not in _FOR_HEADS}
    at, absent = columns.clamp(min=0), columns < 0
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if ids is not None:
        short["input_ids"] = ids.gather(1, at).masked_fill(absent, filler)
    if embeds is not None:
        short["inputs_embeds"] = embeds.gather(1, at[..., None].expand(-1, -1, embeds.shape[-1]))
    for name in TYPES:
        kinds = call.get(name)
        if kinds is not None and kinds.shape[-1] == length:
            short[name] = kinds.gather(1, at).masked_fill(absent, 0)
        elif kinds is not None:  # these cover the whole conversation; drafted tokens may be missing, and are text
            missing = entries.length - kinds.shape[-1]
            short[name] = entries.take(torch.cat([kinds, kinds[:, -1:].expand(-1, max(0, missing))], dim=1))
    return short


def check_asked(asked: Any, record: CallRecord) -> None:
    """Refuse a `logits_to_keep` that asks for removed columns. Only the first of the last K may be a removed one: its
    logits predict the next column, and come from the last column before it that stayed."""
    kept, length = record.kept, record.kept.shape[1]
    if asked is None or isinstance(asked, str):
        return
    wanted = torch.zeros_like(kept)
    if not isinstance(asked, Tensor):
        first = max(0, length - asked) if asked > 0 else min(-asked, length)
        wanted[:, first + 1 :] = True
        wanted[:, first : first + 1] = ~present(kept, record.real)[:, : first + 1].any(1, keepdim=True)
    elif asked.dtype == torch.bool:
        wanted |= asked.to(kept.device)
    else:
        columns = asked.to(kept.device) % length
        wanted.scatter_(1, (columns if columns.ndim == 2 else columns.view(1, -1)).expand(len(kept), -1), True)
    gone = (wanted & ~kept).nonzero()
    if len(gone):
        row, column = gone[0].tolist()
        given = "a tensor" if isinstance(asked, Tensor) else asked
        raise InputError(
            f"logits_to_keep={given} asks for column {column} of prompt {row}, an image token that vtc removed: ask "
            "for columns that stay (handle.kept), as those of the text behind the last image"
        )


def as_asked(asked: Any, record: CallRecord, hidden: Tensor) -> Tensor:
    """The decoder's rows [B, S, C] expanded to the prompt's columns [B, L, C], so that a wrapping model can index them
    as usual; only the last K if it reads no others. A removed column gets the last row before it."""
    batch, length = record.kept.shape
    columns = torch.arange(length, device=record.kept.device).expand(batch, length)
    if isinstance(asked, int) and asked > 0:
        columns = columns[:, -asked:]
    rows = record.at(columns).to(hidden.device)
    return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
