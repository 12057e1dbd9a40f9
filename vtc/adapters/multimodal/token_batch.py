"""From the image tokens of a call to a method's input, and from its decision to the columns of the prompt that stay."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.multimodal.entrance import Left
from vtc.adapters.multimodal.families.base import Modality
from vtc.adapters.report import Report, plain
from vtc.budget import kept_of_units
from vtc.decide import Units, over_frames, regroup
from vtc.errors import InputError
from vtc.layout import Layout, Unit
from vtc.macs import decoder_macs
from vtc.methods.base import Method
from vtc.positions import members
from vtc.token_map import TokenMap
from vtc.tokens import Tokens


@dataclass(frozen=True)
class EncodedFeatures:
    """What is known about an encoder's output: how its tokens are laid out, the evidence, what its tower merged."""

    owner: Any  # the `Encoders` that produced it
    lengths: tuple[int, ...]  # number of tokens of each item (image, video)
    layout: Layout
    evidence: dict[str, Tensor]
    merged: TokenMap | None = None
    left: Left | None = None  # what left before the tower
    decided: bool = False  # what is left is what stays: a stream

    def repeated(self, placeholders: list[int], times: int) -> EncodedFeatures:
        """The same for prompts that were each repeated `times`, with their images, one after the other (beams)."""
        first: list[range] = []  # the items of every prompt
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
        left = None if self.left is None else self.left.repeated(old)
        lengths = tuple(self.lengths[i] for i in order)
        return replace(self, lengths=lengths, layout=layout, evidence=evidence, left=left)


@dataclass
class PlacedTokens:
    """The tokens of one modality in one call: what encoded them, and which columns they fill."""

    modality: Modality
    output: Any
    encoded: EncodedFeatures
    rows: Tensor  # [n, C]
    columns: Tensor  # [n] long, prompt * length + column


@dataclass(frozen=True)
class CallRecord:
    """What happened in the last call that held images.

    Attributes:
        token_map: one row per unit (image, crop, frame) in prompt order.
        kept: [B, L] bool, the prompt's columns that the decoder received; real: those that are not padding.
        columns: [B, S] long, which column each row of the decoder is; -1 = padding.
        places: [U, N] long, the prompt's column of each of the map's inputs; -1 = padding.
        rows, lengths: the prompt (batch row) of every unit, and its number of tokens before.
        layer: the decoder layer before which tokens were removed.
        notes: the method's notes.
        earlier: the record of the previous reduction, at the decoder's input or before an earlier layer.
        grids: (rows, columns) of every unit, None if its tokens do not fill a rectangle.
        frames: of every video the tokens that stay of each frame.
        tower: the tower's multiply-adds, if patches may leave before it: on all of them, and on those that stayed.
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
    earlier: CallRecord | None = None
    grids: tuple[tuple[int, int] | None, ...] = ()
    frames: tuple[tuple[int, ...], ...] = ()
    tower: tuple[int, int] = (0, 0)

    def at(self, columns: Tensor) -> Tensor:
        """[B, K] long, the decoder's row of each of `columns` [B, K]; for a removed one, the last row before it."""
        here = present(self.kept, self.real).long()
        behind = here.flip(1).cumsum(1).flip(1) - here
        rows = self.columns.shape[1] - 1 - behind
        return rows.gather(1, columns.to(rows.device)).clamp(min=0)

    def take(self, values: Tensor, fill: float = 0) -> Tensor:
        """Values of the prompt's columns [B, L] -> of the decoder's rows [B, S], `fill` on padding."""
        if values.shape != self.kept.shape:
            raise InputError(f"the values are {list(values.shape)}, but the prompt has {list(self.kept.shape)}")
        columns = self.columns.to(values.device)
        return values.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, fill)

    def labels(self, labels: Tensor) -> Tensor:
        """`take` of labels. Nothing predicts a prompt's first column, so its label is dropped: in a ragged batch,
        padding may precede it."""
        first = torch.arange(labels.shape[1], device=labels.device) == 0
        return self.take(labels.masked_fill(first, -100), -100)

    def shifted(self, labels: Tensor) -> Tensor:
        """The same for shifted labels, where each column holds the label of the next: here of the next that stays."""
        columns = self.columns.to(labels.device)
        ahead = torch.nn.functional.pad(columns[:, 1:], (0, 1), value=labels.shape[1])
        return labels.gather(1, (ahead - 1).clamp(min=0)).masked_fill((columns < 0) | (ahead < 0), -100)

    @property
    def prompts(self) -> list[int]:
        """The length of every prompt after the reduction, without padding."""
        real = self.real.gather(1, self.columns.clamp(min=0))
        return (real & (self.columns >= 0)).sum(1).tolist()


class TokenBatch(Units):
    """All image tokens of a call, their units in prompt order.

    Attributes:
        columns: [n], the rows' columns in the call; places: [U, N], their columns in their prompt, -1 = padding.
        prompts: the batch row of every unit.
        whole: the units' lengths before patches left in front of the tower; None = none left.
    """

    whole: tuple[int, ...] | None = None

    def __init__(self, items: list[PlacedTokens], size: int, length: int, pooled: bool) -> None:
        self.items, self.size, self.length = items, size, length
        rows = torch.cat([item.rows for item in items])
        self.columns = torch.cat([item.columns for item in items])
        self.spans: list[slice] = []
        units: list[Unit] = []
        start = 0
        for item in items:
            # items are numbered separately per modality
            units += [Unit(u.rows + start, u.item + start, u.grid) for u in item.encoded.layout.units]
            self.spans.append(slice(start, start + len(item.rows)))
            start += len(item.rows)
        spots = self.columns.cpu()
        units.sort(key=lambda unit: int(spots[unit.rows[0]]))
        self.prompts = [int(spots[unit.rows[0]]) // length for unit in units]
        self.frames_of_videos = self._frames(units)
        if pooled:  # all units of a prompt become one
            pairs = list(zip(units, self.prompts, strict=True))
            self.prompts = sorted(set(self.prompts))
            units = [Unit(torch.cat([u.rows for u, of in pairs if of == prompt]), prompt) for prompt in self.prompts]
        super().__init__(rows, units)
        self.places = self.placed()

    def placed(self) -> Tensor:
        """[U, N], the column of every unit's tokens in their prompt; -1 = padding."""
        columns = self.columns.to(self.index.device)[self.index.clamp(min=0)] % self.length
        return torch.where(self.index < 0, -1, columns)

    def joined(self, groups: list[list[int]]) -> TokenBatch:
        out = super().joined(groups)
        out.prompts = [self.prompts[group[0]] for group in groups]
        out.places = out.placed()
        return out

    def entered(self) -> tuple[TokenBatch, TokenMap | None]:
        """The tokens whose patches entered the tower, and the map from all tokens to them; None = no patch left."""
        lefts = [item.encoded.left for item in self.items]
        if all(left is None or left.all for left in lefts):
            return self, None
        kept = torch.cat([left.kept for left in lefts if left is not None])
        units = []
        for unit in self.units:
            rows = unit.rows[kept[unit.rows]]
            units.append(Unit(rows, unit.item, unit.grid if len(rows) == len(unit.rows) else None))
        out = copy.copy(self)
        Units.__init__(out, self.rows, units)
        out.whole = self.lengths
        out.places = out.placed()
        return out, TokenMap.from_kept(kept.to(self.index.device)[self.index.clamp(min=0)] & (self.index >= 0))

    def removals(self, keep: float | int, left: Sequence[int] | None = None) -> int | Tensor:
        """The same; a number of tokens is divided by the images as they were, and all that is left of one may stay."""
        if self.whole is None or isinstance(keep, float):
            return super().removals(keep, left)
        kept = kept_of_units(keep, self.whole, [unit.item for unit in self.units])
        return self.gone([min(n, k) for n, k in zip(self.lengths, kept, strict=True)])

    def seen_by(self, method: Method, **fields: Any) -> Tokens:
        """What the method sees, with the evidence that the encoders' outputs carry."""
        for name in self.items[0].encoded.evidence:
            fields[name] = self.packed(torch.cat([item.encoded.evidence[name] for item in self.items]))
        return self.tokens(method, **fields)

    def budgeted(self, method: Method) -> tuple[TokenBatch, int | Tensor]:
        """The units that have a budget each, and how many tokens of each to remove: an int, or [U]."""
        assert method.keep is not None  # otherwise the method was refused
        if not method.by_video:
            return self, self.removals(method.keep)
        seen, kept = over_frames(self, self.videos(), method)
        return seen, seen.gone(kept)

    def _frames(self, units: list[Unit]) -> list[list[Tensor]]:
        """The rows of every frame of every video."""
        spans = [span for item, span in zip(self.items, self.spans, strict=True) if item.modality.name == "video"]
        frames: dict[int, list[Tensor]] = {}
        for unit in units:
            if any(span.start <= int(unit.rows[0]) < span.stop for span in spans):
                frames.setdefault(unit.item, []).append(unit.rows)
        return list(frames.values())

    def videos(self) -> list[list[int]]:
        """The units of every video, its frames in order; only if no units were joined."""
        number = {int(unit.rows[0]): i for i, unit in enumerate(self.units)}
        return [[number[int(rows[0])] for rows in frames] for frames in self.frames_of_videos]

    def of_columns(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [U, N, ...], the values at the columns of the units' tokens; 0 on padding."""
        return self.padded(x[torch.tensor(self.prompts, device=x.device)[:, None], self.places.clamp(min=0)])

    def answered(
        self, token_map: TokenMap, mask: Tensor | None, notes: str, layer: int = 0
    ) -> tuple[Tensor, CallRecord]:
        """Which of `rows` stay, and the record, given the prompt's padding mask [B, L]."""
        stays = torch.ones(len(self.rows), dtype=torch.bool, device=self.rows.device)
        flat = self.index.flatten()
        stays[flat[flat >= 0]] = False
        stays[self.anchors(token_map)] = True
        kept = torch.ones(self.size * self.length, dtype=torch.bool, device=self.columns.device)
        kept[self.columns] = stays.to(kept.device)
        kept = kept.view(self.size, self.length)
        real = torch.ones_like(kept) if mask is None else mask[:, -self.length :].bool()
        everything = torch.arange(self.length, device=kept.device).expand_as(kept)
        columns = everything if bool(stays.all()) else lay_out(kept, None if mask is None else real)
        lengths = tuple(len(unit.rows) for unit in self.units)
        prompts = tuple(self.prompts)
        grids = self.grids
        left = stays.cpu() if self.frames_of_videos else stays
        frames = tuple(tuple(int(left[rows].sum()) for rows in video) for video in self.frames_of_videos)
        return stays, CallRecord(
            token_map, kept, real, columns, self.places, prompts, lengths, layer, notes, grids=grids, frames=frames
        )

    def anchors(self, token_map: TokenMap) -> Tensor:
        """The rows that represent the slots, slot by slot."""
        return self.index.gather(1, token_map.anchor.clamp(min=0))[token_map.anchor >= 0]

    def carried(self, token_map: TokenMap, slots: int) -> Tensor | None:
        """[slots, B, L] long: the columns of the prompt whose positions every column carries; None = its own."""
        if slots == 1:
            return None
        out = torch.arange(self.length, device=self.places.device).repeat(slots, self.size, 1)
        unit, slot = (token_map.anchor >= 0).nonzero(as_tuple=True)
        prompt = torch.tensor(self.prompts, device=out.device)[unit]
        for k, index in enumerate(members(token_map, slots)):
            out[k, prompt, self.places[unit, token_map.anchor[unit, slot]]] = self.places[unit, index[unit, slot]]
        return out

    def from_tower(self) -> TokenMap:
        """The tower's map, for the tokens that its patches became."""
        whole, source = self.items[0].encoded.merged, self.items[0].encoded.layout.source
        device = self.index.device
        if whole is None:
            return TokenMap.identity(self.index.shape[0], self.index.shape[1], device)
        patch = torch.arange(len(self.rows), device=device) if source is None else source.to(device)
        patch = patch[self.index.clamp(min=0)]  # [U, N], counted over the tower's batch
        crop, inside = patch // whole.group.shape[1], patch % whole.group.shape[1]
        slot = whole.group[crop, inside].masked_fill(self.index < 0, -1)
        return regroup(slot, whole.rank[crop, inside])


def lay_out(kept: Tensor, mask: Tensor | None) -> Tensor:
    """Columns [B, S] of the shorter prompt: the kept ones in order, -1 = padding. Padding in front of a prompt is
    recomputed; padding after and inside it stays, so that columns counted from the end keep their places."""
    if mask is not None and mask.shape != kept.shape:
        raise InputError(f"attention_mask has {mask.shape[1]} columns, but the prompt has {kept.shape[1]}")
    here = present(kept, mask)
    longest = max(1, int(here.sum(1).max()))
    order = here.long().argsort(dim=1, stable=True)[:, -longest:]  # absent columns first
    real = here if mask is None else here & mask
    return order.masked_fill(~real.gather(1, order), -1)


def present(kept: Tensor, mask: Tensor | None) -> Tensor:
    """[B, L] bool, which columns the shorter prompt has: the kept ones without the padding in front."""
    return kept if mask is None else kept & (mask.long().cumsum(1) > 0)


def prefill_report(
    name: str, where: str, decoder: Any, record: CallRecord, inside: Report | None, bare: bool
) -> Report:
    """What a call did in its decoder's prefill.

    Args:
        inside: what the tower did, if the method works there. bare: prompts without an image came after that call.
    """
    before, after = record.lengths, tuple(record.token_map.mask().sum(1).tolist())
    dense = record.real.sum(1).tolist()
    steps = [record]  # latest first
    while steps[-1].earlier is not None:
        steps.append(steps[-1].earlier)
    prompts, kept = [], []  # per layer: the lengths of the prompts, and the fraction of image tokens left
    for layer in range(len(decoder.layers)):
        there = next((step for step in steps if step.layer <= layer), None)
        prompts.append(dense if there is None else there.prompts)
        kept.append(1.0 if there is None else int(there.token_map.mask().sum()) / max(1, sum(before)))
    dense_macs = sum(decoder_macs(decoder, n) for n in dense)
    macs = sum(decoder_macs(decoder, n) for n in zip(*prompts, strict=True))
    if inside is not None:
        dense_macs, macs = dense_macs + inside.macs_before, macs + inside.macs_after
    dense_macs, macs = dense_macs + record.tower[0], macs + record.tower[1]
    said = [step.notes for step in reversed(steps)]
    if bare:
        said.append("the last prompt held no image: this is of the last one that did")
    return Report(
        name,
        len(before),
        before,
        after,
        tuple((plain(counts),) * 2 for counts in prompts),
        dense_macs,
        macs,
        where,
        "; ".join(dict.fromkeys(filter(None, said))),
        tuple(dense),
        tuple(kept) if len(set(kept)) > 1 else (),
        record.frames,
    )
