"""A KV cache that is shorter than the conversation it stands for.

Everybody outside the decoder (generate, a second turn, beam search) counts the prompt's own tokens: which ids are still
to be fed, which position comes next. The decoder counts the entries it has. So a cache with tokens removed answers
`get_seq_length` with the prompt's length, except while the decoder runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError


@dataclass(frozen=True)
class Entries:
    """Which column of the full conversation each cache entry holds.

    Attributes:
        columns: [B, E] long, ascending but for padding, which is -1.
        length: columns of the conversation so far, the removed ones included.
        padded: whether any entry is padding.
    """

    columns: Tensor
    length: int
    padded: bool = False

    @classmethod
    def whole(cls, batch: int, length: int, device: torch.device) -> Entries:
        return cls(torch.arange(length, device=device).expand(batch, length), length)

    def extend(self, columns: Tensor, length: int, padded: bool) -> Entries:
        """With the entries of a chunk of `length` columns; `columns` count from the start of the chunk."""
        columns = torch.where(columns < 0, -1, columns + self.length)
        return Entries(torch.cat([self.columns, columns], dim=1), self.length + length, self.padded or padded)

    def rows(self, index: Tensor) -> Entries:
        return replace(self, columns=self.columns.index_select(0, index.to(self.columns.device)))

    def take(self, x: Tensor, fill: int = 0) -> Tensor:
        """[B, columns] -> [B, E]; padding gets `fill`."""
        return torch.where(self.columns < 0, fill, x.gather(1, self.columns.clamp(min=0)))


class Shortened:
    """What `shorten` mixes into the class of a cache."""

    vtc_entries: Entries
    vtc_inside: bool

    def get_seq_length(self, layer_idx: int = 0) -> int:
        physical = super().get_seq_length(layer_idx)  # type: ignore[misc]
        return physical if self.vtc_inside else self.vtc_entries.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.vtc_entries = self.vtc_entries.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.vtc_entries = self.vtc_entries.rows(torch.arange(len(self.vtc_entries.columns))[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.vtc_entries = replace(self.vtc_entries, columns=self.vtc_entries.columns.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        entries = self.vtc_entries
        gone = -tokens_to_remove if tokens_to_remove <= 0 else max(0, entries.length - tokens_to_remove)
        tail = entries.columns[:, entries.columns.shape[1] - gone :]
        if gone and (gone > entries.columns.shape[1] or bool((tail < entries.length - gone).any())):
            raise InputError(
                f"the cache cannot be cropped by {gone} tokens: image tokens that vtc removed lie among them. Crop "
                "inside the answer only, or start from a new cache"
            )
        super().crop(-gone)  # type: ignore[misc]
        self.vtc_entries = Entries(entries.columns[:, : entries.columns.shape[1] - gone], entries.length - gone)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.vtc_entries = Entries.whole(0, 0, torch.device("cpu"))


_CLASSES: dict[type, type] = {}


def shorten(cache: Any, entries: Entries) -> None:
    """Make `cache` one that stands for more than it holds, in place; it stays an instance of its class."""
    if not isinstance(cache, Shortened):
        plain = type(cache)
        if plain not in _CLASSES:
            _CLASSES[plain] = type(f"Shortened{plain.__name__}", (Shortened, plain), {})
        cache.__class__ = _CLASSES[plain]
        cache.vtc_inside = False
    cache.vtc_entries = entries
