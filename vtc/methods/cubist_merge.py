"""CubistMerge: Spatial-Preserving Token Merging, Gong and Lis, 2025, https://arxiv.org/abs/2509.21764."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.budget import Budget, kept_at_once
from vtc.checks import check_number
from vtc.errors import OptionError
from vtc.layout import Grid
from vtc.methods.base import Method
from vtc.methods.downsample import coarse_grid
from vtc.token_map import TokenMap
from vtc.tokens import Tokens

_MEMBERS = 3  # of a slot after one pass: a target and the places on both its sides


@dataclass(frozen=True)
class CubistMerge(Method):
    """Merges neighbours once, before a layer of a vision encoder: `columns` tokens go from every row, then `rows` from
    every column of what is left, so that the tokens stay a rectangle for attention in windows and 2-D position tables.
    A token that goes stands at an odd place of its line, next to the neighbour it resembles most; the neighbour takes,
    channel by channel, the value of the largest magnitude. Behind the last layer every place that went is given its
    neighbour's output, so that what follows gets the full grid.

    The budget is `keep`, the fraction (at least 0.25) or number of tokens that stays, of which the largest rectangle
    near the image's aspect is made; or `rows` and `columns`.

    Args:
        rows, columns: how many go, at most half of each, in place of `keep`.
        layer: the layer before which tokens are merged; those in front of it see all.
    """

    rows: int | None = None
    columns: int | None = None
    layer: int = 1

    name: ClassVar[str] = "cubist_merge"
    summary: ClassVar[str] = "merges neighbours in rows and columns, so that a rectangle stays"
    one_shot: ClassVar[bool] = True
    encoder: ClassVar[bool] = False
    rectangle: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})

    def __post_init__(self) -> None:
        for option in ("where", "pooled", "positions", "cascade", "proportional"):
            value = getattr(self, option)
            if value and value != "original":
                raise OptionError(
                    f"{option}={value!r}: cubist_merge works in the layers of a vision encoder alone, where a merged "
                    "token stands at one place and counts as one; leave it out"
                )
        super().__post_init__()
        check_number("layer", self.layer, 0, whole=True)

    @property
    def budget(self) -> Budget:
        lines = {name: n for name, n in (("rows", self.rows), ("columns", self.columns)) if n is not None}
        for name, value in (("r", self.r), ("flops", self.flops)):
            if value is not None:
                raise OptionError(f"{name}={value!r}: cubist_merge takes keep=, or rows= and columns=")
        if not lines:
            if isinstance(self.keep, float) and 0 < self.keep < 0.25:
                raise OptionError(f"keep={self.keep!r}: at most half of the rows and of the columns go, so 0.25 stays")
            return Budget(self.keep)
        for name, value in lines.items():
            check_number(name, value, 0, whole=True)
            if self.keep is not None:
                raise OptionError(
                    f"{name}={value!r} beside keep={self.keep!r}: give keep=, what stays, or the rows= and columns= "
                    "that go"
                )
        return Budget(r=sum(lines.values()))  # of lines: all that is read of it is whether any go

    def coarse(self, grid: Grid) -> Grid:
        """How many rows and columns stay of a grid. Raises OptionError if they are more than `keep` allows."""
        least = (grid[0] - grid[0] // 2, grid[1] - grid[1] // 2)
        if self.keep is None:
            return max(least[0], grid[0] - (self.rows or 0)), max(least[1], grid[1] - (self.columns or 0))
        budget = kept_at_once(self.keep, grid[0] * grid[1])
        if budget < least[0] * least[1]:
            raise OptionError(
                f"keep={self.keep!r} is {budget} of the {grid[0]}x{grid[1]} tokens, and cubist_merge leaves at least "
                f"half of the rows and columns, {least[0]}x{least[1]} = {least[0] * least[1]}"
            )
        return coarse_grid(grid, budget, least)

    def reached(self, kept: int, grid: Grid | None) -> int:
        if grid is None:
            raise OptionError("cubist_merge needs every image to fill a grid, and one here does not")
        height, width = self.coarse(grid)
        return height * width

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        """The rows and columns that go follow from the options; `r` says the same in tokens."""
        grids = set(tokens.grid or (None,))
        grid = grids.pop()
        if grid is None or grids:
            raise OptionError("cubist_merge needs the rows and columns of the tokens, the same for all images")
        height, width = self.coarse(grid)
        return cubist_map(tokens.features, grid, grid[0] - height, grid[1] - width)

    def merged(self, x: Tensor, token_map: TokenMap) -> Tensor:
        """What the tokens of a map hold that was decided here: [B, N, C] -> [B, M, C]."""
        return token_map.largest(x, _MEMBERS)


def cubist_map(x: Tensor, grid: Grid, rows: int, columns: int) -> TokenMap:
    """The decision on [B, h w, D], row by row: first in the rows, then in the columns, on the values that the first
    pass made. The slots are the smaller rectangle, row by row."""
    height, width = grid
    batch, few = len(x), width - min(columns, width // 2)
    at, first = torch.arange(height, device=x.device)[:, None], None
    if few < width:
        group, anchor = _along(x.reshape(batch * height, width, x.shape[-1]), width - few)
        group = group.view(batch, height, width) + at * few
        anchor = anchor.view(batch, height, few) + at * width
        first = _step(group.flatten(1), anchor.flatten(1), None)
        x = first.largest(x, _MEMBERS)
    short = height - min(rows, height // 2)
    if short == height:
        return TokenMap.identity(batch, height * width, x.device) if first is None else first
    at = torch.arange(few, device=x.device)[:, None]
    lines = x.reshape(batch, height, few, x.shape[-1]).transpose(1, 2)
    group, anchor = _along(lines.reshape(batch * few, height, x.shape[-1]), height - short)
    group = (group.view(batch, few, height) * few + at).transpose(1, 2)
    anchor = (anchor.view(batch, few, short) * few + at).transpose(1, 2)
    later = _step(group.flatten(1), anchor.flatten(1), None if first is None else first.size)
    return later if first is None else first.compose(later)


def _step(group: Tensor, anchor: Tensor, weight: Tensor | None) -> TokenMap:
    size = ops.sizes(group, anchor.shape[1], weight)
    return TokenMap(group, anchor, size, weight=weight, closeness=None, complete=True)


def _along(x: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Lines [L, n, D] without r of their tokens: the slot of each token [L, n], the token kept for each [L, n - r].

    Of the odd places, the r with the highest cosine to a neighbour join it; the left one, if both are as near.
    """
    count = x.shape[1]
    unit = ops.normalize(x)
    near = ops.exact((unit[:, 1:] * unit[:, :-1]).sum(-1))
    left, right = near[:, ::2], near[:, 1::2]
    right = torch.nn.functional.pad(right, (0, left.shape[1] - right.shape[1]), value=-2.0)
    source = torch.maximum(left, right).argsort(dim=1, descending=True, stable=True)[:, :r]
    target = 2 * source + 2 * (right > left).gather(1, source)
    kept = torch.ones(len(x), count, dtype=torch.bool, device=x.device).scatter(1, 2 * source + 1, False)
    slot = kept.cumsum(1) - 1
    group = slot.scatter(1, 2 * source + 1, slot.gather(1, target))
    return group, (~kept).long().argsort(dim=1, stable=True)[:, : count - r]
