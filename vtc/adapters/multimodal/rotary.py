"""The decoder's rotary embedding, given positions with gaps, and several positions for a merged token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.patch import Patch
from vtc.errors import OptionError
from vtc.positions import PPE, combine, sections, slot_of_pair, slots_for


class Positions(Patch):
    """Replaces the `forward` of the decoder's rotary embedding: passes it the positions of the tokens that stay.

    Attributes:
        ids: [B, S] or [axes, B, S] while the decoder runs on a shorter prompt; None = the model's own. With PPE there
            is one more leading axis, the slots.
        slot: [2 P] long, the slot that each column of the table reads; None = no PPE.
    """

    ids: Tensor | None = None

    def __init__(self, module: nn.Module, ppe: PPE | None) -> None:
        super().__init__(module, "forward")
        self.slots, self.slot = 1, None
        if ppe is not None:
            axis = axes(module)
            self.slots = slots_for(ppe, sections(axis))
            self.slot = slot_of_pair(axis, self.slots).repeat(2)

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.ids is None:
            return self.original(x, position_ids, *args, **kwargs)
        return self.table(x, self.ids, *args, **kwargs)

    def taken(self, positions: Tensor, at: Tensor, carried: Tensor | None = None) -> Tensor:
        """The `ids` of the rows at the columns `at` [B, S] of a prompt's positions [axes, B, L] or [B, L]. With PPE
        `carried` [slots, B, L] says which columns' positions every column carries; None = its own."""

        def rows(columns: Tensor) -> Tensor:
            return positions.gather(-1, columns.expand(positions.shape[:-1] + columns.shape[-1:]))

        if self.slot is None:
            return rows(at)
        every = at.expand(self.slots, *at.shape)
        return torch.stack([rows(columns) for columns in (every if carried is None else carried.gather(-1, every))])

    def means(self, ids: Tensor) -> Tensor:
        """[B, L, 2] float32, the mean cosine and the mean sine of the table at positions [axes, B, L] or [B, L]."""
        kinds = sorted(getattr(self.module, "layer_types", None) or [None], key=str)
        x = torch.zeros(1, 1, 1, device=ids.device)  # float32
        tables = [self.original(x, ids, *(() if kind is None else (kind,))) for kind in kinds]
        return torch.stack([torch.cat(part, -1).float().mean(-1) for part in zip(*tables, strict=True)], -1)

    def table(self, x: Tensor, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(cos, sin), each [B, S, 2 P], of tokens at `ids`: the model's own tables for every slot, each column taken
        from its slot."""
        if self.slot is None:
            return self.original(x, ids, *args, **kwargs)
        every = [self.original(x, one, *args, **kwargs) for one in ids]
        return tuple(combine(list(tables), self.slot) for tables in zip(*every, strict=True))


def axes(rotary: Any) -> Tensor:
    """[P] long: which axis of the positions each pair of a rotary embedding rotates by, -1 = it does not rotate. Found
    by calling it with position 1 on one axis and 0 on the others."""
    if any(buffer.is_meta for buffer in rotary.buffers()):  # a model without weights
        with torch.device("cpu"):
            rotary = type(rotary)(rotary.config)
    device = next((buffer.device for buffer in rotary.buffers()), torch.device("cpu"))
    count = 3 if hasattr(rotary, "mrope_section") else 1
    kinds = sorted(getattr(rotary, "layer_types", None) or [None], key=str)
    found = None
    for kind in kinds:
        given = () if kind is None else (kind,)
        for number in range(count):
            ids = torch.zeros(count, 1, 1, dtype=torch.long, device=device)
            ids[number] = 1
            forward = type(rotary).forward
            _, sin = forward(rotary, torch.zeros(1, 1, 1, device=device), ids if count > 1 else ids[0], *given)
            turns = sin[0, 0] != 0
            half = len(turns) // 2
            if not torch.equal(sin[0, 0, :half], sin[0, 0, half:]):
                raise OptionError(
                    f"PPE: {type(rotary).__name__} does not turn column c together with column c + {half}"
                )
            found = torch.full((half,), -1, device=device) if found is None else found
            found = torch.where(turns[:half], number, found)
    assert found is not None
    return found
