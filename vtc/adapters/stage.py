"""The state of one call between two blocks, and what follows from it: biases, masks and positions for fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError
from vtc.positions import combine
from vtc.token_map import TokenMap

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Stage:
    """The state of one call between two blocks.

    Attributes:
        layer: the next block; entry: tokens at the first block, prefix included.
        plan: tokens to remove per layer; [B, depth] for a ragged batch.
        total: from the entry to now, None = nothing happened yet; maps: one per layer that reduced.
        size: [B, M] float32, what each token stands for, None = all 1; mask: [B, M], None = all real.
        flow: (tokens in attention, tokens in the MLP) of each layer that ran, a pair of [B] lists or ints.
        carried, slot: with PPE, the patches whose positions each token behind the prefix carries [K, B, M], and which
            of the K each column of a rotary table reads.
    """

    layer: int
    prefix: int
    entry: int
    plan: tuple[int, ...] | Tensor
    grid: tuple[Grid, ...] | None
    batch: int = 1
    front: TokenMap | None = None  # before the encoder: the image's own patches to those of the resized image
    total: TokenMap | None = None
    size: Tensor | None = None
    mask: Tensor | None = None
    maps: tuple[TokenMap, ...] = ()
    flow: tuple[tuple[Any, Any], ...] = ()
    carried: Tensor | None = None
    slot: Tensor | None = None

    def count(self) -> Any:
        """Tokens now: an int, or [B] for a ragged batch."""
        if self.mask is not None:
            return self.mask.sum(1)
        return self.entry if self.total is None else self.total.anchor.shape[1]

    def bias(self, x: Tensor) -> Tensor | None:
        """[B, 1, 1, M]: log size, to add to the attention logits (proportional attention); -inf on padding."""
        if self.size is None:
            return None
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return self.size.log().to(dtype)[:, None, None, :]

    def patches(self) -> Tensor:
        """[B, M - prefix]: which patch (row by row) each token behind the prefix is, or stands for."""
        assert self.total is not None
        return (self.total.anchor[:, self.prefix :] - self.prefix).clamp(min=0)

    def turned(self, table: Tensor) -> Tensor:
        """The rows of a rotary table of all patches for the tokens behind the prefix: [B, 1 or H, M, D]."""
        if self.carried is None or self.slot is None:
            return taken_at(table, self.patches())
        return combine([taken_at(table, patch) for patch in self.carried], self.slot)

    def narrow(self, x: Tensor) -> Tensor:
        """Undo `widen`: x may come at full length from a block that was watched."""
        if self.total is None or x.shape[1] == self.total.anchor.shape[1]:
            return x
        return self.total.gather(x)

    def widen(self, x: Tensor, fill: int | str) -> Tensor:
        """[B, M, C] -> [B, entry, C]; the prefix fills nothing but itself."""
        total = self.front if self.total is None else self.total  # a resized image loses nothing further
        if total is None:
            return x
        rest = total.drop_prefix(self.prefix).unmerge(x[:, self.prefix :], fill)
        return torch.cat([x[:, : self.prefix], rest], dim=1) if self.prefix else rest


def padding_mask(args: tuple, kwargs: dict, x: Tensor) -> Tensor | None:
    """[B, N] True = real, from the attention mask that a block was given; None if there is none or it hides nothing.

    Additive float masks that hide no token (relative position biases) are not padding.
    """
    if kwargs.get("is_causal"):
        raise InputError("is_causal=True: a causal encoder cannot lose tokens; call it without, or vtc.remove(model)")
    given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.shape[-1] == x.shape[1]]
    given = [v for v in given if v.ndim == 4 or (v.ndim == 2 and v.shape == x.shape[:2])]
    if not given:
        return None
    mask = given[0]
    real = mask if mask.dtype == torch.bool else mask > torch.finfo(x.dtype).min / 2
    if mask.ndim == 2:
        real = mask.bool() if not mask.is_floating_point() else real
    else:
        if mask.dtype != torch.bool and bool(real.all()):
            return None
        if not bool((real == real[:, :1, :1]).all()):
            raise InputError("the attention mask is not plain padding, so tokens cannot be removed; pass none")
        real = real[:, 0, 0]
    real = real.expand(x.shape[:2])
    return None if bool(real.all()) else real


def taken_at(table: Tensor, index: Tensor, dim: int = -2) -> Tensor:
    """Rows of a position table [..., N, D], [N, D] or [H, N, D] at `index` [B, M]: [B, 1 or H, M, D]."""
    if table.ndim == 2:
        return table[index][:, None]
    if table.ndim == 3 and table.shape[0] == 1:
        return table[0][index][:, None]
    if table.ndim == 3:
        table = table[None]
    table = table.expand(index.shape[0], *table.shape[1:])
    return table.gather(2, index[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))


def relative_bias(table: Tensor, stage: Stage) -> Tensor:
    """A relative position bias [H, N, N] or [1 or B, H, N, N] at the anchors: [B, H, M, M]."""
    assert stage.total is not None
    at = stage.total.anchor.clamp(min=0)
    table = table[None] if table.ndim == 3 else table
    table = table.expand(at.shape[0], *table.shape[1:])
    rows = table.gather(2, at[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))
    return rows.gather(3, at[:, None, None, :].expand(-1, table.shape[1], rows.shape[2], -1))
