"""Rotary tables of vision encoders for merged tokens that carry several positions (PPE)."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.errors import OptionError
from vtc.positions import PPE, sections, slot_of_pair, slots_for


def column_slots(table: Tensor, grid: tuple[int, int], parts: int, ppe: PPE) -> tuple[int, Tensor]:
    """K, and for each column of a rotary table which of the K slots it reads, [C].

    Derived from the table of one grid: whether a column depends on the row, on the column or on neither, and which two
    columns form a pair (they are equal everywhere).

    Args:
        table: [rows x columns, C], row by row; `parts` tables side by side (2 = sine and cosine).

    Raises:
        OptionError: the table has another layout, or K does not divide the sections.
    """
    width = table.shape[-1] // parts
    one = table[:, :width].float().view(*grid, width)
    by_row = (one != one[:1]).any(1).any(0)
    by_column = (one != one[:, :1]).any(1).any(0)
    if bool((by_row & by_column).any()):
        raise OptionError("PPE: some of this encoder's rotary pairs turn by row and column together; they have no axis")
    axis = torch.where(by_row, 0, torch.where(by_column, 1, -1))
    if torch.equal(one[..., 0::2], one[..., 1::2]):
        axis, adjacent = axis[0::2], True
    elif torch.equal(one[..., : width // 2], one[..., width // 2 :]):
        axis, adjacent = axis[: width // 2], False
    else:
        raise OptionError("PPE: the columns of this encoder's rotary table do not come in pairs as vtc knows them")
    slots = slots_for(ppe, sections(axis))
    slot = slot_of_pair(axis, slots)
    slot = slot.repeat_interleave(2) if adjacent else slot.repeat(2)
    return slots, slot.repeat(parts)
