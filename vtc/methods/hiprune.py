"""HiPrune: Hierarchical Attention for Efficient Token Pruning in VLMs, https://arxiv.org/abs/2508.00553."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.checks import check_number
from vtc.errors import OptionError
from vtc.methods.ranked import Ranked, checked, require
from vtc.methods.selector import Selector, each
from vtc.tokens import Tokens


@dataclass(frozen=True)
class HiPrune(Ranked, Selector):
    """Keeps anchors, their neighbours, and the rest by attention: the `round(K alpha / 5)` tokens (at least 1 from K =
    5 on) that received the most attention in the middle of the vision tower, the four neighbours of each, then those
    that received the most near its end, until there are K.

    The neighbours of token i are i - 1, i + 1, i - width and i + width in raster order, clamped to the image, as in the
    released code: at the edge of a row they lie in the adjacent row. The released code may keep more than K; here
    anchors come first, by falling attention, then their neighbours in that order, and tokens beyond K are dropped.

    Args:
        alpha: the share of K that goes to anchors and their neighbours.
        importance: a score for the rest, instead of the attention near the tower's end.
    """

    importance: str = "attention"
    alpha: float = 0.1

    name: ClassVar[str] = "hiprune"
    summary: ClassVar[str] = "keeps attended tokens of the tower's middle with neighbours, and of its end"
    reads: ClassVar[frozenset[str]] = frozenset({"middle", "grid"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0, 1)

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        importance = self.weight(tokens)
        middle = checked(require(tokens, "middle", self.name), "attention in the middle", tokens)
        batch, total = importance.shape
        device, grid = importance.device, require(tokens, "grid", self.name)
        mask = torch.ones(batch, total, dtype=torch.bool, device=device) if tokens.mask is None else tokens.mask
        real = mask.sum(1)
        if [rows * columns for rows, columns in grid] != real.tolist():
            raise OptionError(f"hiprune needs all tokens of each image, but the grid {grid} is not {real.tolist()}")
        counts = [self.anchors(k) for k in each(count, batch)]
        anchors = ops.top_select(middle, torch.tensor(counts, device=device), mask)

        place = mask.long().cumsum(1) - 1  # a token's index among the real ones, and back
        token = (~mask).long().argsort(dim=1, stable=True)
        width = torch.tensor([columns for _, columns in grid], device=device)
        ones = torch.ones_like(width)
        steps = torch.stack([-ones, ones, -width, width], 1)[:, None]
        around = place.gather(1, anchors.clamp(min=0))[..., None] + steps
        around = torch.minimum(around.clamp(min=0), (real - 1)[:, None, None]).clamp(min=0).flatten(1)
        around = token.gather(1, around).masked_fill((anchors < 0).repeat_interleave(4, 1), -1)

        # a token's priority is its first place in the list of all wishes
        wishes = torch.cat([anchors, around, ops.top_select(importance, total, mask)], 1)
        at = torch.arange(wishes.shape[1], device=device).expand_as(wishes)
        first = at.new_full((batch, total + 1), wishes.shape[1])
        first = first.scatter_reduce(1, torch.where(wishes < 0, total, wishes), at, "amin")
        return ops.top_select(-first[:, :total].float(), count, mask)

    def anchors(self, k: int) -> int:
        return max(round(k * self.alpha / 5), int(k >= 5))
