"""VisPruner: Beyond Text-Visual Attention, Exploiting Visual Cues, ICCV 2025, https://arxiv.org/abs/2412.01818."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.checks import check_number
from vtc.methods.order import joined, marked, packed
from vtc.methods.ranked import Ranked
from vtc.methods.selector import Selector, each
from vtc.ops import definitions, selection
from vtc.tokens import Tokens

_PER_ROUND = 8  # duplicates dropped at a time


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
        rest = distinct(ops.normalize(tokens.features), rest, [k - n for k, n in zip(counts, first, strict=True)])
        return joined(top, rest)[:, : max(counts, default=0)]

    def important(self, k: int) -> int:
        n = round(k * self.fraction)
        return k - 1 if n >= k > 1 else n


def distinct(unit: Tensor, chosen: Tensor, counts: list[int]) -> Tensor:
    """Which `counts[b]` of the chosen tokens [B, N] stay after duplicates are dropped: [B, K], ascending, -1-padded."""
    left = chosen.sum(1).tolist()
    partner = _looked_up(unit) if selection.fits(unit) else None
    while True:
        rest, real = packed(chosen)
        drop = [min(_PER_ROUND, n // 2, n - k) for n, k in zip(left, counts, strict=True)]
        if not any(drop):
            wanted = torch.tensor(counts, device=rest.device)[:, None]  # if 0, one token without a partner is left over
            return rest.masked_fill(~real | (wanted == 0), -1)
        removed = torch.tensor(drop, device=rest.device)
        sides = rest[:, ::2], rest[:, 1::2], removed, real[:, ::2], real[:, 1::2]
        gone = (definitions.bipartite_match(unit, *sides, partner) if partner else ops.bipartite_match(unit, *sides))[0]
        chosen = chosen & ~marked(gone, chosen.shape[1])
        left = [n - d for n, d in zip(left, drop, strict=True)]


def _looked_up(unit: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """`best_partner` for many rounds over the same tokens: their cosines are computed once."""
    cosine = unit @ unit.mT
    image = torch.arange(len(unit), device=unit.device)[:, None, None]

    def partner(_: Tensor, a: Tensor, b: Tensor, b_valid: Tensor) -> tuple[Tensor, Tensor]:
        best = cosine[image, a[..., None], b[:, None]].masked_fill(~b_valid[:, None], float("-inf")).max(-1)
        return best.values, best.indices

    return partner
