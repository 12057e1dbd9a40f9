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
    x = cells.unflatten(1, grid)
    left, above = _neighbours(x, tolerance, metric)
    if tolerance and anchored:
        equal = _neighbours(x, 0, metric)
        # where cells that resemble a neighbour are equal to it, all are rebuilt as they were
        if not (torch.equal(left, equal[0]) and torch.equal(above, equal[1])):
            return _anchored(cells, columns, left.flatten(1), above.flatten(1), tolerance, metric)
    from_above = torch.zeros_like(left)
    from_above[:, 1:, 0] = True
    from_above[:, 1:, 1:] = above[:, 1:, :-1] & ~left[:, :-1, 1:]  # the corner resembles A and not B
    predicted = torch.where(from_above, above, left)
    step = predicted * torch.where(from_above, columns, 1)  # how far back the predicting cell is
    source = torch.arange(rows * columns, device=x.device) - step.flatten(1)
    for _ in range((rows + columns).bit_length()):  # a chain goes left or up, and every time is followed twice as far
        source = source.gather(1, source)
    return source


def _neighbours(x: Tensor, tolerance: float, metric: str) -> tuple[Tensor, Tensor]:
    """Whether a cell of x [B, h, w, c] resembles the one on its left, and the one above; each [B, h, w] bool."""
    left = torch.zeros(x.shape[:3], dtype=torch.bool, device=x.device)
    above = left.clone()
    for row in range(x.shape[1]):  # row by row: the differences of a whole page would take as much memory as the page
        left[:, row, 1:] = alike(x[:, row, 1:], x[:, row, :-1], tolerance, metric)
        if row:
            above[:, row] = alike(x[:, row], x[:, row - 1], tolerance, metric)
    return left, above


def _anchored(cells: Tensor, columns: int, left: Tensor, above: Tensor, tolerance: float, metric: str) -> Tensor:
    """The same with neighbours as they are rebuilt. The cells of an anti-diagonal depend on the two before it alone.
    left, above [B, h*w]: whether cells resemble these neighbours as they are in the image."""
    total = cells.shape[1]
    rows = total // columns
    source = torch.arange(total, device=cells.device).repeat(len(cells), 1)  # the cell that stands for each

    def same(one: Tensor, other: Tensor, plain: Tensor) -> Tensor:
        """[B, k] bool, of cells [k] or [B, k] as they are rebuilt; plain: of these cells as they are."""
        a, b = source.gather(1, one.expand_as(plain)), source.gather(1, other.expand_as(plain))
        unknown = (a != b) & ~((a == one) & (b == other))
        result = plain | (a == b)
        image, at = unknown.nonzero(as_tuple=True)
        if len(at):  # hardly any: most cells stand for themselves, or for their neighbours, too
            pair = cells[image, a[image, at]], cells[image, b[image, at]]
            result[image, at] = alike(*pair, tolerance, metric)
        return result

    for number in range(1, rows + columns - 1):
        row = torch.arange(max(0, number - columns + 1), min(rows, number + 1), device=cells.device)
        here = row * columns + number - row
        up = (row == number).expand(len(cells), -1).clone()  # is a cell predicted by the one above: in column 0
        inner = (row > 0) & (row < number)
        at = here[inner]
        if len(at):
            corner = at - columns - 1
            up[:, inner] = same(corner, at - 1, above[:, at - 1]) & ~same(corner, at - columns, left[:, at - columns])
        guess = here - torch.where(up, columns, 1)
        predicted = same(here, guess, torch.where(up, above[:, here], left[:, here]))
        source[:, here] = torch.where(predicted, source.gather(1, guess), source[:, here])
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
