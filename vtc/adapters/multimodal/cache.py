"""A KV cache that is shorter than the conversation it represents.

Code outside the decoder (generate, a second turn, beam search) counts the tokens of the full prompt: which ids are
still to be fed, which position comes next. The decoder counts the entries in the cache. So when tokens were removed,
`get_seq_length` returns the full prompt's length, except while the decoder runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError


def cache_name() -> str:
    """The name of the cache in a model's arguments and output: `past_key_values` before transformers 5.24."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def goes_on(cache: Any) -> bool:
    """Whether a call with this cache continues a conversation: a decoding step, or another turn."""
    return cache is not None and int(cache.get_seq_length()) > 0


@dataclass(frozen=True)
class Entries:
    """Which column of the full conversation each cache entry holds.

    Attributes:
        columns: [B, E] long, ascending except for padding, which is -1.
        length: number of columns of the conversation so far, including the removed ones.
        padded: whether any entry is padding.
        sizes: [B, E] float32, how many tokens each entry stands for, if attention is weighted by size; None = 1.
    """

    columns: Tensor
    length: int
    padded: bool = False
    sizes: Tensor | None = None

    @classmethod
    def whole(cls, batch: int, length: int, device: torch.device) -> Entries:
        return cls(torch.arange(length, device=device).expand(batch, length), length)

    @classmethod
    def before(cls, cache: Any, batch: int, device: torch.device) -> Entries:
        """The entries of `cache` before a call; None = empty."""
        if isinstance(cache, Shortened):
            return cache.vtc_entries
        return cls.whole(batch, 0 if cache is None else cache.get_seq_length(), device)

    def extend(self, columns: Tensor, length: int, padded: bool, sizes: Tensor | None = None) -> Entries:
        """These entries plus those of a chunk of `length` columns; `columns` are counted from the start of the
        chunk."""
        if sizes is not None or self.sizes is not None:
            before, new = (
                torch.ones(c.shape, device=c.device) if s is None else s
                for c, s in ((self.columns, self.sizes), (columns, sizes))
            )
            sizes = torch.cat([before, new], dim=1)
        columns = torch.where(columns < 0, -1, columns + self.length)
        return Entries(torch.cat([self.columns, columns], dim=1), self.length + length, self.padded or padded, sizes)

    def rows(self, index: Tensor) -> Entries:
        index = index.to(self.columns.device)
        sizes = None if self.sizes is None else self.sizes.index_select(0, index)
        return replace(self, columns=self.columns.index_select(0, index), sizes=sizes)

    def cropped(self, gone: int) -> Entries:
        """The entries without the last `gone` columns, none of which may be a removed one."""
        left = self.columns.shape[1] - gone
        if gone and (left < 0 or bool((self.columns[:, left:] < self.length - gone).any())):
            raise InputError(
                f"the cache cannot be cropped by {gone} tokens: image tokens that vtc removed lie among them. Crop "
                "inside the answer only, or start from a new cache"
            )
        sizes = None if self.sizes is None else self.sizes[:, :left]
        return Entries(self.columns[:, :left], self.length - gone, self.padded, sizes)

    def take(self, x: Tensor, fill: int = 0) -> Tensor:
        """[B, columns] -> [B, E]; padding gets `fill`."""
        return torch.where(self.columns < 0, fill, x.gather(1, self.columns.clamp(min=0)))


class Shortened:
    """The mixin that `shorten` adds to the class of a cache.

    Attributes:
        vtc_entries: the entries of the decoder's first layer, by the columns of the conversation.
        vtc_levels: if later layers hold fewer, the entries of every level, as indices into those of the first layer.
        vtc_inside: whether the decoder is running.
    """

    vtc_entries: Entries
    vtc_levels: tuple[Entries, ...]
    vtc_inside: bool

    def get_seq_length(self, layer_idx: int = 0) -> int:
        physical = super().get_seq_length(layer_idx)  # type: ignore[misc]
        return physical if self.vtc_inside else self.vtc_entries.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._take(torch.arange(len(self.vtc_entries.columns))[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._take(torch.arange(len(self.vtc_entries.columns)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        length = self.vtc_entries.length
        gone = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        entries, levels = self.vtc_entries.cropped(gone), tuple(level.cropped(gone) for level in self.vtc_levels)
        super().crop(-gone)  # type: ignore[misc]
        self.vtc_entries, self.vtc_levels = entries, levels

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.vtc_entries, self.vtc_levels = Entries.whole(0, 0, torch.device("cpu")), ()

    def _take(self, rows: Tensor) -> None:
        self.vtc_entries = self.vtc_entries.rows(rows)
        self.vtc_levels = tuple(level.rows(rows) for level in self.vtc_levels)


_CLASSES: dict[type, type] = {}


def shorten(cache: Any, entries: Entries, levels: tuple[Entries, ...] = ()) -> None:
    """Make `cache`, in place, report the full length although it holds less; it stays an instance of its class."""
    if not isinstance(cache, Shortened):
        plain = type(cache)
        if plain not in _CLASSES:
            _CLASSES[plain] = type(f"Shortened{plain.__name__}", (Shortened, plain), {})
        cache.__class__ = _CLASSES[plain]
        cache.vtc_inside = False
    cache.vtc_entries, cache.vtc_levels = entries, levels
