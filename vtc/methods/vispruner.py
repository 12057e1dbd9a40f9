"""VisPruner: Beyond Text-Visual Attention, Exploiting Visual Cues, ICCV 2025, https://arxiv.org/abs/2412.01818."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.checks import check_number
from vtc.methods.order import joined, marked, packed
from vtc.methods.ranked import Ranked
from vtc.methods.selector import Selector, each
from vtc.tokens import Tokens


@dataclass(frozen=True)
class VisPruner(Ranked, Selector):
    """Important tokens first, then different ones: the `round(K fraction)` tokens that received the most attention in
    the vision tower, and of the rest those that remain after duplicates are dropped.

    The rest, n tokens in raster order, is split into every second one and the others; of the first half, the
    `min(8, n // 2, too many)` with the highest cosine to one of the second half are dropped; this repeats until K are
    left. The cosine is between the tokens at the LLM's input.

    Args:
        fraction: the share of K that attention decides on.
        importance: a score to use instead of that attention.
    """

    importance: str = "attention"
    fraction: float = 0.5

    name: ClassVar[str] = "vispruner"
    summary: ClassVar[str] = "keeps attended tokens, and of the others those without a duplicate"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("fraction", self.fraction, 0, 1)

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        importance = self.weight(tokens)
        batch, total = importance.shape
        mask = torch.ones_like(importance, dtype=torch.bool) if tokens.mask is None else tokens.mask
        counts = each(count, batch)
        first = [self.important(k) for k in counts]
        top = ops.top_select(importance, torch.tensor(first, device=mask.device), mask)
        rest = mask & ~marked(top, total)
        wanted = torch.tensor([k - n for k, n in zip(counts, first, strict=True)], device=mask.device)
        order, real = packed(ops.distinct_select(ops.normalize(tokens.features), rest, wanted))
        return joined(top, order.masked_fill(~real, -1))[:, : max(counts, default=0)]

    def important(self, k: int) -> int:
        n = round(k * self.fraction)
        return k - 1 if n >= k > 1 else n
