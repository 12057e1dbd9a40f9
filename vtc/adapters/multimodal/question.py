"""From the image tokens of a call to what a method sees, and from its answer to the columns of the prompt that stay."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.multimodal.family import Kind, Layout, Unit
from vtc.errors import InputError, OptionError
from vtc.methods.base import Method, Tokens, in_rounds
from vtc.positions import members
from vtc.token_map import TokenMap


@dataclass(frozen=True)
class Encoded:
    """What is known of an encoder's output: how its tokens are laid out, the evidence, what its tower merged."""

    owner: Any  # the intake that was there
    lengths: tuple[int, ...]  # of its items (images, videos)
    layout: Layout
    evidence: dict[str, Tensor]
    merged: TokenMap | None = None

    def repeated(self, placeholders: list[int], times: int) -> Encoded:
        """For prompts that were each repeated `times`, with their images, one after the other (beams)."""
        first: list[range] = []  # of every prompt, its items
        at = 0
        for count in placeholders[::times]:
            start = at
            while count > 0:
                count -= self.lengths[at]
                at += 1
            first.append(range(start, at))
        order = [item for items in first for _ in range(times) for item in items]
        edges = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        old = torch.cat([torch.arange(edges[item], edges[item + 1]) for item in order])
        units, start = [], 0
        for new, item in enumerate(order):
            for unit in self.layout.units:
                if edges[item] <= int(unit.rows[0]) < edges[item + 1]:
                    units.append(Unit(unit.rows - edges[item] + start, new, unit.grid))
            start += self.lengths[item]
        source = self.layout.source
        layout = Layout(tuple(units), old if source is None else source[old])
        evidence = {name: x[old.to(x.device)] for name, x in self.evidence.items()}
        return replace(self, lengths=tuple(self.lengths[i] for i in order), layout=layout, evidence=evidence)


@dataclass
class Seen:
    """The tokens of one kind in one call: what encoded them, and which columns they fill."""

    kind: Kind
    output: Any
    encoded: Encoded
    rows: Tensor  # [n, C]
    columns: Tensor  # [n] long, prompt times length plus column


@dataclass(frozen=True)
class Record:
    """What happened in the last call that held images.

    Attributes:
        token_map: one row per unit (image, crop, frame) in prompt order.
        kept: [B, L] bool, the prompt's columns that the decoder was given; real: those that are no padding.
        columns: [B, S] long, which column each row of the decoder is; -1 = padding.
        places: [U, N] long, the column of the prompt that each of the map's inputs has; -1 = padding.
        rows, lengths: the prompt (batch row) of every unit, and its tokens before.
        layer: the decoder layer before which tokens went.
        notes: what the method said.
        earlier: what had happened before, at the decoder's input or in a layer before.
        grids: (rows, columns) of every unit, None where its tokens fill no rectangle.
    """

    token_map: TokenMap
    kept: Tensor
    real: Tensor
    columns: Tensor
    places: Tensor
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    layer: int = 0
    notes: str = ""
    earlier: Record | None = None
    grids: tuple[tuple[int, int] | None, ...] = ()

    def at(self, columns: Tensor) -> Tensor:
        """[B, K] long, the decoder's row of each of `columns` [B, K]; of a removed one, the last row before it."""
        here = present(self.kept, self.real).long()
        behind = here.flip(1).cumsum(1).flip(1) - here
        rows = self.columns.shape[1] - 1 - behind
        return rows.gather(1, columns.to(rows.device)).clamp(min=0)

    def take(self, values: Tensor, fill: float = 0) -> Tensor:
        """[B, L] of the prompt's columns -> [B, S] of the decoder's rows, `fill` on padding."""
        if values.shape != self.kept.shape:
            raise InputError(f"the values are {list(values.shape)}, but the prompt has {list(self.kept.shape)}")
        columns = self.columns.to(values.device)
        return values.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, fill)

    def labels(self, labels: Tensor) -> Tensor:
        """`take` of labels. Nothing says a prompt's first column, but in a ragged batch padding may come before it."""
        first = torch.arange(labels.shape[1], device=labels.device) == 0
        return self.take(labels.masked_fill(first, -100), -100)

    def shifted(self, labels: Tensor) -> Tensor:
        """The same of shifted labels, where each column holds its next one's: here that of the next that stays."""
        columns = self.columns.to(labels.device)
        ahead = torch.nn.functional.pad(columns[:, 1:], (0, 1), value=labels.shape[1])
        return labels.gather(1, (ahead - 1).clamp(min=0)).masked_fill((columns < 0) | (ahead < 0), -100)

    @property
    def prompts(self) -> list[int]:
        """The length of every prompt after it, without padding."""
        real = self.real.gather(1, self.columns.clamp(min=0))
        return (real & (self.columns >= 0)).sum(1).tolist()


class Question:
    """All image tokens of a call as methods take them: one row per unit, padded.

    Attributes:
        rows: [n, C], the tokens of all kinds, one after the other; columns: [n], where they are in the call.
        units, prompts: the units in prompt order, and the batch row of each.
        index: [U, N] long into `rows`, -1 = padding; mask: which are real, None = all.
    """

    def __init__(self, seen: list[Seen], batch: int, length: int, pooled: bool) -> None:
        self.seen, self.batch, self.length = seen, batch, length
        self.rows = torch.cat([item.rows for item in seen])
        self.columns = torch.cat([item.columns for item in seen])
        self.spans: list[slice] = []
        units: list[Unit] = []
        start = 0
        for item in seen:
            # items are numbered apart by kind
            units += [Unit(u.rows + start, u.item + start, u.grid) for u in item.encoded.layout.units]
            self.spans.append(slice(start, start + len(item.rows)))
            start += len(item.rows)
        spots = self.columns.cpu()
        units.sort(key=lambda unit: int(spots[unit.rows[0]]))
        self.units = units
        self.prompts = [int(spots[unit.rows[0]]) // length for unit in units]
        if pooled:
            self.pool()
        self.arrange()

    def arrange(self) -> None:
        device = self.rows.device
        padded = torch.nn.utils.rnn.pad_sequence([unit.rows for unit in self.units], True, -1)
        self.index = padded.to(device)
        ragged = bool((padded < 0).any())
        self.mask = self.index >= 0 if ragged else None
        self.places = torch.where(self.index < 0, -1, self.columns.to(device)[self.index.clamp(min=0)] % self.length)

    @property
    def grids(self) -> tuple[tuple[int, int] | None, ...]:
        return tuple(unit.grid for unit in self.units)

    def pool(self) -> None:
        """All units of a prompt as one."""
        order = sorted(set(self.prompts))
        pairs = list(zip(self.units, self.prompts, strict=True))
        self.units = [Unit(torch.cat([u.rows for u, of in pairs if of == prompt]), prompt) for prompt in order]
        self.prompts = order

    def joined(self, groups: list[list[int]]) -> Question:
        """The same tokens with the units of each group as one (frames as an event)."""
        out = copy.copy(self)
        out.units = [
            Unit(torch.cat([self.units[i].rows for i in group]), self.units[group[0]].item) for group in groups
        ]
        out.prompts = [self.prompts[group[0]] for group in groups]
        out.arrange()
        return out

    def videos(self) -> list[list[int]]:
        """The units of every video, its frames in order."""
        spans = [span for item, span in zip(self.seen, self.spans, strict=True) if item.kind.name == "video"]
        frames: dict[int, list[int]] = {}
        for number, unit in enumerate(self.units):
            if any(span.start <= int(unit.rows[0]) < span.stop for span in spans):
                frames.setdefault(unit.item, []).append(number)
        return list(frames.values())

    def packed(self, x: Tensor) -> Tensor:
        """[n, ...] -> [U, N, ...], 0 on padding."""
        return self.padded(x[self.index.clamp(min=0)])

    def of_columns(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [U, N, ...], what the columns of the units' tokens have; 0 on padding."""
        return self.padded(x[torch.tensor(self.prompts, device=x.device)[:, None], self.places.clamp(min=0)])

    def padded(self, x: Tensor) -> Tensor:
        """[U, N, ...] with 0 on padding."""
        return x if self.mask is None else x.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (x.ndim - 2)), 0)

    def tokens(self, method: Method, **fields: Any) -> Tokens:
        """What the method sees, with the evidence that the encoders' outputs carry."""
        for name in self.seen[0].encoded.evidence:
            fields[name] = self.packed(torch.cat([item.encoded.evidence[name] for item in self.seen]))
        if "grid" in method.needs and None in self.grids:
            raise InputError(
                f"{method.name} needs every image to fill a grid, but one here does not, or of an unknown size (cut to "
                "its shape, class tokens among the patches, not square where the model folds squares, or budgets "
                "pooled): use another method"
            )
        fields.setdefault("features", self.packed(self.rows.detach()))
        return Tokens(mask=self.mask, grid=self.grids, **fields)

    def removals(self, keep: float | int | None, left: list[int] | None = None) -> int | Tensor:
        """How many tokens of every unit go, of those that are `left` (default: all): an int where all units have the
        same length, else [U]."""
        counts = [len(unit.rows) for unit in self.units] if left is None else left
        if isinstance(keep, float):
            gone = [n - max(1, round(n * keep)) for n in counts]
        else:
            assert keep is not None
            gone = [n - k for n, k in zip(counts, shares(keep, self.units), strict=True)]
        if len(set(counts)) == 1 and len(set(gone)) == 1:
            return gone[0]
        return torch.tensor(gone, device=self.rows.device)

    def answered(self, token_map: TokenMap, mask: Tensor | None, notes: str, layer: int = 0) -> tuple[Tensor, Record]:
        """Which of `rows` stay, and the record, given the prompt's padding mask [B, L]."""
        stays = torch.ones(len(self.rows), dtype=torch.bool, device=self.rows.device)
        flat = self.index.flatten()
        stays[flat[flat >= 0]] = False
        stays[self.anchors(token_map)] = True
        kept = torch.ones(self.batch * self.length, dtype=torch.bool, device=self.columns.device)
        kept[self.columns] = stays.to(kept.device)
        kept = kept.view(self.batch, self.length)
        real = torch.ones_like(kept) if mask is None else mask[:, -self.length :].bool()
        everything = torch.arange(self.length, device=kept.device).expand_as(kept)
        columns = everything if bool(stays.all()) else lay_out(kept, None if mask is None else real)
        lengths = tuple(len(unit.rows) for unit in self.units)
        prompts = tuple(self.prompts)
        grids = self.grids
        return stays, Record(token_map, kept, real, columns, self.places, prompts, lengths, layer, notes, grids=grids)

    def anchors(self, token_map: TokenMap) -> Tensor:
        """The rows that represent the slots, slot by slot."""
        return self.index.gather(1, token_map.anchor.clamp(min=0))[token_map.anchor >= 0]

    def carried(self, token_map: TokenMap, slots: int) -> Tensor | None:
        """[slots, B, L] long: the columns of the prompt whose positions every column carries; None = its own."""
        if slots == 1:
            return None
        out = torch.arange(self.length, device=self.places.device).repeat(slots, self.batch, 1)
        unit, slot = (token_map.anchor >= 0).nonzero(as_tuple=True)
        prompt = torch.tensor(self.prompts, device=out.device)[unit]
        for k, index in enumerate(members(token_map, slots)):
            out[k, prompt, self.places[unit, token_map.anchor[unit, slot]]] = self.places[unit, index[unit, slot]]
        return out

    def from_tower(self) -> TokenMap:
        """The map that the tower made, for the tokens that its patches became."""
        whole, source = self.seen[0].encoded.merged, self.seen[0].encoded.layout.source
        device = self.index.device
        if whole is None:
            return TokenMap.identity(self.index.shape[0], self.index.shape[1], device)
        patch = torch.arange(len(self.rows), device=device) if source is None else source.to(device)
        patch = patch[self.index.clamp(min=0)]  # [U, N], counted over the tower's batch
        crop, inside = patch // whole.group.shape[1], patch % whole.group.shape[1]
        slot = whole.group[crop, inside].masked_fill(self.index < 0, -1)
        return regroup(slot, whole.rank[crop, inside])


def decide_all(method: Method, tokens: Tokens, removed: int | Tensor) -> TokenMap:
    """The method's decision, in as many rounds as it takes: pairwise matching removes at most half in one."""
    if isinstance(removed, Tensor) and tokens.mask is None:
        tokens = replace(tokens, mask=torch.ones(tokens.features.shape[:2], dtype=torch.bool, device=removed.device))
    if not bool(torch.as_tensor(removed).any()):
        kept = torch.ones(tokens.features.shape[:2], dtype=torch.bool, device=tokens.features.device)
        return TokenMap.from_anchors(kept if tokens.mask is None else tokens.mask)
    return in_rounds(method.decide, tokens, removed) if method.halves else method.decide(tokens, removed)


def shares(keep: int, units: list[Unit]) -> list[int]:
    """`keep` tokens for every item (image, video), shared out over its units by their lengths, at least one each."""
    found = [0] * len(units)
    for item in {unit.item for unit in units}:
        mine = [i for i, unit in enumerate(units) if unit.item == item]
        total = sum(len(units[i].rows) for i in mine)
        if keep > total:
            raise OptionError(f"keep={keep} is more than the {total} tokens of an image; keep=1.0 keeps all")
        if keep < len(mine):
            raise OptionError(
                f"keep={keep} is less than one token for each of the {len(mine)} parts (crops, frames) of an image"
            )
        exact = [keep * len(units[i].rows) / total for i in mine]
        share = [max(1, int(x)) for x in exact]
        while sum(share) > keep:  # what was lifted to 1 is taken from the largest
            share[max(range(len(share)), key=lambda j: share[j])] -= 1
        rest = sorted(range(len(mine)), key=lambda j: (int(exact[j]) - exact[j], j))  # largest remainder first
        for j in rest[: keep - sum(share)]:
            share[j] += 1
        for i, count in zip(mine, share, strict=True):
            found[i] = count
    return found


def regroup(slot: Tensor, rank: Tensor) -> TokenMap:
    """A map from the slot [B, N] of every token (-1 = none, slots of any numbering) and its rank there. A slot's anchor
    is the token of lowest rank that is left: the one of rank 0 may have been cut away."""
    tokens = slot.shape[1]
    place = torch.arange(tokens, device=slot.device).expand_as(slot)
    spare = int(slot.max()) + 1 if slot.numel() else 0
    key = torch.where(slot < 0, spare, slot)
    order = rank * tokens + place
    mine = order.new_full((slot.shape[0], spare + 1), tokens**2).scatter_reduce(1, key, order, "amin").gather(1, key)
    kept = (order == mine) & (slot >= 0)
    source = place.masked_fill(kept | (slot < 0), -1)
    return TokenMap.from_anchors(kept, (source, mine % tokens, -rank.float()))


def lay_out(kept: Tensor, mask: Tensor | None) -> Tensor:
    """Columns [B, S] of the shorter prompt: the kept ones in order, -1 = padding. Padding in front of a prompt is made
    anew; behind and inside it stays, so that columns counted from the end are where they were."""
    if mask is not None and mask.shape != kept.shape:
        raise InputError(f"attention_mask has {mask.shape[1]} columns, but the prompt has {kept.shape[1]}")
    here = present(kept, mask)
    longest = max(1, int(here.sum(1).max()))
    order = here.long().argsort(dim=1, stable=True)[:, -longest:]  # absent first
    real = here if mask is None else here & mask
    return order.masked_fill(~real.gather(1, order), -1)


def present(kept: Tensor, mask: Tensor | None) -> Tensor:
    """[B, L] bool, which columns the shorter prompt has: the kept ones without the padding in front."""
    return kept if mask is None else kept & (mask.long().cumsum(1) > 0)
