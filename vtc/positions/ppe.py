"""PPE: Positional Preservation Embedding for merged tokens, https://arxiv.org/abs/2510.22936.

A rotary embedding rotates pair p of a query or key by `position * frequency_p`. Normally all pairs use one position,
but a merged token has several. So the pairs of every axis (one axis in a plain decoder; time, height and width in
Qwen's) are cut into K runs, in the order of their frequencies, and run k rotates by the position of the token's k-th
member:

    angle_p = id[slot_p, axis_p] * frequency_p,    slot_p = (number of p on its axis) K // (pairs of that axis)

Members are ordered by distance to the group's centre, nearest first (`TokenMap.rank`), and repeat if there are fewer
than K. With K equal positions this is the model's own rotation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError, OptionError
from vtc.token_map import TokenMap

_MOST = 8  # maximum number of slots by default, as in the paper


@dataclass(frozen=True)
class PPE:
    """Merged tokens carry the positions of up to `slots` members; None = the largest number up to 8 that divides every
    rotary section of the model."""

    slots: int | None = None

    def __post_init__(self) -> None:
        if self.slots is not None and (
            not isinstance(self.slots, int) or isinstance(self.slots, bool) or self.slots < 1
        ):
            raise OptionError(f"slots={self.slots!r}: it takes a whole number >= 1, or None")


Positions = str | PPE


def read(value: Any) -> Positions:
    """The option `positions` in whatever form it is given: "original", "ppe", a PPE, or {"slots": K} from a file."""
    if isinstance(value, Mapping) and set(value) <= {"slots"}:
        value = PPE(**value)
    if value == PPE():
        return "ppe"
    if isinstance(value, PPE) or value in ("original", "ppe"):
        return value
    raise OptionError(f'positions={value!r} is unknown; choose "original", "ppe" or vtc.PPE(slots=K)')


def sections(axis: Tensor) -> tuple[int, ...]:
    """How many pairs rotate by each axis, from `axis` [P] (-1 = a pair that does not rotate)."""
    return tuple(n for n in torch.bincount(axis[axis >= 0]).tolist() if n) if axis.numel() else ()


def slots_for(ppe: PPE, found: tuple[int, ...]) -> int:
    """K for a model with these sections. Raises OptionError if the requested K does not fit."""
    common = math.gcd(*found) if found else 1
    if ppe.slots is None:
        return max(k for k in range(1, _MOST + 1) if common % k == 0)
    if common % ppe.slots:
        fits = ", ".join(str(k) for k in range(1, common + 1) if common % k == 0)
        paper = ". The paper's form for images, K = 32, needs the two sections [32, 32]" if ppe.slots == 32 else ""
        raise OptionError(
            f"PPE(slots={ppe.slots}) does not divide every rotary section of this model, {list(found)}: choose one of "
            f"{fits}{paper}"
        )
    return ppe.slots


def slot_of_pair(axis: Tensor, slots: int) -> Tensor:
    """Which slot each pair reads: `axis` [P], the axis of every pair, in the order of frequencies -> [P] long."""
    slot = torch.zeros_like(axis)
    for number in axis.unique().tolist():
        mine = axis == number
        if number >= 0:
            slot[mine] = torch.arange(int(mine.sum()), device=axis.device) * slots // int(mine.sum())
    return slot


def members(token_map: TokenMap, slots: int) -> Tensor:
    """[slots, B, M] long: the input token that each slot of a merged token carries; -1 where the map has padding."""
    rank, group = token_map.rank, token_map.group
    batch, count = token_map.anchor.shape
    index = torch.arange(group.shape[1], device=group.device).expand_as(group)
    inside = (group >= 0) & (rank < slots)
    table = group.new_full((batch, count * slots + 1), -1)
    place = torch.where(inside, group * slots + rank, count * slots)
    table = table.scatter(1, place, index)[:, :-1].view(batch, count, slots)
    number = (table >= 0).sum(2, keepdim=True).clamp(min=1)
    cycled = table.gather(2, torch.arange(slots, device=group.device).expand_as(table) % number)
    return cycled.permute(2, 0, 1)


def ppe_positions(token_map: TokenMap, positions: Tensor, *, slots: int) -> Tensor:
    """The positions that merged tokens carry: [B, N] or [axes, B, N] -> [slots, B, M] or [slots, axes, B, M].

    Slot k of a merged token holds the position of its k-th member, nearest to the anchor first; if there are fewer
    members than slots, they repeat. Padding of the map gets 0.

    Raises:
        InputError: the positions do not match the map's inputs.
    """
    if positions.ndim not in (2, 3) or positions.shape[-2:] != token_map.group.shape:
        raise InputError(
            f"positions must be [B, N] or [axes, B, N] with B, N = {tuple(token_map.group.shape)}, not "
            f"{tuple(positions.shape)}"
        )
    PPE(slots)
    index = members(token_map, slots)
    taken = torch.stack([positions.gather(-1, k.clamp(min=0).expand(*positions.shape[:-1], -1)) for k in index])
    absent = token_map.anchor < 0
    return taken.masked_fill(absent, 0)


def combine(tables: list[Tensor], slot: Tensor) -> Tensor:
    """Column c of the result is column c of `tables[slot[c]]`. K tables [..., C], slot [C]."""
    if len(tables) == 1:
        return tables[0]
    stacked = torch.stack(tables)
    return stacked.gather(0, slot.to(stacked.device).expand(1, *stacked.shape[1:]))[0]
