"""Which K of N tokens stay: the greedy selections and DPC-KNN in plain torch, the definition for faster backends.

B images, N tokens, D width. Every selection takes `count`, an int or [B], and returns `order` [B, K] long, the tokens
as they were picked: always min(count, real tokens) different ones, then -1 if another image has more. `mask` [B, N],
True = real; padding is never picked. Decisions are float32, ties go to the lowest index, a NaN score counts as the
lowest. All images of a batch are processed together, without synchronising with the device at every pick.

All N x N cosines are stored if they fit a tile; otherwise the rows of picked tokens are computed as needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtc.ops import definitions

SELECTIONS = ("mmr", "sads", "max_min")
# Copies of a token have cosine 1 except for rounding, which would order them at random: cosines above this count as 1.
_SAME = 1.0 - 1e-6
# The fraction of a token's kernel value that may remain, due to rounding, when the picked tokens span it.
_SPANNED = 1e-5
# How many duplicates `distinct_select` drops at a time.
_PER_ROUND = 8
# How many outdated gains `cover_select` updates at a time.
_PANEL = 32
_LOWEST = torch.finfo(torch.float32).min


@torch.no_grad()
def top_select(score: Tensor, count: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """The highest scores [B, N], highest first."""
    most, each = budget(score, count, mask)
    return _trim(_best(score.float(), _taken(score, mask), most), each)


@torch.no_grad()
def greedy_select(
    unit: Tensor,
    importance: Tensor | None,
    count: int | Tensor,
    kind: str,
    balance: float = 0.5,
    step: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """One token after the other, the best by its importance I and m, its highest cosine to a token already picked.

    Args:
        unit: [B, N, D] unit vectors.
        importance: [B, N]; None for "max_min".
        kind: "mmr" maximises `balance I - (1 - balance) m`, "sads" `I (1 - m)`; both begin with the highest I.
            "max_min" maximises `1 - m` and begins with the token whose nearest other token is farthest.
        step: tokens per round; those of one round are not compared with each other.
    """
    if kind not in SELECTIONS:
        raise ValueError(f"unknown selection {kind!r}; choose one of {', '.join(SELECTIONS)}")
    most, each = budget(unit, count, mask)
    table = _table(unit)
    taken, rows = _taken(unit, mask), _rows(unit, table)
    if kind == "max_min":
        importance = score = -_nearest(unit, table, mask)
    else:
        assert importance is not None
        importance = score = importance.float()
    closest = torch.full_like(score, -1.0)
    order = [taken.new_zeros(len(taken), 0, dtype=torch.long)]
    for start in range(0, most, step):
        picks = _best(score, taken, min(step, most - start))
        order.append(picks)
        taken.scatter_(1, picks, True)
        met = rows(picks)
        closest = torch.maximum(closest, met[:, 0] if step == 1 else met.amax(1))
        if kind == "mmr":
            score = balance * importance - (1.0 - balance) * closest
        elif kind == "sads":
            score = importance * (1.0 - closest)
        else:
            score = -closest  # same order as 1 - closest, with less rounding
    return _trim(torch.cat(order, 1), each)


@torch.no_grad()
def dpp_select(unit: Tensor, relevance: Tensor, count: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """Greedy MAP of a determinantal point process with the kernel `L_ij = r_i cos_ij r_j` (Chen et al., 2018,
    https://arxiv.org/abs/1709.05135): each pick maximises det L of the picked tokens.

    The remainder of every L_ii, given the picked tokens, is updated with one row of L's Cholesky factor per pick: K N
    floats. A token spanned by the picked ones (less than 1e-5 of its L_ii remains) adds nothing; when only such tokens
    remain, they follow by index.
    """
    most, each = budget(unit, count, mask)
    taken, rows = _taken(unit, mask), _rows(unit)
    relevance = relevance.float()
    own = relevance.square() * unit.square().sum(-1).round()  # a zero vector has cosine 0 even to itself
    left, factor = own, unit.new_zeros(len(unit), most, unit.shape[1])
    order = [taken.new_zeros(len(taken), 0, dtype=torch.long)]
    for place in range(most):
        left = torch.where(left > _SPANNED * own, left, 0.0)
        pick = _best(left, taken, 1)
        order.append(pick)
        taken.scatter_(1, pick, True)
        before = factor[:, :place]
        there = before.gather(2, pick[:, None].expand(-1, place, 1))
        row = relevance.gather(1, pick) * rows(pick)[:, 0] * relevance - (there.mT @ before)[:, 0]
        pivot = left.gather(1, pick)
        factor[:, place] = row = torch.where(pivot > 0, row * pivot.rsqrt(), 0.0)
        left = left - row.square()
    return _trim(torch.cat(order, 1), each)


@torch.no_grad()
def cosines(unit: Tensor, mask: Tensor | None = None) -> Tensor:
    """The cosine of every token to every other [B, N, N], those of copies exactly 1; 0 for padding. unit: [B, N, D]."""
    if mask is not None:
        unit = unit.masked_fill(~mask[..., None], 0.0)
    if not unit.is_cpu or torch.compiler.is_compiling():
        return between(unit, unit)
    # image by image: a product of a batch of one is not divided among threads
    product = unit.new_empty(len(unit), unit.shape[1], unit.shape[1])
    for own, out in zip(unit, product, strict=True):
        torch.mm(own, own.mT, out=out)
    return exact(product)


@torch.no_grad()
def cover_select(
    gains: Tensor,
    count: int | Tensor,
    mask: Tensor | None = None,
    items: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Each pick j maximises `weight_j sum_i max(0, gains_ji - cover_i)`, cover_i = the highest gain of a picked token
    for item i, initially 0.

    Args:
        gains: [B, N, I], how much every token covers of each of I items.
        items: [B, I], True = to be covered; None = all.
        weight: [B, N], not negative; None = 1.
    """
    if items is not None:
        gains = gains.masked_fill(~items[:, None], 0.0)
    weight = gains.new_ones(gains.shape[:2]) if weight is None else weight

    def rows(at: Tensor) -> Tensor:
        return gains.gather(1, at[..., None].expand(-1, -1, gains.shape[2]))

    cover, panel = gains.new_zeros(len(gains), gains.shape[2]), gains.shape[1] if gains.is_cuda else _PANEL
    return _covering(rows, cover, weight.float(), panel, count, mask)


@torch.no_grad()
def coverage_select(unit: Tensor, weight: Tensor, count: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """`cover_select` where tokens cover one another as far as they are alike: each pick j maximises
    `weight_j sum_i max(0, cos_ij - cover_i)`. Where not all cosines fit, those of the tokens in question are computed.
    unit: [B, N, D] unit vectors; weight: [B, N], not negative."""
    if mask is not None:
        unit = unit.masked_fill(~mask[..., None], 0.0)  # cosine 0: padding need not be covered
    weight = weight.float()
    panel = unit.shape[1] if unit.is_cuda and fits(unit) else _PANEL
    return _covering(_rows(unit), torch.zeros_like(weight), weight, panel, count, mask)


def _covering(
    rows: Callable[[Tensor], Tensor],
    cover: Tensor,
    weight: Tensor,
    panel: int,
    count: int | Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Picks by what they cover: `rows` gives the gains [B, P, I] of tokens [B, P], `cover` [B, I] is at first 0.

    What a token would add only shrinks, so an earlier value is an upper bound. The highest bounds are recomputed, a
    panel at a time, until the highest of all is up to date: the same picks as from all tokens, with a fraction of the
    work. On a GPU all are computed, which is faster than synchronising to find out which are needed.
    """
    most, each = budget(weight, count, mask)
    taken, tokens = _taken(weight, mask), weight.shape[1]
    panel, bound = min(tokens, panel), torch.full_like(weight, float("inf"))
    order = [taken.new_zeros(len(taken), 0, dtype=torch.long)]
    for _ in range(most):
        fresh = taken.clone()
        while True:
            at = bound.masked_fill(fresh, float("-inf")).topk(panel).indices
            gain = weight.gather(1, at) * (rows(at) - cover[:, None]).clamp_(min=0).sum(-1)
            bound, fresh = bound.scatter(1, at, gain), fresh.scatter(1, at, True)
            pick = _best(bound, taken, 1)
            if panel == tokens or bool(fresh.gather(1, pick).all()):
                break
        order.append(pick)
        taken.scatter_(1, pick, True)
        cover = torch.maximum(cover, rows(pick)[:, 0])
    return _trim(torch.cat(order, 1), each)


@torch.no_grad()
def distinct_select(unit: Tensor, chosen: Tensor, each: Tensor) -> Tensor:
    """Which `each[b]` [B] of the chosen tokens [B, N] stay after duplicates are dropped: [B, N] bool.

    The n tokens that are left are split into every second one and the others; of the first half, the `min(8, n // 2,
    too many)` with the highest cosine to one of the second half are dropped; this repeats until enough are gone.
    """
    left, counts = chosen.sum(1).tolist(), each.clamp(min=0).tolist()
    partner = _looked_up(unit) if fits(unit) else None
    while True:
        drop = [min(_PER_ROUND, n // 2, n - k) if n > k else 0 for n, k in zip(left, counts, strict=True)]
        if not any(drop):
            return chosen & (each > 0)[:, None]  # if 0, one token without a partner is left over
        order = (~chosen).long().argsort(dim=1, stable=True)[:, : max(left)]
        real, removed = chosen.gather(1, order), torch.tensor(drop, device=unit.device)
        sides = order[:, ::2], order[:, 1::2], removed, real[:, ::2], real[:, 1::2]
        gone = definitions.bipartite_match(unit, *sides, partner)[0]
        column = torch.where(gone < 0, chosen.shape[1], gone)
        chosen = torch.nn.functional.pad(chosen, (0, 1)).scatter(1, column, False)[:, :-1]
        left = [n - d for n, d in zip(left, drop, strict=True)]


def _looked_up(unit: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """`best_partner` for many rounds over the same tokens: their cosines are computed once."""
    cosine = unit @ unit.mT
    image = torch.arange(len(unit), device=unit.device)[:, None, None]

    def partner(_: Tensor, a: Tensor, b: Tensor, b_valid: Tensor) -> tuple[Tensor, Tensor]:
        best = cosine[image, a[..., None], b[:, None]].masked_fill(~b_valid[:, None], float("-inf")).max(-1)
        return best.values, best.indices

    return partner


@torch.no_grad()
def dpc_knn(
    x: Tensor, count: int | Tensor, neighbors: int = 5, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Density peaks: centres are dense and far from anything denser; every token joins the nearest centre.

    With d = Euclidean distance / sqrt(D): density rho_i = exp(-mean of the `neighbors` smallest d_i^2, its own 0
    included), delta_i = distance to the nearest denser token (for the densest: the largest distance of the image), and
    the centres have the highest rho delta. Of equally dense tokens the one of lower index counts as denser, so that
    copies of a token do not all become centres. If there are fewer centres than neighbors, min(3, max(centres // 2, 1))
    neighbors are used.

    Args:
        x: [B, N, D], not normalized.

    Returns:
        centres [B, K] in the order of rho delta, -1-padded; each token's centre [B, N] (a centre's is itself), -1 for
        padding; each token's distance to it [B, N].
    """
    most, each = budget(x, count, mask)
    batch, tokens, width = x.shape
    x = x.float()
    centres_there = torch.full((batch,), most, device=x.device) if each is None else each
    none = torch.full((batch, tokens), -1, device=x.device)
    if not most:
        return none[:, :0], none, torch.full_like(none, float("inf"), dtype=torch.float32)
    index = torch.arange(tokens, device=x.device)
    size = max(1, min(tokens, definitions._TILE // max(1, batch * tokens)))
    starts = range(0, tokens, size)

    def distances(start: int, to: Tensor) -> Tensor:
        return euclidean(x[:, start : start + size], to).float()

    whole = distances(0, x) if size == tokens else None
    near = torch.where(centres_there >= neighbors, neighbors, (centres_there // 2).clamp(1, 3))[:, None, None]
    density = []
    for start in starts:
        apart = distances(start, x) if whole is None else whole
        if mask is not None:
            apart = apart.masked_fill(~mask[:, None], float("inf"))
        nearest = apart.topk(min(neighbors, tokens), largest=False).values.square()
        beyond = index[: nearest.shape[2]] >= near
        density.append(-nearest.masked_fill(beyond, 0.0).sum(-1) / near[..., 0])  # log rho: exp would underflow
    rho = torch.cat(density, 1)
    if mask is not None:
        rho = rho.masked_fill(~mask, float("-inf"))
    delta, widest = [], x.new_zeros(batch, 1)
    for start in starts:
        apart = distances(start, x) if whole is None else whole
        here = slice(start, start + size)
        denser = rho[:, None] > rho[:, here, None]
        denser |= (rho[:, None] == rho[:, here, None]) & (index < index[here, None])
        delta.append(apart.masked_fill(~denser, float("inf")).amin(2))
        if mask is not None:
            apart = apart.masked_fill(~(mask[:, here, None] & mask[:, None]), 0.0)
        widest = torch.maximum(widest, apart.flatten(1).amax(1, keepdim=True))
    far = torch.cat(delta, 1)
    score = rho + torch.where(far.isinf(), widest, far).log()
    order = _trim(_best(score, _taken(x, mask), most), each)
    centres, absent = order.masked_fill(order < 0, tokens).sort(1).values, (order < 0).sum(1)
    absent_column = index[:most] >= (most - absent)[:, None]
    places = x.gather(1, centres.clamp(max=tokens - 1)[..., None].expand(-1, -1, width))
    found = [distances(start, places).masked_fill(absent_column[:, None], float("inf")).min(2) for start in starts]
    distance = torch.cat([f.values for f in found], 1)
    target = centres.gather(1, torch.cat([f.indices for f in found], 1))
    spare = torch.nn.functional.pad(target, (0, 1))
    target = spare.scatter(1, centres, centres)[:, :tokens]  # also for a centre that coincides with another one
    alone = torch.zeros_like(target, dtype=torch.bool) if each is None else (each <= 0)[:, None].expand_as(target)
    alone = alone if mask is None else alone | ~mask  # padding, and images that get no centre
    return order, target.masked_fill(alone, -1), distance.masked_fill(alone, float("inf"))


def budget(x: Tensor, count: int | Tensor, mask: Tensor | None) -> tuple[int, Tensor | None]:
    """The largest number of picks of any image, and the number per image [B] if they may differ. x: [B, N, ...]."""
    batch, tokens = x.shape[:2]
    if mask is None and isinstance(count, int):
        return max(0, min(count, tokens)), None
    real = torch.full((batch,), tokens, device=x.device) if mask is None else mask.sum(1)
    each = real.clamp(max=count) if isinstance(count, int) else torch.minimum(real, count.to(real))
    each = each.clamp(min=0)
    return (int(each.max()) if batch else 0), each


def _taken(x: Tensor, mask: Tensor | None) -> Tensor:
    return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else ~mask


def _best(score: Tensor, taken: Tensor, count: int) -> Tensor:
    """The `count` best tokens that are not taken, best first. For any scores, taken ones come after all others."""
    score = score.nan_to_num(nan=_LOWEST, neginf=_LOWEST).masked_fill(taken, float("-inf"))
    if count == 1:
        return score.argmax(1, keepdim=True)
    return score.argsort(dim=1, descending=True, stable=True)[:, :count]


def _trim(order: Tensor, each: Tensor | None) -> Tensor:
    """Set entries after every image's own number of picks to -1."""
    if each is None:
        return order
    return order.masked_fill(torch.arange(order.shape[1], device=order.device) >= each[:, None], -1)


def fits(unit: Tensor) -> bool:
    """Whether all cosines of the batch may be in memory at once."""
    return unit.shape[0] * unit.shape[1] ** 2 <= definitions._TILE


def _rows(unit: Tensor, table: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A function from tokens [B, P] to their cosines with all tokens [B, P, N]. table: `_table(unit)`, if known."""
    batch, tokens, _ = unit.shape
    table = _table(unit) if table is None else table
    source = unit if table is None else table
    width = source.shape[2]
    flat, offset = source.reshape(batch * tokens, width), torch.arange(batch, device=unit.device)[:, None] * tokens

    def rows(at: Tensor) -> Tensor:
        chosen = flat.index_select(0, (at + offset).reshape(-1)).view(batch, at.shape[1], width)
        return chosen if table is not None else between(chosen, unit)

    return rows


def _table(unit: Tensor) -> Tensor | None:
    """All cosines [B, N, N], if they fit."""
    return cosines(unit) if fits(unit) else None


def _nearest(unit: Tensor, table: Tensor | None, mask: Tensor | None) -> Tensor:
    """The highest cosine of every token to another [B, N]. The diagonal of the table means nothing afterwards."""
    if table is None:
        nearest = definitions.energy(unit, "nearest", 0.0, mask=mask)
        return nearest.masked_fill(nearest > _SAME, 1.0)
    table.diagonal(0, 1, 2).fill_(-2.0)
    real = table if mask is None else table.masked_fill(~(mask[:, None] & mask[:, :, None]), -2.0)
    return torch.maximum(real.amax(1), real.amax(2))  # both, so that mutual nearest neighbours tie exactly


def between(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of unit vectors [..., N, D] and [..., M, D]: [..., N, M]; those of copies are 1."""
    return exact(a @ b.mT)


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances / sqrt(width) of tokens [B, N, D] and [B, M, D]: [B, N, M] float64; those of copies are 0."""
    # |a|^2 + |b|^2 - 2ab cancels for near neighbours, so it is computed in float64, where copies get a distance within
    # 1e-12 of 0; as a product it is still many times faster than differences in float32
    a, b = a.double(), b.double()
    total = a.square().sum(-1)[..., None] + b.square().sum(-1)[:, None]
    squared = torch.baddbmm(total, a, b.mT, alpha=-2.0)
    return (torch.where(squared <= 1e-12 * total, 0.0, squared) / a.shape[2]).sqrt()


def exact(cosine: Tensor) -> Tensor:
    """Cosines, in place: those of copies are 1."""
    return cosine.masked_fill_(cosine > _SAME, 1.0)
