"""Ward's hierarchical clustering as a decision, for embeddings of pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.decide import decide
from vtc.errors import OptionError
from vtc.methods import ToMe
from vtc.methods.base import Method
from vtc.token_map import TokenMap
from vtc.tokens import Tokens


@dataclass(frozen=True)
class Ward(Method):
    """Joins the two clusters that are nearest by Ward's criterion, until as many are left as should stay.

    The distances between tokens are 1 - cosine, in [0, 2], as in sentence-transformers and PyLate; Ward proper would
    take Euclidean ones. The anchor of a cluster is its member of highest cosine to the cluster's mean, of equals the
    first. O(n^2) time and memory, one page after the other, on the CPU.
    """

    name: ClassVar[str] = "ward"
    summary: ClassVar[str] = "clusters tokens hierarchically and merges each cluster"
    halves: ClassVar[bool] = False
    one_shot: ClassVar[bool] = True
    encoder: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        linkage_of()  # so that a missing library is reported before anything is computed

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        features, mask = tokens.features, tokens.mask
        batch, width = features.shape[:2]
        removed = [r] * batch if isinstance(r, int) else r.tolist()
        kept = torch.zeros(batch, width, dtype=torch.bool, device=features.device)
        target = torch.full((batch, width), -1, device=features.device)
        score = torch.zeros(batch, width, device=features.device)
        for i, page in enumerate(features):
            real = torch.arange(width, device=page.device) if mask is None else mask[i].nonzero()[:, 0]
            if not len(real):
                continue
            weight = None if tokens.size is None else tokens.size[i, real]
            anchor, near = _anchors(page[real], len(real) - int(removed[i]), weight)
            target[i, real], score[i, real] = real[anchor], near
            kept[i, real[anchor]] = True
        index = torch.arange(width, device=features.device).expand(batch, width)
        source = index.masked_fill(kept | (target < 0), -1)
        return TokenMap.from_anchors(kept, (source, target, score), weight=tokens.size)


@dataclass(frozen=True)
class ToMeWard(Ward):
    """ToMe until half of the tokens are left, then Ward on those: half of Ward's time."""

    name: ClassVar[str] = "tome+ward"
    summary: ClassVar[str] = "matches pairs to a half and clusters the rest hierarchically"

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        if isinstance(r, int):
            pairs: int | Tensor = min(r, tokens.features.shape[1] // 2)
        else:
            assert tokens.mask is not None
            pairs = torch.minimum(r, tokens.mask.sum(1) // 2)
        first, rest = decide(ToMe(keep=1.0), tokens, pairs), r - pairs
        left = replace(tokens, features=first.merge(tokens.features), size=first.size, mask=first.mask())
        return first.compose(super().decide(left, rest)) if bool(torch.as_tensor(rest).any()) else first


def linkage_of() -> Callable[..., Any]:
    """Raises OptionError if neither fastcluster nor scipy is there."""
    try:
        from fastcluster import linkage
    except ImportError:
        try:
            from scipy.cluster.hierarchy import linkage
        except ImportError:
            raise OptionError(
                "Ward's clustering needs a library that is not installed: pip install fastcluster (or scipy, which is "
                'slower), or use method="dpc_knn"'
            ) from None
    return linkage


def _anchors(page: Tensor, count: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The anchor of every token's cluster, and its cosine to the cluster's mean, both [n]. page [n, D]."""
    unit = ops.normalize(page)
    cluster = _clusters(unit, count).to(page.device)
    mean = ops.merge(page[None], cluster[None], count, None if weight is None else weight[None])[0]
    near = (unit * ops.normalize(mean)[cluster]).sum(-1)
    best = near.new_full((count,), float("-inf")).scatter_reduce(0, cluster, near, "amax")[cluster]
    index = torch.arange(len(page), device=page.device)
    first = torch.where(near == best, index, len(page))
    return first.new_full((count,), len(page)).scatter_reduce(0, cluster, first, "amin")[cluster], near


def _clusters(unit: Tensor, count: int) -> Tensor:
    """The cluster of every token, [n] long on the CPU, numbered from 0 in no particular order. unit [n, D].

    The tree is cut after its first n - count joins. That is fcluster's "maxclust", except where joins have the same
    height: there it would leave fewer clusters than were asked for.
    """
    import numpy  # both libraries need it, the rest of vtc does not

    tokens = len(unit)
    if tokens == count:
        return torch.arange(tokens)
    apart = (1 - unit @ unit.mT).clamp_(0, 2).cpu().numpy()
    condensed = numpy.concatenate([row[i + 1 :] for i, row in enumerate(apart)]).astype(numpy.float64)
    tree = torch.as_tensor(linkage_of()(condensed, "ward"))
    joined = tree[: tokens - count, :2].long()
    parent = torch.arange(2 * tokens - 1)
    parent[joined] = torch.arange(tokens, tokens + len(joined))[:, None]
    while True:
        above = parent[parent]
        if torch.equal(above, parent):
            return parent[:tokens].unique(return_inverse=True)[1]
        parent = above
