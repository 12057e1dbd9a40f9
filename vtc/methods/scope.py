"""SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs, https://arxiv.org/abs/2510.24214."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.checks import check_number
from vtc.methods.ranked import Ranked
from vtc.methods.selector import Selector
from vtc.tokens import Tokens


@dataclass(frozen=True)
class SCOPE(Ranked, Selector):
    """Picks, one after the other, the token that covers the most of what is not covered yet, and is salient:
    `argmax_j a_j^alpha sum_i max(0, cos(v_i, v_j) - c_i)`, c_i the highest cosine of token i to a picked one, initially
    0; a is the attention that a token received in the vision tower.

    Args:
        alpha: how much saliency counts; 0 = coverage alone.
        importance: a score to use instead of that attention; if it has negative values, it is shifted so that its
            lowest value is 0.
    """

    importance: str = "attention"
    alpha: float = 1.0

    name: ClassVar[str] = "scope"
    summary: ClassVar[str] = "keeps salient tokens that together cover the others"
    nested: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0)

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        weight = self.weight(tokens)
        if weight.shape[1]:
            weight = weight - weight.amin(1, keepdim=True).clamp(max=0)
        return ops.coverage_select(ops.normalize(tokens.features), weight**self.alpha, count, tokens.mask)
