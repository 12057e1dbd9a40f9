"""DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, https://arxiv.org/abs/2503.02175."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.methods.selector import Selector
from vtc.tokens import Tokens


@dataclass(frozen=True)
class DivPrune(Selector):
    """Max-min diversity: picks, one after the other, the token farthest from those picked before,
    `argmax_j min_(i picked) 1 - cos(v_i, v_j)`. The first is the token whose nearest other token is farthest away."""

    name: ClassVar[str] = "divprune"
    summary: ClassVar[str] = "keeps tokens that are far from each other (max-min diversity)"
    nested: ClassVar[bool] = True

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        return ops.greedy_select(ops.normalize(tokens.features), None, count, "max_min", mask=tokens.mask)
