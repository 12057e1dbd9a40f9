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
        slot: for every kind of layer, [2 P] long, the slot that each column of its table reads; {} = no PPE.
    """

    ids: Tensor | None = None

    def __init__(self, module: nn.Module, ppe: PPE | None) -> None:
        super().__init__(module, "forward")
        self.slots, self.slot = 1, {}
        if ppe is not None:
            self.slots = slots_for(ppe, sections_of(module))
            self.slot = {kind: slot_of_column(module, self.slots, *kind) for kind in kinds(module)}

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.ids is None or position_ids.shape[-1] > self.ids.shape[-1]:  # with those that the cache keeps: the true
            return self.original(x, position_ids, *args, **kwargs)
        return self.table(x, self.ids, *args, **kwargs)

    def taken(self, positions: Tensor, at: Tensor, carried: Tensor | None = None) -> Tensor:
        """The `ids` of the rows at the columns `at` [B, S] of a prompt's positions [axes, B, L] or [B, L]. With PPE
        `carried` [slots, B, L] says which columns' positions every column carries; None = its own."""

        def rows(columns: Tensor) -> Tensor:
            return positions.gather(-1, columns.expand(positions.shape[:-1] + columns.shape[-1:]))

        if not self.slot:
            return rows(at)
        every = at.expand(self.slots, *at.shape)
        return torch.stack([rows(columns) for columns in (every if carried is None else carried.gather(-1, every))])

    def means(self, ids: Tensor) -> Tensor:
        """[B, L, 2] float32, the mean cosine and the mean sine of the table at positions [axes, B, L] or [B, L]."""
        x = torch.zeros(1, 1, 1, device=ids.device)  # float32
        tables = [self.original(x, ids, *kind) for kind in kinds(self.module)]
        return torch.stack([torch.cat(part, -1).float().mean(-1) for part in zip(*tables, strict=True)], -1)

    def table(self, x: Tensor, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(cos, sin), each [B, S, 2 P], of tokens at `ids`: the model's own tables for every slot, each column taken
        from its slot."""
        if not self.slot:
            return self.original(x, ids, *args, **kwargs)
        slot = self.slot[(*args, *kwargs.values())]
        every = [self.original(x, one, *args, **kwargs) for one in ids]
        return tuple(combine(list(tables), slot) for tables in zip(*every, strict=True))


def kinds(rotary: Any) -> list[tuple[str, ...]]:
    """What a rotary embedding takes behind the positions: nothing, or the type of layer that its table is for."""
    return [(kind,) for kind in sorted(getattr(rotary, "layer_types", None) or ())] or [()]


def axis_count(rotary: Any) -> int:
    """How many axes the positions of a model with several have. Compass has a dictionary of sections, by layer."""
    told = getattr(rotary, "mrope_section", None)
    return len(told) if isinstance(told, (list, tuple)) and told else 3


def sections_of(rotary: Any) -> tuple[int, ...]:
    """How many pairs rotate by each axis, once for every kind of layer that differs."""
    found = dict.fromkeys(sections(axes(rotary, *kind)) for kind in kinds(rotary))
    return tuple(number for each in found for number in each)


def slot_of_column(rotary: Any, slots: int, *kind: str) -> Tensor:
    """[2 P] long: the slot that each column of a rotary table reads."""
    axis, halves = _pairs(rotary, *kind)
    slot = slot_of_pair(axis, slots)
    return slot.repeat(2) if halves else slot.repeat_interleave(2)


def axes(rotary: Any, *kind: str) -> Tensor:
    """[P] long: which axis of the positions each pair of a rotary embedding rotates by, -1 = it does not rotate."""
    return _pairs(rotary, *kind)[0]


def _pairs(rotary: Any, *kind: str) -> tuple[Tensor, bool]:
    """The axis of every pair, and whether the columns of a pair lie half a table apart, rather than side by side. Found
    by calling the embedding with position 1 on one axis and 0 on the others."""
    if any(buffer.is_meta for buffer in rotary.buffers()):  # a model without weights
        with torch.device("cpu"):
            rotary = type(rotary)(rotary.config)
    device = next((buffer.device for buffer in rotary.buffers()), torch.device("cpu"))
    count = axis_count(rotary) if hasattr(rotary, "mrope_section") else 1
    sines = []
    for number in range(count):
        ids = torch.zeros(count, 1, 1, dtype=torch.long, device=device)
        ids[number] = 1
        forward = type(rotary).forward
        _, sin = forward(rotary, torch.zeros(1, 1, 1, device=device), ids if count > 1 else ids[0], *kind)
        sines.append(sin[0, 0])
    sin = torch.stack(sines)  # [axes, 2 P]
    half = sin.shape[1] // 2
    halves = torch.equal(sin[:, :half], sin[:, half:])
    if not halves and not torch.equal(sin[:, ::2], sin[:, 1::2]):
        raise OptionError(
            f"PPE: {type(rotary).__name__} turns column c together with neither column c + {half} nor its neighbour"
        )
    turns = (sin[:, :half] if halves else sin[:, ::2]) != 0
    axis = turns.long().mul(torch.arange(1, count + 1, device=device)[:, None]).amax(0) - 1
    return axis, halves
