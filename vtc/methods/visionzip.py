"""VisionZip: Longer is Better but Not Necessary in Vision Language Models, https://arxiv.org/abs/2412.04467."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.order import marked, packed
from vtc.methods.ranked import Ranked, checked, require
from vtc.methods.selector import each, stays
from vtc.token_map import TokenMap
from vtc.tokens import Tokens

_TARGETS = 10 / 64  # the share of K that are merge targets: 10 of the paper's 64 tokens


@dataclass(frozen=True)
class VisionZip(Ranked):
    """Dominant tokens stay unmerged; the others merge into a few of their own number at regular distances.

    Of K tokens, `K_t = max(1, round(10 K / 64))` are targets and the other K - K_t dominant: those that received the
    most attention in the vision tower. Of the tokens that are not dominant, in raster order, every
    `(their number // K_t)`-th is a target, K_t of them; each of the others joins the target whose attention key has the
    highest cosine to its own. A merged token is the unweighted mean of its members.

    Args:
        importance: the score that decides the dominant tokens; the paper's is the default.
    """

    importance: str = "attention"

    name: ClassVar[str] = "visionzip"
    summary: ClassVar[str] = "keeps attended tokens, merges the others into evenly spaced ones"
    halves: ClassVar[bool] = False
    one_shot: ClassVar[bool] = True
    encoder: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset({"keys"})

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        importance = self.weight(tokens)
        keys = require(tokens, "keys", self.name)
        checked(keys.float().sum(-1), "attention keys", tokens)
        unit = ops.normalize(keys)
        batch, total = importance.shape
        device, count = importance.device, stays(tokens, r)
        if not total:
            return TokenMap.identity(batch, total, device)
        if tokens.mask is None:
            assert isinstance(count, int)
            return _alike(importance, unit, count, tokens.size)
        mask, keep = tokens.mask, torch.as_tensor(count, device=device).expand(batch)
        aims = torch.tensor([_targets(k) for k in each(count, batch)], device=device)
        dominant = marked(ops.top_select(importance, keep - aims, mask), total)

        others = mask & ~dominant
        place = others.long().cumsum(1) - 1  # index among the others
        stride = (others.sum(1) // aims.clamp(min=1)).clamp(min=1)[:, None]
        target = others & (place % stride == 0) & (place // stride < aims[:, None])

        joins, joins_valid = packed(others & ~target)
        targets, targets_valid = packed(target)
        pairs = ops.bipartite_match(unit, joins, targets, None, joins_valid, targets_valid)
        return TokenMap.from_anchors(dominant | target, pairs, weight=tokens.size)


def _targets(count: int) -> int:
    """How many of `count` tokens are merge targets."""
    return min(count, max(1, round(count * _TARGETS)))


def _alike(importance: Tensor, unit: Tensor, count: int, size: Tensor | None) -> TokenMap:
    """The same where all images have the same number of tokens: every place among the others is known beforehand."""
    total, aims = importance.shape[1], _targets(count)
    others = ops.top_select(importance, total)[:, count - aims :].sort(1).values
    stride = others.shape[1] // aims
    spans = others[:, : aims * stride].unflatten(1, (aims, stride))  # each begins with a target
    joins = torch.cat([spans[..., 1:].flatten(1), others[:, aims * stride :]], 1)
    return TokenMap.from_pairs(total, ops.bipartite_match(unit, joins, spans[..., 0], None), weight=size, complete=True)
