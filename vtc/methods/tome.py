"""ToMe: Token Merging, Bolya et al., ICLR 2023, https://arxiv.org/abs/2210.09461."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.methods.base import Method
from vtc.token_map import TokenMap
from vtc.tokens import Tokens


@dataclass(frozen=True)
class ToMe(Method):
    """Every second token is paired with its most similar partner among the others; the r most similar pairs merge."""

    name: ClassVar[str] = "tome"
    summary: ClassVar[str] = "merges the most similar pairs of an alternating split"
    needs: ClassVar[frozenset[str]] = frozenset({"layer_keys"})
    optional: ClassVar[frozenset[str]] = needs
    each_head: ClassVar[bool] = True

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        metric = tokens.features if tokens.layer_keys is None else tokens.layer_keys
        return tome_round(metric, r, tokens.prefix, tokens.mask, tokens.size)


def tome_round(
    metric: Tensor, r: int | Tensor, prefix: int = 0, mask: Tensor | None = None, size: Tensor | None = None
) -> TokenMap:
    """One round of bipartite soft matching: even real tokens merge into odd ones; the prefix is in neither set. [B, N,
    D]."""
    if mask is None:
        assert isinstance(r, int)
        return TokenMap.from_round(metric, r, prefix, size)
    metric = ops.over_heads(metric)
    real = mask.long().cumsum(1) - 1  # parity counts real tokens, so that padding changes nothing
    inside = mask & (real >= prefix)
    a, a_valid = _packed(inside & (real % 2 == 0))
    b, b_valid = _packed(inside & (real % 2 == 1))
    pairs = ops.bipartite_match(ops.normalize(metric), a, b, r, a_valid, b_valid)
    return TokenMap.from_pairs(metric.shape[1], pairs, mask=mask, weight=size)


def _packed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the chosen tokens, ascending, at the front of every row, and which entries are real."""
    order = (~chosen).long().argsort(dim=1, stable=True)
    most = max(1, int(chosen.sum(1).max()) if chosen.numel() else 0)
    return order[:, :most], chosen.gather(1, order)[:, :most]
