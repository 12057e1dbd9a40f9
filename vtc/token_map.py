"""TokenMap: which input token went to which output token, with what weight. It is the only data passed between the
parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc import ops


@dataclass(frozen=True, eq=False, repr=False)
class TokenMap:
    """Maps the N input tokens of each of B images to M output tokens ("slots"), which keep the input's order.

    Attributes:
        group: [B, N] long, the slot of each input token; -1 = dropped or padding.
        anchor: [B, M] long, ascending, the input token that represents each slot; -1 = padding of a ragged batch. Where
            the slots are a smaller rectangle (`vtc.functional.cubist`), row by row in that one instead.
        size: [B, M] float32, how many tokens every slot stands for; merges preserve the total; 0 on padding.
        order: [B, K] long, the order in which a selector picked its tokens, -1-padded; None for merges.
        weight: [B, N] float32, the sizes of the input tokens; None = all 1.
        closeness: [B, N] float32, how near each token is to its anchor (only the order matters); None = unknown.
        complete: no token is dropped or padding, so that no index is -1.

    What a layer of an encoder does not read (the anchors and closeness of a round, a composed map), and what follows
    from a selection's `order`, is computed when it is asked for.
    """

    group: Tensor
    anchor: Tensor
    size: Tensor
    order: Tensor | None = None
    weight: Tensor | None = None
    closeness: Tensor | None = field(default_factory=lambda: None)  # no attribute of the class, which would be found
    complete: bool = False
    _picked: int | None = None  # N, if the map is the selection `order`, which gives the rest
    _parts: tuple[TokenMap, TokenMap] | None = None  # the maps it was composed from, to compute ranks
    _round: tuple[Tensor, Tensor, int] | None = None  # source, score and prefix of `ops.pair_round`
    _whole: tuple[TokenMap, int] | None = None  # the map and the prefix that `drop_prefix` made this from, likewise

    # -- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device | None = None) -> TokenMap:
        """Every token alone in its own slot."""
        index = torch.arange(tokens, device=device).expand(batch, tokens)
        return cls(index, index, torch.ones(batch, tokens, device=device))

    @classmethod
    def from_anchors(
        cls,
        kept: Tensor,
        group_of: tuple[Tensor, Tensor, Tensor] | None = None,
        *,
        slots: int | None = None,
        weight: Tensor | None = None,
        order: Tensor | None = None,
    ) -> TokenMap:
        """A map whose slots are the `kept` tokens, with others optionally merged into them.

        Args:
            kept: [B, N] bool, the tokens that get a slot.
            group_of: (source, target, score), each [B, R]: source tokens (not kept) join the slots of their targets
                (kept); -1 = no pair. Tokens that are neither kept nor a source are dropped.
            slots: M, if it is known without looking at the data (required inside compiled graphs).
            weight: [B, N] sizes of the input tokens.
        """
        batch, tokens = kept.shape
        slots = (int(kept.sum(1).max()) if batch else 0) if slots is None else slots
        slot = kept.cumsum(1) - 1
        spare = torch.where(kept, slot, slots)
        index = torch.arange(tokens, device=kept.device).expand(batch, tokens)
        anchor = slot.new_full((batch, slots + 1), -1).scatter(1, spare, index)[:, :slots]
        group = slot.masked_fill(~kept, -1)
        closeness = None
        if group_of is not None:
            source, target, score = group_of
            column = torch.where(source < 0, tokens, source)  # missing pairs write to a spare column
            joined = _index(slot, target)
            group = torch.nn.functional.pad(group, (0, 1)).scatter(1, column, joined)[:, :tokens]
            closeness = score.new_full((batch, tokens + 1), float("inf")).scatter(1, column, score)[:, :tokens]
        load = torch.ones_like(group, dtype=torch.float32) if weight is None else weight.float()
        size = load.new_zeros(batch, slots + 1).scatter_add(1, torch.where(group < 0, slots, group), load)
        return cls(group, anchor, size[:, :slots], order=order, weight=weight, closeness=closeness)

    @classmethod
    def from_pairs(
        cls,
        tokens: int,
        pairs: tuple[Tensor, Tensor, Tensor],
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        complete: bool = False,
    ) -> TokenMap:
        """Every real token keeps its slot, except the sources of `pairs`, which join their targets' slots. complete:
        all tokens are real, and no pair is missing."""
        source, target, score = pairs
        if complete:
            group = ops.joined(tokens, source, target)
            size = ops.sizes(group, tokens - source.shape[1], weight)
            return cls._later(group=group, size=size, weight=weight, complete=True, _round=(source, score, 0))
        kept = torch.ones(len(source), tokens + 1, dtype=torch.bool, device=source.device)
        if mask is not None:
            kept[:, :tokens] = mask
        kept = kept.scatter(1, torch.where(source < 0, tokens, source), False)[:, :tokens]
        slots = tokens - source.shape[1] if mask is None else None
        return cls.from_anchors(kept, pairs, slots=slots, weight=weight)

    @classmethod
    def from_round(
        cls,
        metric: Tensor,
        r: int,
        prefix: int,
        weight: Tensor | None,
        form: tuple[str, float, float] | None = None,
        half: bool = False,
        protect: bool = False,
    ) -> TokenMap:
        """One round of pairwise merging of a batch without padding: `ops.pair_round`."""
        r = min(r, (metric.shape[1] - prefix) // 2)
        group, size, source, score = ops.pair_round(metric, weight, r, prefix, form, half, protect)
        return cls._later(group=group, size=size, weight=weight, complete=True, _round=(source, score, prefix))

    @classmethod
    def from_order(cls, order: Tensor, tokens: int, weight: Tensor | None = None) -> TokenMap:
        """The map that keeps the tokens of `order` [B, K], which is -1-padded, out of `tokens` and drops the others."""
        return cls._later(order=order, weight=weight, closeness=None, _picked=tokens)

    @classmethod
    def from_kept(cls, kept: Tensor) -> TokenMap:
        """The map that keeps the tokens where `kept` [B, N] bool is True, picked in their own order, and drops the
        others."""
        tokens = kept.shape[1]
        index = torch.arange(tokens, device=kept.device).expand_as(kept)
        first = torch.where(kept, index, tokens).sort(1).values[:, : int(kept.sum(1).max()) if len(kept) else 0]
        return cls.from_order(first.masked_fill(first == tokens, -1), tokens)

    @classmethod
    def _later(cls, **known: Any) -> TokenMap:
        """A map with fields that are computed when they are asked for; inside a compiled graph, which leaves out by
        itself what nobody asks for, at once."""
        self = object.__new__(cls)
        self.__dict__.update(known)
        if torch.compiler.is_compiling():
            for name in _LATER:
                getattr(self, name)
        return self

    def __getattr__(self, name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = _LATER[name](self)
        object.__setattr__(self, name, value)
        return value

    # -- using it -----------------------------------------------------------------------------------------------

    def merge(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, M, C]: mean of each slot's members, weighted by `weights` [B, N] (default: the sizes of the
        input tokens). Differentiable in x; padding slots are 0."""
        if weights is not None:
            return ops.merge(x, self.group, self.slots, weights)
        return ops.merge(x, self.group, self.slots, self.weight, self.size if self.complete else None)

    def largest(self, x: Tensor, members: int | None = None) -> Tensor:
        """[B, N, C] -> [B, M, C]: in every channel, of each slot's members the value with the largest magnitude. Of
        equal ones the anchor's, then the one with the lowest index. A map that was composed goes step by step.
        Differentiable in x; padding slots are 0.

        members: how many a slot has at most, in each step; None = counted, which a compiled graph cannot."""
        if self._parts is not None:
            first, later = self._parts
            return later.largest(first.largest(x, members), members)
        place = self._places([self._aside()])
        index = torch.arange(self.group.shape[1], device=x.device).expand_as(place)
        out = self.gather(x)
        if members is None:
            members = int(place.max()) + 1 if place.numel() else 0
        for k in range(1, members):
            spare = torch.where(place == k, self.group, self.slots)
            member = index.new_full((len(index), self.slots + 1), -1).scatter(1, spare, index)[:, : self.slots]
            other = ops.rows(x, member)
            out = torch.where(other.abs() > out.abs(), other, out)
        return out

    def gather(self, x: Tensor) -> Tensor:
        """[B, N, ...] -> [B, M, ...]: the anchors' rows; padding slots are 0."""
        return ops.rows(x, self.anchor, self.complete)

    def unmerge(self, y: Tensor, fill: int | str = 0) -> Tensor:
        """[B, M, ...] -> [B, N, ...]: every token gets its slot's row. Dropped tokens and padding get 0, or with
        fill="nearest" the row of the nearest token (in sequence order) that still has one."""
        if fill == "nearest" and not self.complete:
            group = self.group.gather(1, ops.nearest_kept(self.group >= 0))
        elif fill in (0, "nearest"):
            group = self.group
        else:
            raise ValueError(f'fill must be 0 or "nearest", not {fill!r}')
        return ops.rows(y, group, self.complete)

    def compose(self, later: TokenMap) -> TokenMap:
        """First this map, then `later` (whose N is this M): one map from the first input to the last output."""
        if later.group.shape != self.size.shape:
            raise ValueError(
                f"cannot compose: the later map takes {tuple(later.group.shape)} tokens, "
                f"this one gives {tuple(self.size.shape)}"
            )
        return self._later(
            size=later.size,
            order=None if later.order is None else _index(self.anchor, later.order),
            weight=self.weight,
            closeness=None,
            complete=self.complete and later.complete,
            _parts=(self, later),
        )

    @property
    def slots(self) -> int:
        """M."""
        return self.size.shape[1]

    def mask(self) -> Tensor:
        """[B, M] bool, True where a slot is real."""
        return self.anchor >= 0

    def drop_prefix(self, prefix: int) -> TokenMap:
        """The map of the tokens behind the first `prefix`, which must be alone in the first `prefix` slots."""
        if not prefix:
            return self

        def shift(index: Tensor) -> Tensor:
            return index - prefix if self.complete else torch.where(index < 0, index, index - prefix)

        order = None if self.order is None else shift(self.order)
        return TokenMap(
            shift(self.group[:, prefix:]),
            shift(self.anchor[:, prefix:]),
            self.size[:, prefix:],
            order=order,
            weight=None if self.weight is None else self.weight[:, prefix:],
            complete=self.complete,
            _whole=(self, prefix),
        )

    @property
    def rank(self) -> Tensor:
        """[B, N] long: each token's place inside its slot, nearest to the anchor first, the anchor itself 0; -1 =
        dropped. In a composed map the members of the merged slots take turns (round-robin)."""
        if self._whole is not None:
            whole, prefix = self._whole
            return whole.rank[:, prefix:]
        if self._parts is not None:
            first, later = self._parts
            child = _index(later.rank, first.group)
            keys = [child, first.rank]
        else:
            closeness = torch.zeros_like(self.group) if self.closeness is None else -self.closeness
            keys = [closeness, self._aside()]
        return self._places(keys)

    def _aside(self) -> Tensor:
        """[B, N] bool: which tokens are no anchor."""
        every = torch.ones_like(self.group, dtype=torch.bool)
        spare = torch.where(self.anchor < 0, self.group.shape[1], self.anchor)
        return torch.nn.functional.pad(every, (0, 1)).scatter(1, spare, False)[:, :-1]

    def _places(self, keys: list[Tensor]) -> Tensor:
        """[B, N] long: each token's place inside its slot by `keys`, the most significant last, and then by index."""
        # Stable sorts, least significant key first, leave the tokens slot by slot, in rank order.
        order = torch.arange(self.group.shape[1], device=self.group.device).expand_as(self.group)
        for key in [*keys, self.group]:
            order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
        ordered = self.group.gather(1, order)
        place = torch.arange(ordered.shape[1], device=ordered.device).expand_as(ordered)
        opens = torch.ones_like(ordered, dtype=torch.bool)
        opens[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        place = place - torch.where(opens, place, 0).cummax(dim=1).values
        return torch.empty_like(order).scatter(1, order, place).masked_fill(self.group < 0, -1)

    def __repr__(self) -> str:
        kept = self.mask().sum(1).tolist()
        dropped = bool((self.group < 0).any())
        kind = "selection" if self.order is not None else "merge"
        low, high = min(kept, default=0), max(kept, default=0)
        return (
            f"TokenMap({kind}: {self.group.shape[1]} -> {low if low == high else f'{low}-{high}'} tokens, "
            f"{len(kept)} image{'s' * (len(kept) != 1)}"
            f"{', some dropped' if dropped else ''}, largest slot {self.size.max().item() if high else 0:g})"
        )


def _index(values: Tensor, at: Tensor, complete: bool = False) -> Tensor:
    """values[b, at[b, i]], and -1 where at is -1."""
    if complete:
        return values.gather(1, at)
    if not values.shape[1]:
        return torch.full_like(at, -1)
    return torch.where(at < 0, -1, values.gather(1, at.clamp(min=0)))


# -- what is computed when it is asked for: of the steps that a map was composed from, or of a round ------------------


def _group(self: TokenMap) -> Tensor:
    if self._picked is not None:
        slot = torch.arange(self.anchor.shape[1], device=self.anchor.device).expand_as(self.anchor)
        spare = torch.where(self.anchor < 0, self._picked, self.anchor)
        return slot.new_full((len(slot), self._picked + 1), -1).scatter_(1, spare, slot)[:, : self._picked]
    assert self._parts is not None
    first, later = self._parts
    return _index(later.group, first.group, self.complete)


def _anchor(self: TokenMap) -> Tensor:
    if self._picked is not None:
        assert self.order is not None
        spare = torch.where(self.order < 0, self._picked, self.order).sort(1).values
        return spare.masked_fill_(spare == self._picked, -1)
    if self._parts is not None:
        first, later = self._parts
        return _index(first.anchor, later.anchor, self.complete)
    assert self._round is not None
    source, _, prefix = self._round
    slots, index = self.slots, torch.arange(self.group.shape[1], device=self.group.device)
    kept = self.group.scatter(1, source + prefix, slots)  # the sources write to a spare column
    return self.group.new_empty(kept.shape[0], slots + 1).scatter_(1, kept, index.expand_as(kept))[:, :slots]


def _closeness(self: TokenMap) -> Tensor:
    assert self._round is not None
    source, score, prefix = self._round
    return score.new_full(self.group.shape, float("inf")).scatter_(1, source + prefix, score)


def _size(self: TokenMap) -> Tensor:
    if self.weight is None:
        return (self.anchor >= 0).float()
    return ops.rows(self.weight.float()[..., None], self.anchor)[..., 0]


_LATER: dict[str, Callable[[TokenMap], Any]] = {
    "group": _group,
    "anchor": _anchor,
    "closeness": _closeness,
    "size": _size,
}
