"""Each decision as a plain function, for people who bring their own model.

Every function takes features [B, N, D] and returns a `TokenMap`. The first `prefix` tokens are kept unmerged; `mask`
[B, N] marks real tokens; `size` [B, N] says how many tokens each token already stands for. `keep` is what stays of the
real tokens after the prefix: a fraction (r = floor(T - T keep) tokens are removed) or a count. Pairwise matching
removes at most half per round, so a smaller keep takes several rounds, with the features merged in between. Ties go to
the lowest index.

The selections (`mmr`, `sads`, `max_min`, `dpp`, `coverage`, `mmtok`, `holov`) and `dpc_knn` reduce once, to max(1,
round(keep T)) tokens, and have neither prefix nor size. A selection's map has the `order` in which the tokens were
picked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtc import ops, scores
from vtc.budget import goes_by_rounds, lengths, stays_at_once
from vtc.checks import check, check_finite, check_flag, check_mask, check_number, check_seed, is_int
from vtc.decide import decide, in_rounds
from vtc.errors import InputError, OptionError
from vtc.layout import Grid
from vtc.methods import idpruner, zoo_prune
from vtc.methods.base import Method
from vtc.methods.cubist_merge import cubist_map
from vtc.methods.downsample import coarse_grid, pool_map
from vtc.methods.dpc_knn import dpc_knn_map
from vtc.methods.evs import EVS
from vtc.methods.flashvid import FlashVID
from vtc.methods.holov import HoloV
from vtc.methods.mmtok import MMTok
from vtc.methods.pitome import check_pitome, pitome_round
from vtc.methods.pixels import SCANS, check_rule, kept_cells
from vtc.methods.random import random_round
from vtc.methods.tome import tome_round
from vtc.methods.vidcom2 import VidCom2
from vtc.positions import ppe_positions
from vtc.token_map import TokenMap
from vtc.tokens import Tokens

__all__ = [
    *("coverage", "cubist", "downsample", "dpc_knn", "dpp", "evs", "flashvid", "holov", "max_min", "mmr", "mmtok"),
    *("pitome", "pixelprune", "random", "sads", "tome", "vidcom2"),
    "ppe_positions",
    "zeroth_order_sensitivity",
]

Frames = int | Sequence[Sequence[int]]


def tome(
    features: Tensor,
    *,
    keep: float | int | None = None,
    r: int | None = None,
    prefix: int = 0,
    mask: Tensor | None = None,
    size: Tensor | None = None,
) -> TokenMap:
    """ToMe's bipartite soft matching (arXiv 2210.09461): even tokens merge into their most similar odd partner."""
    return _rounds(tome_round, features, keep, r, prefix, mask, size)


def pitome(
    features: Tensor,
    *,
    keep: float | int | None = None,
    r: int | None = None,
    margin: float,
    alpha: float = 1.0,
    energy: str = "elu",
    split: str = "alternate",
    protect: bool = True,
    prefix: int = 0,
    mask: Tensor | None = None,
    size: Tensor | None = None,
) -> TokenMap:
    """PiToMe's energy-ordered matching (arXiv 2405.16148, Eq. 4 and Algorithm 1)."""
    check_pitome(margin, alpha, energy, split)
    check_flag("protect", protect)
    step = partial(pitome_round, margin=margin, alpha=alpha, form=energy, split=split, protect=protect)
    return _rounds(step, features, keep, r, prefix, mask, size)


def pixelprune(
    cells: Tensor,
    grid: Grid,
    *,
    tolerance: float = 0.0,
    metric: str = "max",
    anchored: bool = True,
    scan: str = "predict",
    keep: None = None,
) -> TokenMap:
    """PixelPrune's selection (arXiv 2604.00886): a cell stays unless its pixels are those that its neighbours predict.

    Args:
        cells: [B, h*w, c] pixel values in [0, 1] of each cell, in raster order.
        grid: (h, w).
        tolerance, metric, anchored: as in `vtc.PixelPrune`.
        keep: refused, for the pixels decide how many stay.
        scan: "predict", that method's rule; "raster" or "serpentine": a cell stays unless it resembles the last one
            that stayed, along the rows, or there and back.

    Raises:
        OptionError: an option out of range. InputError: cells that are no such pixels, or not h*w of them.
    """
    if keep is not None:
        raise OptionError(
            f"keep={keep!r}: pixelprune has no budget, the pixels decide how many cells stay: leave it out, or raise "
            "tolerance="
        )
    check(cells, 0, None)
    _check_grid(grid)
    check_rule(tolerance, metric, anchored)
    if scan not in SCANS:
        raise OptionError(f"scan={scan!r} is unknown; choose one of {', '.join(SCANS)}")
    if grid[0] * grid[1] != cells.shape[1]:
        raise InputError(f"grid {grid[0]}x{grid[1]} is {grid[0] * grid[1]} cells, but there are {cells.shape[1]}")
    if tolerance and bool(((cells < -0.1) | (cells > 1.1)).any()):  # noise may lead a little beyond
        raise InputError(
            f"tolerance={tolerance} is for pixel values in [0, 1], and the cells' go from {float(cells.min()):.3g} to "
            f"{float(cells.max()):.3g}: divide by 255, or undo the processor's normalisation"
        )
    with torch.no_grad():
        return TokenMap.from_kept(kept_cells(cells, (grid[0], grid[1]), tolerance, metric, anchored, scan))


def random(
    features: Tensor,
    *,
    keep: float | int | None = None,
    r: int | None = None,
    seed: int = 0,
    prefix: int = 0,
    mask: Tensor | None = None,
    size: Tensor | None = None,
) -> TokenMap:
    """Keeps random tokens; an image keeps the same ones alone and in a batch."""
    check(features, prefix, mask, size)
    check_seed(seed)
    removed = goes_by_rounds(features, keep, r, prefix, mask)
    with torch.no_grad():
        return random_round(features, removed, seed, prefix, mask, size)


def downsample(
    features: Tensor,
    *,
    keep: float | int,
    grid: tuple[int, int],
    prefix: int = 0,
    size: Tensor | None = None,
) -> TokenMap:
    """Average pooling of the `grid` (rows, columns) of patches behind the prefix to at most `keep` cells."""
    check(features, prefix, None, size)
    _check_grid(grid, features, prefix)
    removed = goes_by_rounds(features, keep, None, prefix, None)
    assert isinstance(removed, int)
    coarse = coarse_grid(grid, grid[0] * grid[1] - removed)
    batch, tokens, _ = features.shape
    return pool_map(tokens, (grid,) * batch, [coarse] * batch, prefix, size=size, device=features.device)


def cubist(features: Tensor, grid: tuple[int, int], *, rows: int, columns: int) -> TokenMap:
    """CubistMerge's merging of neighbours (arXiv 2509.21764): of the `grid` (rows, columns) of all tokens, `columns`
    tokens go from every row, then `rows` from every column of what is left, at most half of each.

    The M slots are the smaller rectangle, row by row: `map.largest(features)`, in every channel the member's value of
    the largest magnitude, is what the paper merges to, and `map.unmerge` restores the grid."""
    check(features)
    _check_grid(grid, features)
    check_number("rows", rows, 0, whole=True)
    check_number("columns", columns, 0, whole=True)
    with torch.no_grad():
        return cubist_map(features, (grid[0], grid[1]), rows, columns)


def _check_grid(grid: Any, features: Tensor | None = None, prefix: int = 0) -> None:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or any(type(n) is not int or n < 1 for n in grid):
        raise InputError(f"grid={grid!r}: it takes (rows, columns), whole numbers >= 1")
    if features is not None and prefix + grid[0] * grid[1] != features.shape[1]:
        raise InputError(
            f"grid {grid[0]}x{grid[1]} with prefix={prefix} is {prefix + grid[0] * grid[1]} tokens, "
            f"but features hold {features.shape[1]}"
        )


def mmr(
    features: Tensor,
    importance: Tensor,
    *,
    keep: float | int,
    balance: float = 0.5,
    normalize: str = "minmax",
    step: int = 1,
    mask: Tensor | None = None,
) -> TokenMap:
    """IDPruner's selection (arXiv 2602.13315): the next token maximises balance x importance - (1 - balance) x its
    highest cosine to those picked. The importance [B, N] is normalised per image: "minmax", "rank" or "none"."""
    idpruner.check_mmr(balance, normalize, step)

    def pick(unit: Tensor, count: int | Tensor, scores: Tensor) -> Tensor:
        scaled = idpruner.normalized(scores, normalize, mask)
        return ops.greedy_select(unit, scaled, count, "mmr", balance, step, mask)

    return _select(pick, features, keep, mask, importance=importance)


def sads(features: Tensor, sensitivity: Tensor, *, keep: float | int, mask: Tensor | None = None) -> TokenMap:
    """ZOO-Prune's selection (arXiv 2509.24837): the next token maximises its sensitivity [B, N], min-max normalised,
    times 1 - its highest cosine to those picked."""

    def pick(unit: Tensor, count: int | Tensor, scores: Tensor) -> Tensor:
        return ops.greedy_select(unit, zoo_prune.normalized(scores, mask), count, "sads", mask=mask)

    return _select(pick, features, keep, mask, sensitivity=sensitivity)


def max_min(features: Tensor, *, keep: float | int, mask: Tensor | None = None) -> TokenMap:
    """DivPrune's selection (arXiv 2503.02175): the next token is the farthest, by cosine, from those picked."""

    def pick(unit: Tensor, count: int | Tensor) -> Tensor:
        return ops.greedy_select(unit, None, count, "max_min", mask=mask)

    return _select(pick, features, keep, mask)


def dpp(features: Tensor, relevance: Tensor, *, keep: float | int, mask: Tensor | None = None) -> TokenMap:
    """CDPruner's selection (arXiv 2506.10967): greedily the largest determinant of `r_i cos_ij r_j`, with the relevance
    r [B, N] used as given; all ones means diversity alone."""

    def pick(unit: Tensor, count: int | Tensor, scores: Tensor) -> Tensor:
        return ops.dpp_select(unit, scores, count, mask)

    return _select(pick, features, keep, mask, relevance=relevance)


def coverage(
    features: Tensor, saliency: Tensor, *, keep: float | int, alpha: float = 1.0, mask: Tensor | None = None
) -> TokenMap:
    """SCOPE's selection (arXiv 2510.24214): the next token maximises its saliency [B, N] to the power of alpha, times
    how much it covers that is not covered yet."""
    check_number("alpha", alpha, 0)

    def pick(unit: Tensor, count: int | Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        _check_not_negative("saliency", scores, mask, "it says how much a token's cover counts")
        return ops.coverage_select(unit, scores**alpha, count, mask)

    return _select(pick, features, keep, mask, saliency=saliency)


def mmtok(
    features: Tensor,
    text: Tensor,
    *,
    keep: float | int,
    tower: Tensor | None = None,
    t_text: float = 0.02,
    t_vision: float = 0.2,
    alpha: float = 0.5,
    mask: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> TokenMap:
    """MMTok's selection (arXiv 2508.18264): the next token adds most to what is covered of the text [B, T, D] and of
    the image (see `vtc.MMTok`). tower: [B, N, V], the tokens' features in the vision tower, where the image's tokens
    are compared; None = `features`. text_mask: [B, T], True = real; an image without text goes by itself alone."""
    method = MMTok(keep=keep, t_text=t_text, t_vision=t_vision, alpha=alpha)
    check(features, 0, mask)
    tower = features if tower is None else tower
    if text.ndim != 3 or (text.shape[0], text.shape[2]) != (features.shape[0], features.shape[2]):
        expected = f"[{features.shape[0]}, T, {features.shape[2]}]"
        raise InputError(f"text must be {expected} like the features, not {tuple(text.shape)}")
    if tower.ndim != 3 or tower.shape[:2] != features.shape[:2]:
        raise InputError(f"tower must be {[*features.shape[:2]]} like the features, not {tuple(tower.shape)}")
    check_mask(text_mask, text.shape[:2])
    tokens = Tokens(features, mask=mask, text=text, text_mask=text_mask, inputs=tower[:, :, None])
    return _select(lambda unit, count: method.pick(tokens, count), features, keep, mask)


def holov(
    features: Tensor,
    attention: Tensor,
    *,
    keep: float | int,
    crops: int = 16,
    inside: str = "attention",
    grid: tuple[int, int] | None = None,
    mask: Tensor | None = None,
) -> TokenMap:
    """HoloV's selection (arXiv 2510.02912): the budget is shared out among crops by their attention [B, N], and spent
    inside each on the tokens of the highest `inside` (see `vtc.HoloV`). Crops are runs of tokens, or with `grid` (rows,
    columns) at most `crops` cells of it."""
    if grid is not None:
        _check_grid(grid)
    method = HoloV(keep=keep, crops=crops, inside=inside, cells="runs" if grid is None else "grid")

    def pick(unit: Tensor, count: int | Tensor, scores: Tensor) -> Tensor:
        _check_not_negative("attention", scores, mask, "it is shared out among the crops")
        grids = None if grid is None else ((grid[0], grid[1]),) * len(features)
        return method.pick(Tokens(features, mask=mask, attention=scores, grid=grids), count)

    return _select(pick, features, keep, mask, attention=attention)


def dpc_knn(features: Tensor, *, keep: float | int, neighbors: int = 5, mask: Tensor | None = None) -> TokenMap:
    """DPC-KNN clustering: tokens join the nearest of the density peaks (see `vtc.DPCKNN`)."""
    check_number("neighbors", neighbors, 1, whole=True)
    check(features, 0, mask)
    with torch.no_grad():
        return dpc_knn_map(features, stays_at_once(features, keep, mask), neighbors, mask)


def evs(
    features: Tensor,
    frames: Frames,
    *,
    keep: float | int,
    pixels: Tensor | None = None,
    cut: str = "count",
    mask: Tensor | None = None,
) -> TokenMap:
    """EVS's selection in videos (arXiv 2510.14624): the first frame, and what differs most from the frame before; by
    `pixels` [B, N, V], if given, else by features. frames: as `flashvid`."""
    method = EVS(keep=keep, on="features" if pixels is None else "pixels", cut=cut)
    return _video(method, features, frames, mask, pixels=pixels)


def vidcom2(
    features: Tensor, frames: Frames, *, keep: float | int, exact: bool = True, mask: Tensor | None = None
) -> TokenMap:
    """VidCom2's selection in videos (arXiv 2505.14454): see `vtc.VidCom2`. frames: as `flashvid`."""
    return _video(VidCom2(keep=keep, exact=exact), features, frames, mask)


def flashvid(
    features: Tensor,
    attention: Tensor,
    frames: Frames,
    *,
    keep: float | int,
    alpha: float = 0.7,
    link: float = 0.8,
    cut: float = 0.9,
    segments: int = 8,
    relevance: bool = True,
    exact: bool = True,
    mask: Tensor | None = None,
) -> TokenMap:
    """FlashVID's selection and merging in videos (arXiv 2602.08024): see `vtc.FlashVID`.

    Args:
        features: [B, N, D], the tokens of every video, one frame after the other.
        attention: [B, N], received in the tower.
        frames: how many frames the N tokens are, or of every video how many tokens each of its frames has.
    """
    method = FlashVID(keep=keep, alpha=alpha, link=link, cut=cut, segments=segments, relevance=relevance, exact=exact)
    return _video(method, features, frames, mask, attention=attention)


def zeroth_order_sensitivity(
    projector: Any,
    features: Tensor,
    *,
    probes: int = 64,
    step: float = 0.01,
    exact: bool | str = "auto",
    generator: torch.Generator | None = None,
) -> Tensor:
    """ZOO-Prune's sensitivity [B, N] of `projector` (arXiv 2509.24837) at its inputs `features` [B, N, V], or
    [B, N, P, V] with P patches to a token: see `vtc.scores.sensitivity`, which also takes a seed and a mask."""
    return scores.sensitivity(projector, features, probes=probes, step=step, exact=exact, generator=generator)


def _video(method: Method, features: Tensor, frames: Frames, mask: Tensor | None, **given: Any) -> TokenMap:
    """Check everything, then return the method's decision for videos."""
    check(features, 0, mask)
    for name, x in given.items():
        if x is not None and x.shape[:2] != features.shape[:2]:
            raise InputError(f"{name} must begin with {tuple(features.shape[:2])}, not {tuple(x.shape)}")
    counts = lengths(features, 0, mask) * (len(features) if mask is None else 1)
    sizes: Any = frames
    if is_int(frames):
        if sizes < 1 or any(n % sizes or not n for n in counts):
            raise InputError(f"frames={frames}: {sorted(set(counts))} tokens are not that many frames of one size")
        sizes = [(n // sizes,) * sizes for n in counts]
    told = isinstance(sizes, (tuple, list)) and all(isinstance(each, (tuple, list)) for each in sizes)
    if not told or not all(is_int(n) and n > 0 for each in sizes for n in each):
        raise InputError(f"frames={frames!r}: it takes a number of frames, or of every video the sizes of its frames")
    if [sum(each) for each in sizes] != counts:
        raise InputError(f"frames={frames!r}: the videos have {counts} tokens")
    gone = [n - method.kept_of_video(tuple(each)) for n, each in zip(counts, sizes, strict=True)]
    removed = torch.tensor(gone, dtype=torch.long, device=features.device)
    with torch.no_grad():
        return decide(method, Tokens(features, mask=mask, frames=tuple(map(tuple, sizes)), **given), removed)


def _check_not_negative(name: str, scores: Tensor, mask: Tensor | None, why: str) -> None:
    if bool((scores < 0).any() if mask is None else ((scores < 0) & mask).any()):
        raise InputError(f"the {name} holds negative values: {why}")


def _select(
    pick: Callable[..., Tensor], features: Tensor, keep: float | int, mask: Tensor | None, **scores: Tensor
) -> TokenMap:
    """Check everything, then return the map of what `pick(unit vectors, count, *scores)` picks."""
    check(features, 0, mask)
    for name, score in scores.items():
        if score.shape != features.shape[:2]:
            raise InputError(f"{name} must be {tuple(features.shape[:2])} like the features, not {tuple(score.shape)}")
        check_finite(score if mask is None else score.masked_fill(~mask, 0), name)
    with torch.no_grad():
        order = pick(ops.normalize(features), stays_at_once(features, keep, mask), *scores.values())
    return TokenMap.from_order(order, features.shape[1])


def _rounds(
    step: Callable[..., TokenMap],
    features: Tensor,
    keep: float | int | None,
    r: int | None,
    prefix: int,
    mask: Tensor | None,
    size: Tensor | None,
    **options: Any,
) -> TokenMap:
    check(features, prefix, mask, size)
    removed = goes_by_rounds(features, keep, r, prefix, mask)

    def one_round(tokens: Tokens, now: int | Tensor) -> TokenMap:
        return step(tokens.features, now, tokens.prefix, tokens.mask, tokens.size, **options)

    with torch.no_grad():
        return in_rounds(one_round, Tokens(features, size=size, mask=mask, prefix=prefix), removed)
