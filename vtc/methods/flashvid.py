"""FlashVID: tree-based spatiotemporal token merging for video LLMs, https://arxiv.org/abs/2602.08024."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.budget import share_out
from vtc.checks import check_flag, check_fraction, check_number
from vtc.frames import by_place, segments
from vtc.methods.ranked import Ranked, require
from vtc.methods.selector import each, stays
from vtc.token_map import TokenMap
from vtc.tokens import Tokens

_NEIGHBORS = 7  # of a density
_LEAST = 1e-6  # relevance, which may be negative


@dataclass(frozen=True)
class FlashVID(Ranked):
    """Cuts a video into segments; keeps of every frame tokens that are attended to and unlike each other (ADTS); links
    the others to their likes in the frame before, so that trees grow through the frames of a segment (TSTM); and merges
    the roots of these trees, frame by frame, in clusters.

    A frame's budget B is the video's divided by its frames; `ceil(alpha B)` go to ADTS, which picks the token that
    maximises `min_i (1 - cos(x_i, x_j)) a_j e_j` over the i picked, a the attention received in the tower and e the
    mean product with the mean tokens of the segment's frames. The rest goes to clusters at density peaks (DPC-KNN; k is
    the number of clusters, 3 to 7, with the token itself). A merged token is the mean of all tokens of its trees;
    tokens of a frame for which no cluster is left join the most similar token that stays. The released code divides by
    the root's children alone, hands tokens that ADTS kept to the clusters as well, and keeps a quarter more before a
    decoder layer that prunes again: here `keep` is what stays.

    Args:
        importance: a score to use instead of the attention.
        alpha: part of the budget for ADTS.
        link: the least cosine of a token to its parent. cut: of the mean tokens of two frames of one segment.
        segments: at least that many, or one for every frame.
        relevance: False = without e, ADTS's first form.
        exact: clusters are shared out over the frames of a segment so that the whole budget stays, and no more. False:
            every frame's number is rounded up, as in the released code, whose totals are a few tokens more.
    """

    importance: str = "attention"
    alpha: float = 0.7
    link: float = 0.8
    cut: float = 0.9
    segments: int = 8
    relevance: bool = True
    exact: bool = True

    name: ClassVar[str] = "flashvid"
    summary: ClassVar[str] = "keeps attended, diverse tokens of every frame, merges the others over time, in videos"
    halves: ClassVar[bool] = False
    one_shot: ClassVar[bool] = True
    encoder: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset({"frames"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("alpha", self.alpha, or_count=False)
        check_number("link", self.link, -1)
        check_number("cut", self.cut, -1)
        check_number("segments", self.segments, 1, whole=True)
        check_flag("relevance", self.relevance)
        check_flag("exact", self.exact)

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        weight, frames = self.weight(tokens), require(tokens, "frames", self.name)
        batch, total = tokens.features.shape[:2]
        target = torch.full((batch, total), -1, device=tokens.features.device)
        apart = torch.zeros(batch, total, device=target.device)
        for i, count in enumerate(each(stays(tokens, r), batch)):
            real = slice(None) if tokens.mask is None else tokens.mask[i]
            place = torch.arange(total, device=target.device)[real]
            goes, far = self.of_video(tokens.features[i][real], weight[i][real], frames[i], count)
            target[i, place], apart[i, place] = place[goes], far
        index = torch.arange(total, device=target.device).expand_as(target)
        kept = target == index
        source = index.masked_fill(kept | (target < 0), -1)
        return TokenMap.from_anchors(kept, (source, target, -apart), weight=tokens.size)

    def of_video(self, x: Tensor, weight: Tensor, frames: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        """Where every token x [n, C] goes, itself if it stays [n] long, and how far it is from there (1 - cos)."""
        x, weight = by_place(x.float(), frames), by_place(weight, frames)
        time, places = weight.shape
        budgets = share_out(count, [count / time] * time, frames, least=int(count >= time))
        target = torch.empty(time * places, dtype=torch.long, device=x.device)
        unit, start = ops.normalize(x), 0
        for length in segments(x.mean(1), self.cut, self.segments):
            of = slice(start, start + length)
            first = [min(b, math.ceil(self.alpha * b)) for b in budgets[of]]
            gain = weight[of] * relevance(x[of]) if self.relevance else weight[of]
            chosen = adts(unit[of], gain, first)
            root = trees(unit[of], chosen, sum(budgets[of]), self.link)
            goes = clusters(x[of], chosen, root, sum(budgets[of]) - sum(first), self.exact)
            target[start * places : (start + length) * places] = torch.where(goes < 0, -1, goes + start * places)
            start += length
        unit = unit.flatten(0, 1)
        if bool((alone := target < 0).any()):
            kept = (target == torch.arange(len(target), device=target.device)).nonzero()[:, 0]
            target[alone] = kept[(unit[alone] @ unit[kept].T).argmax(1)]
        return target, 1 - (unit * unit[target]).sum(-1)


def relevance(x: Tensor) -> Tensor:
    """e [F, N] of a segment x [F, N, C]; not below a small positive number, as a negative one would turn the order of
    the distances around."""
    return (x @ x.mean(1).T).mean(-1).clamp(min=_LEAST)


def adts(unit: Tensor, gain: Tensor, counts: Sequence[int]) -> Tensor:
    """Attention and diversity based selection in the frames of a segment: `counts[t]` tokens of frame t.

    unit: [F, N, C] unit vectors; gain: [F, N], attention times relevance. Returns [F, N] bool.
    """
    apart = (unit @ unit.mT).neg_().add_(1).mul_((1e6 * gain.float())[:, None])  # [F, i, j]
    apart.diagonal(0, 1, 2).zero_()
    chosen = torch.zeros(gain.shape, dtype=torch.bool, device=gain.device)
    frame, wanted = torch.arange(len(unit), device=gain.device), torch.tensor(counts, device=gain.device)
    near = apart.topk(min(2, unit.shape[1]), dim=1, largest=False).values[:, -1]
    for turn in range(max(counts, default=0)):
        best = near.masked_fill(chosen, float("-inf")).argmax(1)
        chosen[frame, best] |= turn < wanted
        row = apart[frame, best]
        near = row if turn == 0 else torch.minimum(near, row)
    return chosen


def trees(unit: Tensor, chosen: Tensor, least: int, link: float) -> Tensor:
    """The root [F * N] long of every token of a segment, unit vectors [F, N, C]. A token that is not `chosen` is linked
    to its nearest such token in the frame before, if their cosine is above `link`; of so many links that less
    than `least` tokens were roots, only those of the highest cosines hold, one less than could."""
    frames, places = chosen.shape
    own = torch.arange(frames * places, device=unit.device)
    if frames == 1:
        return own
    cosine = ops.between(unit[1:], unit[:-1]).masked_fill_(chosen[:-1, None], float("-inf"))
    alike, parent = cosine.max(2)
    alike = alike.masked_fill(chosen[1:], float("-inf"))
    linked = alike > link
    most = frames * places - least
    if int(linked.sum()) > most:
        best = ops.top_select(alike.view(1, -1), max(0, most - 1))[0]
        linked = torch.zeros_like(linked).view(-1).index_fill(0, best, True).view_as(linked)
    root = own.view(frames, places).clone()
    for t in range(1, frames):
        root[t] = torch.where(linked[t - 1], root[t - 1][parent[t - 1]], root[t])
    return root.flatten()


def clusters(x: Tensor, chosen: Tensor, root: Tensor, count: int, exact: bool = True) -> Tensor:
    """Where every token of a segment x [F, N, C] goes [F * N] long: the roots that are not `chosen` join `count`
    centres, shared out over the frames by how many roots each has; not `exact`: each frame's share rounded up. -1 = the
    token's frame has no share."""
    frames, places = chosen.shape
    own = torch.arange(frames * places, device=x.device)
    top = ((root == own) & ~chosen.flatten()).view(frames, places)
    flat = x.flatten(0, 1)
    size = torch.bincount(root, minlength=len(own))
    tree = torch.zeros_like(flat).index_add_(0, root, flat) / size.clamp(min=1)[:, None]
    roots = top.sum(1).tolist()
    quotas = [count * n / max(1, sum(roots)) for n in roots]
    shares = share_out(count, quotas, roots, least=0) if exact else [math.ceil(q) for q in quotas]
    goes = own.clone()
    for t, share in enumerate(shares):
        at = top[t].nonzero()[:, 0] + t * places
        if share < len(at):
            goes[at] = at[_peaks(tree[at], share)] if share else -1
    return goes[root]


def _peaks(x: Tensor, count: int) -> Tensor:
    """The centre that every one of x [n, C] joins [n] long, of `count` < n density peaks."""
    apart = ops.euclidean(x[None], x[None])[0]
    # with less than two others, near tokens tie
    near = apart.topk(min(max(count, 3), _NEIGHBORS, len(x)), largest=False).values
    density = -near.square().mean(1)  # log rho
    denser = density[None] > density[:, None]
    delta = apart.masked_fill(~denser, float("inf")).amin(1)
    delta = torch.where(delta.isinf(), apart.max(), delta)
    centres = ops.top_select((density + delta.log())[None], count)[0].sort().values
    joins = centres[apart[:, centres].argmin(1)]
    joins[centres] = centres
    return joins
