"""Downsampling: a strong baseline (VTC-Bench, https://arxiv.org/abs/2510.07143)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import OptionError
from vtc.layout import Grid
from vtc.methods.base import Method
from vtc.token_map import TokenMap
from vtc.tokens import Tokens


@dataclass(frozen=True)
class Downsample(Method):
    """Gives the model a coarser grid: as many rows and columns as the budget allows, close to the image's aspect ratio.

    Args:
        mode: "pool" averages neighbouring tokens once, in the first layer; "resize" shrinks the image itself.
    """

    mode: str = "pool"

    name: ClassVar[str] = "downsample"
    summary: ClassVar[str] = "averages neighbouring tokens, or shrinks the image (baseline)"
    halves: ClassVar[bool] = False
    one_shot: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"grid"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("pool", "resize"):
            raise OptionError(f'mode={self.mode!r} is unknown; choose "pool" or "resize"')
        if self.r is not None:
            raise OptionError(f"r={self.r!r} is per layer, but downsample reduces once: give keep= or flops=")

    @property
    def resizes(self) -> bool:  # type: ignore[override]
        return self.mode == "resize"

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        grids = tuple(grid for grid in tokens.grid or () if grid is not None)
        if len(grids) != len(tokens.features):
            raise OptionError("downsample needs the patches' rows and columns: pass grid=(rows, columns)")
        removed = r.tolist() if isinstance(r, Tensor) else [r] * len(grids)
        coarse = [coarse_grid(grid, grid[0] * grid[1] - n) for grid, n in zip(grids, removed, strict=True)]
        return pool_map(tokens.features.shape[1], grids, coarse, tokens.prefix, tokens.mask, tokens.size)

    def reached(self, kept: int, grid: Grid | None) -> int:
        if grid is None:
            raise OptionError("downsample needs every image to fill a grid, and one here does not: use another method")
        height, width = coarse_grid(grid, kept)
        return height * width


def coarse_grid(grid: tuple[int, int], budget: int, least: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """The best grid of at most `budget` cells within `grid`: many cells, and an aspect ratio close to that of `grid`.
    Not smaller than `least`, which the budget must allow.

    It maximises cells x agreement of the aspect ratios (their quotient, at most 1); fewer rows win ties.
    """
    rows, columns = grid
    best, score = least, -1.0
    for height in range(least[0], min(rows, budget // least[1]) + 1):
        width = min(columns, budget // height)
        stretch = (height * columns) / (width * rows)
        agreement = height * width * min(stretch, 1 / stretch)
        if agreement > score:
            best, score = (height, width), agreement
    return best


def cells(grid: tuple[int, int], coarse: tuple[int, int], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The cell of `coarse` for every patch of `grid` (row by row), and the patch nearest the centre of every cell."""
    spans = []
    for fine, few in zip(grid, coarse, strict=True):
        index = torch.arange(fine, device=device)
        cell = index * few // fine
        first = torch.arange(few, device=device).mul(fine).add(few - 1).div(few, rounding_mode="floor")
        last = torch.arange(1, few + 1, device=device).mul(fine).add(few - 1).div(few, rounding_mode="floor") - 1
        spans.append((cell, (first + last) // 2))
    (row_cell, row_mid), (column_cell, column_mid) = spans
    group = row_cell[:, None] * coarse[1] + column_cell[None, :]
    middle = row_mid[:, None] * grid[1] + column_mid[None, :]
    return group.reshape(-1), middle.reshape(-1)


def pool_map(
    tokens: int,
    grids: tuple[tuple[int, int], ...],
    coarse: list[tuple[int, int]],
    prefix: int = 0,
    mask: Tensor | None = None,
    size: Tensor | None = None,
    device: torch.device | None = None,
) -> TokenMap:
    """The map that averages each image's `grids[b]` patches into `coarse[b]` cells. Padding, if any, comes last."""
    device = mask.device if mask is not None else size.device if size is not None else device
    if mask is not None and not bool((mask.long().diff(dim=1) <= 0).all()):
        raise OptionError("downsample needs the padding behind the patches; move the padding to the end")
    pairs = list(zip(grids, coarse, strict=True))
    made = {pair: _pooled(tokens, *pair, prefix, device) for pair in pairs or [((0, 0), (0, 0))]}  # mostly one
    rows = [made[pair] for pair in pairs] or list(made.values())
    kept, target, score = (torch.stack(part)[: len(pairs)] for part in zip(*rows, strict=True))
    source = torch.arange(tokens, device=device).expand_as(target).masked_fill(kept | (target < 0), -1)
    slots = prefix + max([0, *(h * w for h, w in coarse)])  # no slots if there is no image
    return TokenMap.from_anchors(kept, (source, target, score), slots=slots, weight=size)


def _pooled(
    tokens: int, grid: tuple[int, int], coarse: tuple[int, int], prefix: int, device: torch.device | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For one image: which of its tokens stay, the one that each patch joins (-1: none), and how near that is."""
    kept = torch.zeros(tokens, dtype=torch.bool, device=device)
    target, score = torch.full((tokens,), -1, dtype=torch.long, device=device), torch.zeros(tokens, device=device)
    cell, middle = cells(grid, coarse, device)
    kept[:prefix] = kept[middle + prefix] = True
    span, to, index = slice(prefix, prefix + len(cell)), middle[cell], torch.arange(len(cell), device=device)
    target[span] = to + prefix
    row, column = index // grid[1] - to // grid[1], index % grid[1] - to % grid[1]
    score[span] = -(row.float() ** 2 + column.float() ** 2)
    return kept, target, score
