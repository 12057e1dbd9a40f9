"""Decisions: from units of tokens and a budget to a TokenMap, for every kind of model.

A unit has its own budget: a picture, a crop of it, a frame, a page. Units of different lengths form one padded batch; a
method's decision for it is a TokenMap with one row per unit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from vtc.budget import kept_at_once, kept_of_units
from vtc.errors import InputError
from vtc.layout import Grid, Unit
from vtc.methods.base import Method
from vtc.token_map import TokenMap
from vtc.tokens import Tokens

UnitsOf = TypeVar("UnitsOf", bound="Units")


class Units:
    """Tokens by unit: one row per unit, padded.

    Attributes:
        rows: [n, C], all tokens; units: which of them each unit holds.
        index: [U, N] long, indices into `rows`, -1 = padding; mask: [U, N] bool, which are real, None = all.
        frames: how many tokens each of a unit's frames has; one frame, unless units were joined.
    """

    def __init__(self, rows: Tensor, units: Sequence[Unit]) -> None:
        self.rows, self.units = rows, list(units)
        padded = torch.nn.utils.rnn.pad_sequence([unit.rows for unit in self.units], True, -1)
        self.index = padded.to(rows.device)
        self.mask = self.index >= 0 if bool((padded < 0).any()) else None
        self.frames: tuple[tuple[int, ...], ...] = tuple((n,) for n in self.lengths)

    @property
    def grids(self) -> tuple[Grid | None, ...]:
        return tuple(unit.grid for unit in self.units)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(unit.rows) for unit in self.units)

    def joined(self: UnitsOf, groups: list[list[int]]) -> UnitsOf:
        """The same tokens, with the units of each group joined into one (frames into an event)."""
        out = copy.copy(self)
        rows = [torch.cat([self.units[i].rows for i in group]) for group in groups]
        units = [
            self.units[group[0]] if len(group) == 1 else Unit(each, self.units[group[0]].item)
            for each, group in zip(rows, groups, strict=True)
        ]
        Units.__init__(out, self.rows, units)
        out.frames = tuple(tuple(n for i in group for n in self.frames[i]) for group in groups)
        return out

    def joined_within(self: UnitsOf, groups: Sequence[Sequence[int]]) -> UnitsOf:
        """The same for some of the units; the others stay as they are. Units keep the order of their first."""
        inside = {unit for group in groups for unit in group}
        return self.joined(sorted([list(g) for g in groups] + [[i] for i in range(len(self.units)) if i not in inside]))

    def packed(self, x: Tensor) -> Tensor:
        """[n, ...] -> [U, N, ...], 0 on padding."""
        return self.padded(x[self.index.clamp(min=0)])

    def padded(self, x: Tensor) -> Tensor:
        """[U, N, ...] with padding set to 0."""
        return x if self.mask is None else x.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (x.ndim - 2)), 0)

    def tokens(self, method: Method, **fields: Any) -> Tokens:
        """The method's input; `fields`: further fields of `Tokens`, or features other than the rows themselves.

        Raises:
            InputError: the method needs a grid for every unit, and one has none.
        """
        if "grid" in method.needs and None in self.grids:
            raise InputError(
                f"{method.name} needs every image to fill a grid, but one here does not, or of an unknown size (cut to "
                "its shape, class tokens among the patches, not square where the model folds squares, or budgets "
                "pooled): use another method"
            )
        if "frames" in method.needs:
            fields["frames"] = self.frames
        fields.setdefault("features", self.packed(self.rows.detach()))
        return Tokens(mask=self.mask, grid=self.grids, **fields)

    def removals(self, keep: float | int, left: Sequence[int] | None = None) -> int | Tensor:
        """How many tokens of every unit to remove, of those that are `left` (default: all): an int if all units have
        the same length, else [U]."""
        counts = self.lengths if left is None else left
        return self.gone(kept_of_units(keep, counts, [unit.item for unit in self.units]), counts)

    def gone(self, kept: Sequence[int], left: Sequence[int] | None = None) -> int | Tensor:
        """The same if `kept` tokens of every unit stay."""
        counts = self.lengths if left is None else left
        gone = [n - k for n, k in zip(counts, kept, strict=True)]
        if len(set(counts)) == 1 and len(set(gone)) == 1:
            return gone[0]
        return torch.tensor(gone, device=self.rows.device)


def decide(method: Method, tokens: Tokens, removed: int | Tensor) -> TokenMap:
    """The method's decision, in as many rounds as needed; `removed`: how many tokens of every unit to remove, an int or
    [U]."""
    if isinstance(removed, Tensor) and tokens.mask is None:
        tokens = replace(tokens, mask=torch.ones(tokens.features.shape[:2], dtype=torch.bool, device=removed.device))
    if not bool(torch.as_tensor(removed).any()):
        kept = torch.ones(tokens.features.shape[:2], dtype=torch.bool, device=tokens.features.device)
        return TokenMap.from_anchors(kept if tokens.mask is None else tokens.mask)
    return in_rounds(method.decide, tokens, removed) if method.halves else method.decide(tokens, removed)


def in_rounds(decide: Callable[[Tokens, int | Tensor], TokenMap], tokens: Tokens, removed: int | Tensor) -> TokenMap:
    """The decision of a method that removes at most half in one round (`halves`): as many rounds as `removed` (an int
    or, with a mask, [B]) needs. Tokens merged in one round count as one token in the next."""
    total: TokenMap | None = None
    while True:
        if isinstance(removed, Tensor):
            assert tokens.mask is not None
            now: int | Tensor = torch.minimum(removed, (tokens.mask.sum(1) - tokens.prefix).clamp(min=0) // 2)
        else:
            now = min(removed, (tokens.features.shape[1] - tokens.prefix) // 2)
        step, removed = decide(tokens, now), removed - now
        total = step if total is None else total.compose(step)
        if not (bool((removed > 0).any()) if isinstance(removed, Tensor) else removed):
            return total
        tokens = replace(
            tokens,
            features=step.merge(tokens.features),
            layer_keys=None if tokens.layer_keys is None else step.merge(tokens.layer_keys),
            size=step.size,
            mask=None if tokens.mask is None else step.mask(),
        )


def over_frames(units: UnitsOf, videos: Sequence[Sequence[int]], method: Method) -> tuple[UnitsOf, list[int]]:
    """The units in which a method sees videos that have one budget each, and how many tokens stay of every unit.

    Whole videos, for a method that reads frames itself; else windows of frames with their shares (`Method.shares`).

    Args:
        videos: the units of every video, its frames in order.
    """
    assert method.keep is not None
    of_video = {i for video in videos for i in video}
    pictures = [i for i in range(len(units.units)) if i not in of_video]
    lengths, items = [units.lengths[i] for i in pictures], [units.units[i].item for i in pictures]
    stays = lengths if method.only_videos else kept_of_units(method.keep, lengths, items)
    kept = dict(zip(pictures, stays, strict=True))  # by the first unit of what is seen together
    seen: list[list[int]] = []
    for video in videos:
        frames = tuple(units.lengths[i] for i in video)
        if method.shares is None:
            kept[video[0]] = method.kept_of_video(frames)
            seen.append(list(video))
            continue
        x = torch.cat([units.rows[units.units[i].rows.to(units.rows.device)] for i in video]).detach()
        shares = method.shares.of(x, frames, kept_at_once(method.keep, sum(frames)))
        for window in method.shares.windows(x, frames):
            kept[video[window[0]]] = sum(shares[i] for i in window)
            seen.append([video[i] for i in window])
    whole = units.joined_within([group for group in seen if len(group) > 1])
    return whole, [kept[i] for i in sorted(kept)]


def regroup(slot: Tensor, rank: Tensor) -> TokenMap:
    """A map from the slot [B, N] of every token (-1 = none, slots of any numbering) and its rank there. A slot's anchor
    is its token of lowest rank that is left: the one of rank 0 may have been removed."""
    tokens = slot.shape[1]
    place = torch.arange(tokens, device=slot.device).expand_as(slot)
    spare = int(slot.max()) + 1 if slot.numel() else 0
    key = torch.where(slot < 0, spare, slot)
    order = rank * tokens + place
    mine = order.new_full((slot.shape[0], spare + 1), tokens**2).scatter_reduce(1, key, order, "amin").gather(1, key)
    kept = (order == mine) & (slot >= 0)
    source = place.masked_fill(kept | (slot < 0), -1)
    return TokenMap.from_anchors(kept, (source, mine % tokens, -rank.float()))


def in_events(
    units: UnitsOf, videos: Sequence[Sequence[int]], token_map: TokenMap, method: Method
) -> tuple[UnitsOf, TokenMap, str]:
    """Cluster the frames of every video into events by their means, and merge the tokens of each event, already merged
    frame by frame, again.

    Args:
        videos: the units of every video, its frames in order.
        token_map: the merges inside the frames.

    Returns:
        The units with events in place of frames, the map from their original tokens, and a note.
    """
    if not videos:
        return units, token_map, ""
    weight = token_map.size / token_map.size.sum(1, keepdim=True).clamp(min=1)
    tokens = token_map.merge(units.packed(units.rows.detach()).float())
    means = (tokens * weight[..., None]).sum(1)  # the mean over all tokens of a frame
    events = [[frames[i] for i in event] for frames in videos for event in method.events_of(means[list(frames)])]
    of_video = {unit for event in events for unit in event}
    groups = sorted(events + [[unit] for unit in range(len(units.units)) if unit not in of_video])
    whole = units.joined(groups)

    # The merges inside the frames, in terms of the events.
    unit = torch.arange(len(units.units), device=units.index.device)[:, None]
    real = units.index >= 0
    slot, rank = (torch.empty(len(units.rows), dtype=torch.long, device=unit.device) for _ in range(2))
    slot[units.index[real]] = (unit * token_map.slots + token_map.group)[real]
    rank[units.index[real]] = token_map.rank[real]
    first = regroup(whole.packed(slot).masked_fill(whole.index < 0, -1), whole.packed(rank))

    left = first.mask().sum(1).tolist()
    assert isinstance(method.keep, float)
    keep = [method.keep if group[0] in of_video else 1.0 for group in groups]
    gone = [n - kept_at_once(k, n) for n, k in zip(left, keep, strict=True)]
    merged = Tokens(first.merge(whole.packed(whole.rows.detach())), size=first.size, mask=first.mask())
    step = decide(method, merged, torch.tensor(gone, device=unit.device))
    return whole, first.compose(step), f"{len(events)} events of {len(of_video)} frames"
