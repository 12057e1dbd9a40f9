"""The operators in plain torch: the definition that every faster backend must reproduce.

Shapes: B images, N tokens, D metric width, C feature width, M output tokens. Decisions are made in float32 for any
input dtype. Ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ENERGIES = ("elu", "paper", "gaussian", "nearest")
# Part of the similarity matrix in memory at one time, in float32 values (64 MiB).
_TILE = 1 << 24
# Part of an attention map in memory at one time: 8 MiB, since a map larger than the processor's cache takes twice as
# long.
_MAP = 1 << 21


def normalize(x: Tensor) -> Tensor:
    """Unit vectors in float32, `x / max(|x|, 1e-12)`; a zero vector stays zero, so its cosine is 0. [..., D]."""
    return torch.nn.functional.normalize(x.float(), dim=-1, eps=1e-12)


def energy(unit: Tensor, form: str, margin: float, alpha: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """PiToMe's energy `E_i = (1/T) sum_j f(S_ij)` of every token; high = many similar tokens = redundant.

    Args:
        unit: [B, N, D] unit vectors.
        form: "paper" (Eq. 4: S if S >= m else alpha (exp(S-m)-1)), "elu" (continuous: d if d > 0 else alpha (exp(d)-1),
            d = S-m), "gaussian" (exp(-((1-S)/sigma)^2/2) / (sigma sqrt(2 pi)), sigma = 1-m), or ours, "nearest": not
            the mean but the largest S_ij, j != i (no margin, no alpha).
        margin: m, below 1 for "gaussian".
        mask: [B, N], True = real token. Padding neither contributes nor counts in T; its energy is -inf.

    Returns:
        [B, N] float32. Only a tile of rows of the similarity matrix is in memory at a time.
    """
    batch, tokens, _ = unit.shape
    step = max(1, min(tokens, _TILE // max(1, batch * tokens)))
    itself = _itself(unit)
    rows, columns = [unit.new_zeros(batch, 0)], unit.new_full((batch, tokens), -2.0)
    for start in range(0, tokens, step):
        similarity = unit[:, start : start + step] @ unit.mT
        if form == "nearest":  # maximum over rows and columns, so that mutual nearest neighbours tie exactly
            similarity.diagonal(start, 1, 2).fill_(-2.0)
            if mask is not None:
                similarity = similarity.masked_fill(~(mask[:, start : start + step, None] & mask[:, None]), -2.0)
            columns = torch.maximum(columns, similarity.amax(1))
            rows.append(similarity.amax(2))
            continue
        similarity.diagonal(start, 1, 2).copy_(itself[:, start : start + step])
        value = _values(similarity, form, margin, alpha)
        rows.append(value.sum(-1) if mask is None else (value * mask[:, None]).sum(-1))
    total = torch.cat(rows, dim=1)
    if form == "nearest":
        value = torch.maximum(total, columns)
        return value if mask is None else value.masked_fill(~mask, float("-inf"))
    if mask is None:
        return total / max(1, tokens)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).masked_fill(~mask, float("-inf"))


def _itself(unit: Tensor) -> Tensor:
    """A token's similarity to itself, 1 (0 for a zero vector). The computed value differs from 1 by rounding, which
    would order equally redundant tokens, such as the two of a pair, at random."""
    return unit.square().sum(-1).round()


def _values(similarity: Tensor, form: str, margin: float, alpha: float) -> Tensor:
    """PiToMe's function f of every similarity."""
    if form == "elu":
        return torch.nn.functional.elu(similarity - margin, alpha=alpha, inplace=True)
    if form == "paper":
        return torch.where(similarity >= margin, similarity, (similarity - margin).expm1_().mul_(alpha))
    if form == "gaussian":
        sigma = 1.0 - margin
        squared = (1.0 - similarity).div_(sigma).square()
        return squared.mul_(-0.5).exp_().div_(sigma * (2 * torch.pi) ** 0.5)
    raise ValueError(f"unknown energy {form!r}; choose one of {', '.join(ENERGIES)}")


def _similarities(unit: Tensor, form: str, margin: float, alpha: float) -> tuple[Tensor, Tensor]:
    """All cosines [B, N, N], whose diagonal means nothing, and the energies of `energy`, but for a factor."""
    similarity = torch.bmm(unit, unit.transpose(1, 2))
    if form == "nearest":
        similarity = _with_diagonal(similarity, -2.0)
        return similarity, torch.maximum(similarity.amax(1), similarity.amax(2))
    similarity = _with_diagonal(similarity, _itself(unit))
    return similarity, _values(similarity, form, margin, alpha).sum(-1)


def _with_diagonal(x: Tensor, value: Tensor | float) -> Tensor:
    """x [B, N, N] with this diagonal, a number or [B, N]; x itself, where ONNX is not asked to write into it."""
    if torch.compiler.is_exporting():
        value = value[..., None] if isinstance(value, Tensor) else value
        return torch.where(torch.eye(x.shape[1], dtype=torch.bool, device=x.device), value, x)
    diagonal = x.flatten(1)[:, :: x.shape[1] + 1]
    diagonal.copy_(value) if isinstance(value, Tensor) else diagonal.fill_(value)
    return x


def bipartite_match(
    unit: Tensor,
    a: Tensor,
    b: Tensor,
    r: int | Tensor | None = None,
    a_valid: Tensor | None = None,
    b_valid: Tensor | None = None,
    partner: Callable[..., tuple[Tensor, Tensor]] | None = None,
    top: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Best partner in `b` for every token of `a`, and the `r` best of those pairs.

    Args:
        unit: [B, N, D] unit vectors.
        a, b: [B, Na], [B, Nb] token indices, each ascending, so that ties go to the lowest index.
        r: how many pairs to return, best first; a tensor [B] for a ragged batch; None = every token of `a`.
        a_valid, b_valid: True where the entry of `a`, `b` is real.
        partner, top: functions that find the partners and the best pairs; None = `best_partner`, `top_pairs`.

    Returns:
        source, target, score: [B, R]. Entries that do not exist (ragged) have source = target = -1, score = -inf.
    """
    if not a.shape[1] or not b.shape[1]:  # nothing to match; max() fails on an empty dimension
        none = a[:, :0]
        return none, none, unit.new_zeros(none.shape)
    best, at = (partner or best_partner)(unit, a, b, b_valid)
    if r is None and a_valid is None and b_valid is None:
        return a, b.gather(1, at), best
    if r is None:
        best = best if a_valid is None else best.masked_fill(~a_valid, float("-inf"))
        return _pairs(a, b.gather(1, at), best, torch.isneginf(best))
    each = r if isinstance(r, Tensor) else None
    most = r if isinstance(r, int) else int(r.max()) if len(r) else 0
    return (top or top_pairs)(best, at, a, b, each, min(most, a.shape[1]), a_valid)


def top_pairs(
    best: Tensor, at: Tensor, a: Tensor, b: Tensor, each: Tensor | None, most: int, a_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The `most` best pairs of every image, or `each[b]` of image b: source, target, score as from
    `bipartite_match`."""
    if a_valid is not None:
        best = best.masked_fill(~a_valid, float("-inf"))
    best, order = best.sort(dim=-1, descending=True, stable=True)
    best, order = best[:, :most], order[:, :most]
    absent = torch.isneginf(best)
    if each is not None:
        absent = absent | (torch.arange(most, device=best.device) >= each[:, None])
    return _pairs(a.gather(1, order), b.gather(1, at.gather(1, order)), best, absent)


def _pairs(source: Tensor, target: Tensor, score: Tensor, absent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return source.masked_fill(absent, -1), target.masked_fill(absent, -1), score.masked_fill(absent, float("-inf"))


def best_partner(unit: Tensor, a: Tensor, b: Tensor, b_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """For every token of `a` its highest similarity to a token of `b`, and that token's index in `b`: [B, Na] each."""
    width = unit.shape[-1]
    rows = unit.gather(1, a[..., None].expand(-1, -1, width))
    columns = unit.gather(1, b[..., None].expand(-1, -1, width))
    scores = rows @ columns.mT
    if b_valid is not None:
        scores = scores.masked_fill(~b_valid[:, None, :], float("-inf"))
    best = scores.max(dim=-1)
    return best.values, best.indices


def pair_round(
    metric: Tensor,
    weight: Tensor | None,
    r: int,
    prefix: int = 0,
    form: tuple[str, float, float] | None = None,
    half: bool = False,
    protect: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One round of pairwise merging of a batch without padding: two sets, the best partner in `b` of every token in
    `a`, and the `r` most similar of these pairs.

    Args:
        metric: [B, N, D], any length; or [B, N, H, D], whose mean over heads it is. The first `prefix` tokens take no
            part.
        weight: [B, N] float32, how many tokens each token stands for; None = 1.
        r: at most half of the tokens behind the prefix.
        form: None: every second token is in `a`, as they stand (ToMe). Otherwise they are sorted by `energy` first,
            whose form, margin and alpha this is (PiToMe).
        half: not every second token, but the r of highest energy are in `a`, the next r in `b`.
        protect: only the 2r tokens of highest energy take part.

    Returns:
        group: [B, N] long, slots in the tokens' order; size: [B, N - r] float32; source: [B, r] long, the tokens that
        joined another's slot, most similar first, counted behind the prefix; score: [B, r] float32, their cosines.
    """
    metric = over_heads(metric)
    batch, tokens, _ = metric.shape
    if not r:
        alone = torch.arange(tokens, device=metric.device).repeat(batch, 1)
        return alone, sizes(alone, tokens, weight), alone[:, :0], metric.new_zeros(batch, 0, dtype=torch.float32)
    inside = normalize(metric)[:, prefix:]
    if form is None:
        a, b = prefix % 2, 1 - prefix % 2
        best, at = _highest(torch.bmm(inside[:, a::2], inside[:, b::2].transpose(1, 2)))
        score, place = _first(best, r)
        target = at.gather(1, place)
        source = place * 2 + a
        sources, targets = (slice(prefix + side, None, 2) for side in (a, b))
    else:
        whole = batch * inside.shape[1] ** 2 <= _TILE
        similarity, high = _similarities(inside, *form) if whole else (inside, energy(inside, *form))
        order = _first(high, high.shape[1])[1]
        order = order[:, : 2 * r] if protect or half else order
        sides = (order[:, :r], order[:, r:]) if half else (order[:, 0::2], order[:, 1::2])
        not_b = torch.ones(high.shape, dtype=torch.bool, device=metric.device).scatter_(1, sides[1], False)[:, None]
        if whole and (protect or half):  # a small part of the tokens
            first = sides[0].sort(dim=1).values
            rows = similarity.gather(1, first[..., None].expand(-1, -1, high.shape[1]))
            best, at = _highest(rows.masked_fill_(not_b, -2.0))
            score, place = _first(best, r)
            source, target = first.gather(1, place), at.gather(1, place)
        elif whole:
            best, at = _highest(similarity.masked_fill_(not_b, -2.0))
            score, source = _first(best.scatter_(1, sides[1], -3.0), r)
            target = at.gather(1, source)
        else:
            first, second = (side.sort(dim=1).values for side in sides)
            source, target, score = bipartite_match(inside, first, second, r)
        place, sources, targets = source, slice(prefix, None), slice(prefix, None)
    group = joined(tokens, place, target, sources, targets)
    return group, sizes(group, tokens - source.shape[1], weight), source, score


def joined(
    tokens: int, source: Tensor, target: Tensor, sources: slice = slice(None), targets: slice = slice(None)
) -> Tensor:
    """[B, tokens] long: the slots, numbered in the tokens' order, when every source [B, r] joins its target [B, r].
    Both are counted among the tokens that `sources` and `targets` take."""
    kept = torch.ones(source.shape[0], tokens, dtype=torch.long, device=source.device)
    kept[:, sources].scatter_(1, source, 0)
    group = kept.cumsum(1).sub_(1)
    group[:, sources].scatter_(1, source, group[:, targets].gather(1, target))
    return group


def over_heads(metric: Tensor) -> Tensor:
    """[B, N, H, D] or [B, N, D] -> [B, N, D], the mean over heads."""
    return metric.mean(2, dtype=torch.float32) if metric.ndim == 4 else metric


def _highest(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """The highest value of every row, and its place. [B, A, N] -> [B, A] each."""
    best, at = similarity.max(-1, keepdim=True)  # without keepdim it takes four operators to reshape the result
    return best[..., 0], at[..., 0]


def _first(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest scores of every row, highest first, and their places."""
    if torch.onnx.is_in_onnx_export():  # ONNX has one sort, and it is stable
        values, places = score.sort(dim=1, descending=True)
    else:
        values, places = score.sort(dim=1, descending=True, stable=True)
    return values[:, :count], places[:, :count]


def sizes(group: Tensor, slots: int, weight: Tensor | None) -> Tensor:
    """[B, slots] float32: the weights of every slot's members together."""
    weight = torch.ones((), device=group.device).expand_as(group) if weight is None else weight.float()
    return torch.zeros(group.shape[0], slots, device=group.device).scatter_add_(1, group, weight)


def merge(x: Tensor, group: Tensor, slots: int, weight: Tensor | None = None, size: Tensor | None = None) -> Tensor:
    """Weighted mean of the members of every slot, accumulated in float32. Differentiable in `x`.

    Args:
        x: [B, N, C]; group: [B, N] slot of each token or -1; weight: [B, N] float32, None = ones; size: [B, slots], the
            weights of every slot together, if that is known and no token is without a slot.

    Returns:
        [B, slots, C] in x's dtype; a slot without members is 0.
    """
    batch, tokens, width = x.shape
    known = size is not None
    if size is None:
        group, slots = torch.where(group < 0, slots, group), slots + 1
        size = sizes(group, slots, weight).clamp(min=1e-12)
    if batch != 1:
        group = group + torch.arange(batch, device=x.device)[:, None] * slots
    wide = x * weight[..., None] if weight is not None else x.float() if x.itemsize < 4 else x
    at, wide = group.reshape(batch * tokens, 1).expand(-1, width), wide.reshape(batch * tokens, width)
    total = wide.new_zeros(batch * slots, width).scatter_add_(0, at, wide)
    mean = total.view(batch, slots, width) / size[..., None]
    return (mean if known else mean[:, :-1]).to(x.dtype)


def rows(x: Tensor, at: Tensor, complete: bool = False) -> Tensor:
    """x[b, at[b, i], ...], and 0 where at is -1; complete: it is so nowhere."""
    batch, tokens = x.shape[:2]
    if complete:
        return x.gather(1, at.reshape(*at.shape, *[1] * (x.ndim - 2)).expand(*at.shape, *x.shape[2:]))
    if not tokens:  # an image without tokens: every index is -1
        return x.new_zeros(*at.shape, *x.shape[2:])
    flat = at.clamp(min=0) + torch.arange(batch, device=x.device)[:, None] * tokens
    out = x.reshape(batch * tokens, *x.shape[2:]).index_select(0, flat.reshape(-1)).reshape(*at.shape, *x.shape[2:])
    absent = (at < 0).reshape(*at.shape, *([1] * (x.ndim - 2)))
    return out.masked_fill(absent, 0)


def attention_received(
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None = None,
    asking: Tensor | None = None,
    tile: int = _MAP,
) -> Tensor:
    """`a_j = mean_heads sum_i softmax_j(q_i . k_j scale)`: what every key receives from the queries that count.

    Args:
        query: [B, H, M, D]; key: [B, Hk, N, D], H a multiple of Hk.
        mask: [B, N], True = a real key; others receive nothing.
        asking: [B, M], which queries count; None = the mask if there are as many queries as keys, else all.
        tile: how many float32 values of the attention map are in memory at one time.

    Returns:
        [B, N] float32.
    """
    batch, heads, queries, _ = query.shape
    total = torch.zeros(batch, key.shape[2], device=query.device)
    asking = mask if asking is None and queries == key.shape[2] else asking
    step = max(1, tile // max(1, batch * heads * key.shape[2]))
    for start in range(0, queries, step):
        block = slice(start, start + step)
        share = attention(query[:, :, block], key, scale, mask)
        if asking is not None:
            share = share * asking[:, None, block, None]
        total += share.sum(2).mean(1)
    return total if mask is None else total * mask


def attention(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(q k^T scale) over the real keys. [B, H, Q, D], [B, Hk, N, D] -> [B, H, Q, N] float32."""
    with torch.autocast(query.device.type, enabled=False):
        grouped = (query.float() * scale).unflatten(1, (key.shape[1], -1))  # [B, Hk, H / Hk, Q, D]
        logits = (grouped @ key.float()[:, :, None].mT).flatten(1, 2)
    if mask is not None:  # not -inf: a row without real keys would become NaN
        logits = logits.masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    return logits.softmax(-1)


def probe_norms(difference: Tensor, step: float) -> Tensor:
    """`mean_j |difference_j| / 2h`, the reduction of central differences. [m, B, N, C] -> [B, N]."""
    return difference.norm(dim=-1).sum(0) / (2 * step * max(1, len(difference)))


def minmax(scores: Tensor, mask: Tensor | None = None, *, eps: float, floor: float = 0.0) -> Tensor:
    """`(s - min + floor) / (max - min + eps)`, over each image's real tokens. [B, N] -> [B, N] float32."""
    if not scores.shape[1]:
        return scores
    scores = scores.float()
    low = (scores if mask is None else scores.masked_fill(~mask, float("inf"))).amin(1, keepdim=True)
    high = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).amax(1, keepdim=True)
    return (scores - low + floor) / (high - low + eps)


def nearest_kept(kept: Tensor) -> Tensor:
    """For every token the index of the nearest kept token in sequence order, ties to the lower index. [B, N]."""
    tokens = kept.shape[1]
    if not tokens:
        return kept.long()
    index = torch.arange(tokens, device=kept.device).expand_as(kept)
    before = index.masked_fill(~kept, -tokens).cummax(dim=1).values
    after = index.masked_fill(~kept, 2 * tokens).flip(1).cummin(dim=1).values.flip(1)
    return torch.where(index - before <= after - index, before, after).clamp(0, tokens - 1)


@torch.library.custom_op("vtc::seeded_uniform", mutates_args=())
def seeded_uniform(seed: int, n: int, device: torch.device) -> Tensor:
    """[n] float32 draws in [0, 1) that depend on the seed alone, the same on every device. A longer draw continues a
    shorter one, so padding changes nothing. An operator of its own because compiled graphs hold no generators."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator).to(device)


@seeded_uniform.register_fake
def _(seed: int, n: int, device: torch.device) -> Tensor:
    return torch.empty(n, device=device)
