"""Which cells of an image are predicted by their neighbours: PixelPrune's rule (https://arxiv.org/abs/2604.00886)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.checks import check_flag, check_number
from vtc.errors import OptionError
from vtc.layout import Grid

METRICS = ("max", "mean", "rms")
SCANS = ("predict", "raster", "serpentine")


def check_rule(tolerance: Any, metric: Any, anchored: Any) -> None:
    """Raise OptionError if an option of the rule is out of range."""
    check_number("tolerance", tolerance, 0)
    if tolerance >= 1:
        raise OptionError(f"tolerance={tolerance!r}: pixel values lie in [0, 1], so 1 and above takes all for one")
    if metric not in METRICS:
        raise OptionError(f"metric={metric!r} is unknown; choose one of {', '.join(METRICS)}")
    check_flag("anchored", anchored)


def kept_cells(
    cells: Tensor, grid: Grid, tolerance: float, metric: str, anchored: bool, scan: str = "predict"
) -> Tensor:
    """[B, h*w] bool, which cells [B, h*w, c] of pixel values, in raster order, stay."""
    if scan != "predict":
        return _run_lengths(cells.float() if tolerance else cells, grid, tolerance, metric, scan == "serpentine")
    source = sources(cells, grid, tolerance, metric, anchored)
    return source == torch.arange(source.shape[1], device=source.device)


def sources(cells: Tensor, grid: Grid, tolerance: float, metric: str, anchored: bool) -> Tensor:
    """[B, h*w] long: which cell's pixels stand for those of each cell [B, h*w, c]; a cell that stays is its own."""
    rows, columns = grid
    cells = cells.float() if tolerance else cells
    if tolerance and anchored:
        return _anchored(cells, grid, tolerance, metric)
    x = cells.unflatten(1, grid)
    left = torch.zeros(x.shape[:3], dtype=torch.bool, device=x.device)  # does a cell resemble the one on its left
    above = left.clone()
    for row in range(rows):  # row by row: the differences of a whole page would take as much memory as the page
        left[:, row, 1:] = alike(x[:, row, 1:], x[:, row, :-1], tolerance, metric)
        if row:
            above[:, row] = alike(x[:, row], x[:, row - 1], tolerance, metric)
    from_above = torch.zeros_like(left)
    from_above[:, 1:, 0] = True
    from_above[:, 1:, 1:] = above[:, 1:, :-1] & ~left[:, :-1, 1:]  # the corner resembles A and not B
    predicted = torch.where(from_above, above, left)
    step = predicted * torch.where(from_above, columns, 1)  # how far back the predicting cell is
    source = torch.arange(rows * columns, device=x.device) - step.flatten(1)
    for _ in range((rows + columns).bit_length()):  # a chain goes left or up, and every time is followed twice as far
        source = source.gather(1, source)
    return source


def _anchored(cells: Tensor, grid: Grid, tolerance: float, metric: str) -> Tensor:
    """The same with neighbours as they are rebuilt. The cells of an anti-diagonal depend on the two before it alone."""
    rows, columns = grid
    batch = torch.arange(len(cells), device=cells.device)[:, None]
    source = torch.arange(rows * columns, device=cells.device).repeat(len(cells), 1)  # the cell that stands for each

    def same(a: Tensor, b: Tensor) -> Tensor:
        return alike(cells[batch, a], cells[batch, b], tolerance, metric)

    for number in range(1, rows + columns - 1):
        row = torch.arange(max(0, number - columns + 1), min(rows, number + 1), device=cells.device)
        here = row * columns + number - row
        inner = (row > 0) & (row < number)
        left, above = (
            source[:, torch.where(row < number, here - 1, 0)],
            source[:, torch.where(row > 0, here - columns, 0)],
        )
        guess = torch.where(row == number, above, left)
        if bool(inner.any()):
            corner, a, b = source[:, here[inner] - columns - 1], left[:, inner], above[:, inner]
            guess[:, inner] = torch.where(same(corner, a) & ~same(corner, b), b, a)
        predicted = same(here.expand_as(guess), guess)
        source[:, here] = torch.where(predicted, guess, source[:, here])
    return source


def _run_lengths(cells: Tensor, grid: Grid, tolerance: float, metric: str, serpentine: bool) -> Tensor:
    """Along the rows, or there and back: a cell stays unless it resembles the last one that stayed."""
    order = torch.arange(cells.shape[1], device=cells.device).view(grid)
    if serpentine:
        order[1::2] = order[1::2].flip(1)
    first, kept = cells[:, 0], torch.ones(cells.shape[:2], dtype=torch.bool, device=cells.device)
    for at in order.flatten()[1:].tolist():
        now = ~alike(cells[:, at], first, tolerance, metric)
        kept[:, at] = now
        first = torch.where(now[:, None], cells[:, at], first)
    return kept


def alike(a: Tensor, b: Tensor, tolerance: float, metric: str) -> Tensor:
    """[..., c] and [..., c] -> [...] bool: whether the distance of two cells is at most `tolerance`."""
    if not tolerance:
        return (a == b).all(-1)
    difference = a - b
    if metric == "rms":
        return difference.square().mean(-1).sqrt() <= tolerance
    difference = difference.abs()
    return (difference.amax(-1) if metric == "max" else difference.mean(-1)) <= tolerance
