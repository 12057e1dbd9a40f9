"""From a budget to the number of tokens that each layer of an encoder removes."""

from __future__ import annotations

import math

from vtc.errors import OptionError
from vtc.macs import EncoderMACs
from vtc.methods.base import Method


def removals(method: Method, patches: int, depth: int, macs: EncoderMACs) -> tuple[int, ...]:
    """How many of an image's `patches` tokens each of `depth` layers removes. Raises OptionError if out of reach.

    A float keep q removes floor(T - T q) of the T tokens left, per layer (one-shot methods: of all, at once). An int is
    the count after the last layer, reached by a constant ratio. `flops` takes the constant ratio with the largest cost
    not above it. `r` is ToMe's: that many per layer, at most half of what is left.
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


def resized_count(method: Method, patches: int, macs: EncoderMACs) -> int:
    """How many patches an image of `patches` may have after it was resized to the budget."""
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


def _fixed(method: Method, patches: int, depth: int) -> tuple[int, ...]:
    wanted = (method.r,) * depth if isinstance(method.r, int) else method.r or ()
    removed = []
    for r in wanted:
        removed.append(min(r, patches // 2 if method.halves else max(0, patches - 1)))
        patches -= removed[-1]
    return tuple(removed)


def _at_once(patches: int, depth: int, keep: int) -> tuple[int, ...]:
    return (patches - keep,) + (0,) * (depth - 1)


def _geometric(method: Method, patches: int, depth: int, keep: int) -> tuple[int, ...]:
    """A constant ratio from `patches` to exactly `keep`."""
    if method.one_shot:
        return _at_once(patches, depth, keep)
    removed, left = [], patches
    for layer in range(1, depth + 1):
        aim = max(keep, round(patches * (keep / patches) ** (layer / depth)))
        if method.halves:  # leave no more than the layers to come can still halve away
            aim = min(max(aim, left - left // 2), keep << (depth - layer) if layer < depth else keep)
        removed.append(left - aim)
        left = aim
    return tuple(removed)


def _least(method: Method, patches: int, depth: int) -> int:
    if method.halves:
        for _ in range(depth):
            patches -= patches // 2
        return patches
    return 1


def _solved(method: Method, patches: int, depth: int, macs: EncoderMACs) -> tuple[int, ...]:
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
