"""Budgets: what a caller may request, and how many tokens it means.

Three kinds, each with its own rounding. **At once**, if a method reduces a unit in one step: a fraction keeps
`max(1, round(keep n))` of n tokens. **By rounds**, if pairs are matched: a fraction removes `floor(n - n keep)`, and
leaves at least one. **By layers** of an encoder: the fraction applies to each layer's tokens, removed by rounds. In all
three, a count is the number of tokens left at the end.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vtc.checks import check_fraction, is_int
from vtc.errors import OptionError
from vtc.macs import EncoderMACs


@dataclass(frozen=True)
class Budget:
    """What stays, given by exactly one of these (`r` says how many are removed).

    Args:
        keep: a fraction in (0, 1], or a number of tokens.
        r: tokens to remove per layer of an encoder, or a tuple with one number per layer.
        flops: the fraction of the encoder's multiply-adds that remains, in (0, 1].

    Raises:
        OptionError: none or several given, one of the wrong type, or one out of range.
    """

    keep: float | int | None = None
    r: int | tuple[int, ...] | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            what = "no budget given" if not given else f"{' and '.join(given)} given together"
            raise OptionError(f"{what}: give one of keep= (what stays), r= (tokens removed per layer) or flops=")
        if self.keep is not None:
            check_fraction("keep", self.keep, or_count=True)
        if self.flops is not None:
            check_fraction("flops", self.flops, or_count=False)
        if self.r is not None:
            counts = self.r if isinstance(self.r, (tuple, list)) else (self.r,)
            if not counts or any(not is_int(n) or n < 0 for n in counts):
                raise OptionError(f"r={self.r!r}: it takes a whole number of tokens >= 0, or a list with one per layer")

    @property
    def everything(self) -> bool:
        """Whether nothing is removed, for any input."""
        return self.r == 0 or self.flops == 1.0 or (isinstance(self.keep, float) and self.keep == 1.0)


# -- the rounding rules ---------------------------------------------------------------------------------------------


def kept_at_once(keep: float | int, count: int) -> int:
    """How many of `count` tokens stay if a method reduces once."""
    if isinstance(keep, float):
        return min(count, max(1, round(count * keep)))
    if keep > count:
        raise OptionError(f"keep={keep} is more than the {count} tokens there are; keep=1.0 keeps all")
    return keep


def removed_by_rounds(keep: float | int | None, r: int | None, count: int) -> int:
    """How many of `count` tokens are removed if pairs are matched."""
    if r is not None:
        return min(r, count // 2)
    assert keep is not None
    if isinstance(keep, float):
        return min(math.floor(count - count * keep), max(0, count - 1))
    return count - kept_at_once(keep, count)


def lengths(features: Tensor, prefix: int, mask: Tensor | None) -> list[int]:
    """Numbers of real tokens after the prefix: one per item if there is a mask, else one for all."""
    return [features.shape[1] - prefix] if mask is None else (mask.sum(1) - prefix).clamp(min=0).tolist()


def stays_at_once(features: Tensor, keep: float | int, mask: Tensor | None) -> int | Tensor:
    """How many tokens of a batch stay if a method reduces once: an int, or [B] if there is a mask."""
    Budget(keep)
    kept = [kept_at_once(keep, n) for n in lengths(features, 0, mask)]
    return kept[0] if mask is None else torch.tensor(kept, dtype=torch.long, device=features.device)


def goes_by_rounds(
    features: Tensor, keep: float | int | None, r: int | None, prefix: int, mask: Tensor | None
) -> int | Tensor:
    """How many tokens of a batch are removed if pairs are matched: an int, or [B] if there is a mask."""
    Budget(keep, r)
    if r is not None and not isinstance(r, int):
        raise OptionError(f"r={r!r}: it takes one whole number; a list is for the layers of an encoder")
    gone = [removed_by_rounds(keep, r, n) for n in lengths(features, prefix, mask)]
    return gone[0] if mask is None else torch.tensor(gone, dtype=torch.long, device=features.device)


# -- units that share a budget --------------------------------------------------------------------------------------


def kept_of_units(keep: float | int, counts: Sequence[int], items: Sequence[int]) -> list[int]:
    """How many of the `counts` tokens of every unit (picture, crop, frame) stay: a fraction of each, at once; or a
    number per item (picture, video), divided among its units by their lengths, at least one each."""
    if isinstance(keep, float):
        return [kept_at_once(keep, n) for n in counts]
    found = [0] * len(counts)
    for item in set(items):
        mine = [i for i, of in enumerate(items) if of == item]
        for i, share in zip(mine, _shares(keep, [counts[i] for i in mine]), strict=True):
            found[i] = share
    return found


def _shares(keep: int, counts: list[int]) -> list[int]:
    """`keep` tokens divided among the units of one item."""
    total = sum(counts)
    if keep > total:
        raise OptionError(f"keep={keep} is more than the {total} tokens of an image; keep=1.0 keeps all")
    if keep < len(counts):
        raise OptionError(
            f"keep={keep} is less than one token for each of the {len(counts)} parts (crops, frames) of an image"
        )
    return share_out(keep, [keep * n / total for n in counts], counts)


def share_out(total: int, quotas: Sequence[float], counts: Sequence[int], least: int = 1) -> list[int]:
    """`total` tokens divided among parts of `counts` tokens by their quotas, at least `least` each: exactly `total`.

    A part gets its quota rounded down, at most all it has; then tokens are added where the most is missing of the
    quota, or taken where the least is, one by one, the first among equals. What a full part cannot take goes to the
    others.

    Raises:
        OptionError: less than `least` for each, or more than there are.
    """
    floor = [min(least, n) for n in counts]
    if not sum(floor) <= total <= sum(counts):
        raise OptionError(
            f"{total} tokens cannot be shared out over {len(counts)} parts with {sum(floor)} to {sum(counts)}"
        )
    quota = [min(q, n) for q, n in zip(quotas, counts, strict=True)]
    share = [max(int(q), low) for q, low in zip(quota, floor, strict=True)]
    step = 1 if sum(share) < total else -1
    # quotas that are equal but for rounding are equal
    heap = [(round(step * (n - q), 6), i) for i, (n, q) in enumerate(zip(share, quota, strict=True))]
    heapq.heapify(heap)
    for _ in range(abs(total - sum(share))):
        while True:
            gap, i = heapq.heappop(heap)
            if (share[i] < counts[i]) if step > 0 else (share[i] > floor[i]):
                break
        share[i] += step
        heapq.heappush(heap, (gap + 1, i))
    return share


# -- the layers of an encoder ---------------------------------------------------------------------------------------


class Reduces(Protocol):
    """The properties of a method that a schedule depends on."""

    @property
    def keep(self) -> float | int | None: ...
    @property
    def r(self) -> int | tuple[int, ...] | None: ...
    @property
    def flops(self) -> float | None: ...
    @property
    def name(self) -> str: ...
    @property
    def halves(self) -> bool: ...  # at most half of the tokens can go in one layer
    @property
    def one_shot(self) -> bool: ...  # all tokens are removed at the first layer


def per_layer(method: Reduces, patches: int, depth: int, macs: EncoderMACs) -> tuple[int, ...]:
    """How many of an image's `patches` tokens each of `depth` layers removes. Raises OptionError if the budget is
    unreachable.

    A float keep q removes floor(T - T q) of the T tokens left, per layer (one-shot methods: of all tokens, at once). An
    int is the count after the last layer, reached by a constant ratio. `flops` uses the constant ratio with the largest
    cost not above it. `r`, as in ToMe, removes that many per layer, at most half of what is left.
    """
    keep, floor = method.keep, _least(method, patches, depth)
    if method.r is not None:
        return _fixed(method, patches, depth)
    if isinstance(keep, int):
        if keep > patches:
            raise OptionError(f"keep={keep} is more than the image's {patches} tokens; keep=1.0 keeps all")
        if keep < floor:
            raise OptionError(
                f"keep={keep}: {depth} layers that at most halve {patches} tokens leave {floor}; keep at least that"
            )
        return _geometric(method, patches, depth, keep)
    if keep is not None:
        if method.one_shot:
            return _at_once(patches, depth, max(1, round(keep * patches)))
        return _ratio(patches, depth, keep)
    assert method.flops is not None
    return _solved(method, patches, depth, macs)


def resized_count(method: Reduces, patches: int, macs: EncoderMACs) -> int:
    """How many patches an image of `patches` may have after it is resized to the budget."""
    keep = method.keep
    if isinstance(keep, int):
        if keep > patches:
            raise OptionError(f"keep={keep} is more than the image's {patches} tokens; keep=1.0 keeps all")
        return keep
    if keep is not None:
        return max(1, round(keep * patches))
    assert method.flops is not None
    budget = method.flops * macs.dense(patches)
    return max((n for n in range(1, patches + 1) if macs.dense(n) <= budget), default=1)


def _ratio(patches: int, depth: int, keep: float) -> tuple[int, ...]:
    removed = []
    for _ in range(depth):
        removed.append(math.floor(patches - patches * keep))
        patches -= removed[-1]
    return tuple(removed)


def _fixed(method: Reduces, patches: int, depth: int) -> tuple[int, ...]:
    wanted = (method.r,) * depth if isinstance(method.r, int) else method.r or ()
    removed = []
    for r in wanted:
        removed.append(min(r, patches // 2 if method.halves else max(0, patches - 1)))
        patches -= removed[-1]
    return tuple(removed)


def _at_once(patches: int, depth: int, keep: int) -> tuple[int, ...]:
    return (patches - keep,) + (0,) * (depth - 1)


def _geometric(method: Reduces, patches: int, depth: int, keep: int) -> tuple[int, ...]:
    """A constant ratio from `patches` to exactly `keep`."""
    if method.one_shot:
        return _at_once(patches, depth, keep)
    removed, left = [], patches
    for layer in range(1, depth + 1):
        aim = max(keep, round(patches * (keep / patches) ** (layer / depth)))
        if method.halves:  # leave no more than the remaining layers can remove by halving
            aim = min(max(aim, left - left // 2), keep << (depth - layer) if layer < depth else keep)
        removed.append(left - aim)
        left = aim
    return tuple(removed)


def _least(method: Reduces, patches: int, depth: int) -> int:
    if method.halves:
        for _ in range(depth):
            patches -= patches // 2
        return patches
    return 1


def _solved(method: Reduces, patches: int, depth: int, macs: EncoderMACs) -> tuple[int, ...]:
    assert method.flops is not None
    budget = method.flops * macs.dense(patches)

    def schedule(step: int) -> tuple[int, ...]:
        if method.one_shot:
            return _at_once(patches, depth, step)
        return _ratio(patches, depth, 0.5 + 0.5 * step / steps)

    steps = patches if method.one_shot else 1 << 20
    low, high = (1 if method.one_shot else 0), steps  # cost grows with the step; find the last one within the budget
    if macs.after(schedule(high), patches) <= budget:
        return schedule(high)
    least = macs.after(schedule(low), patches)
    if least > budget:
        raise OptionError(
            f"flops={method.flops}: out of reach for {patches} tokens in {depth} layers, where {method.name} "
            f"leaves at least {math.ceil(1000 * least / macs.dense(patches)) / 1000}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if macs.after(schedule(middle), patches) <= budget else (low, middle)
    return schedule(low)
