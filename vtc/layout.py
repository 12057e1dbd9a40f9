"""The layout of image tokens: units that share a budget, and where their tokens came from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Grid = tuple[int, int]  # rows and columns


@dataclass(frozen=True)
class Unit:
    """Tokens that share a budget: an image, a crop of it, or a frame.

    Attributes:
        rows: [n] long, which tokens of this modality, ascending (all items of the call one after the other).
        item: the image or video they belong to, numbered over the call.
        grid: (rows, columns) if they fill a rectangle.
    """

    rows: Tensor
    item: int
    grid: Grid | None = None


@dataclass(frozen=True)
class Layout:
    """How a modality's tokens are made, all items of the call one after the other.

    Attributes:
        units: the tokens that share a budget. A token in no unit (a newline) always stays.
        source: [n] long, the row of the projector's output that each token is, -1 = none (a newline); or [n, Q], the
            rows that it is the mean of; None = token i is row i.
    """

    units: tuple[Unit, ...]
    source: Tensor | None = None
