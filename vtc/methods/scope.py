"""SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs, https://arxiv.org/abs/2510.24214."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.checks import check_number
from vtc.methods.base import Tokens
from vtc.methods.selector import Selector, checked, evidence


@dataclass(frozen=True)
class SCOPE(Selector):
    """Picks, one after the other, the token that covers the most of what is not covered yet, and is salient:
    `argmax_j a_j^alpha sum_i max(0, cos(v_i, v_j) - c_i)`, c_i the highest cosine of token i to a picked one, at
    first 0; a is the attention that a token received in the vision tower.

    Args:
        alpha: how much saliency counts; 0 = coverage alone.
    """

    alpha: float = 1.0

    name: ClassVar[str] = "scope"
    summary: ClassVar[str] = "keeps salient tokens that together cover the others"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, 0)

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        saliency = checked(evidence(tokens, "attention", self.name), "attention", tokens) ** self.alpha
        return ops.coverage_select(ops.normalize(tokens.features), saliency, count, tokens.mask)
