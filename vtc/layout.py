"""How image tokens lie: units that share a budget, and where their tokens came from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Grid = tuple[int, int]  # rows and columns


@dataclass(frozen=True)
class Unit:
    """Tokens that share a budget: an image, a crop of it, or a frame.

    Attributes:
        rows: [n] long, which of the kind's tokens, ascending (all items of the call one after the other).
        item: the image or video they belong to, counted over the call.
        grid: (rows, columns) where they fill a rectangle.
    """

    rows: Tensor
    item: int
    grid: Grid | None = None


@dataclass(frozen=True)
class Layout:
    """How a kind's tokens came about, all items of the call one after the other.

    Attributes:
        units: the tokens by budget. A token in no unit (a newline) always stays.
        source: [n] long, the row of the projector's output that each token is, -1 = none (a newline); or [n, Q], the
            rows it is the mean of; None = its own number.
    """

    units: tuple[Unit, ...]
    source: Tensor | None = None
