"""The baseline for everything that scores tokens: their length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.methods.ranked import Ranked
from vtc.methods.selector import Selector
from vtc.tokens import Tokens


@dataclass(frozen=True)
class Norm(Ranked, Selector):
    """Keeps the K tokens of largest L2 norm, `|v_i|`. Costs nothing and agrees with more expensive scores more than one
    would expect, so scores should be compared with it.

    Args:
        importance: another score to rank by, on its own, without regard to similarities between tokens.
    """

    importance: str = "norm"

    name: ClassVar[str] = "norm"
    summary: ClassVar[str] = "keeps the longest tokens, by L2 norm (baseline)"
    nested: ClassVar[bool] = True

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        return ops.top_select(self.weight(tokens), count, tokens.mask)
