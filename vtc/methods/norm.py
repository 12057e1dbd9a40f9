"""The baseline of everything that scores tokens: how long they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.methods.base import Tokens
from vtc.methods.selector import Selector, checked


@dataclass(frozen=True)
class Norm(Selector):
    """Keeps the K tokens of largest L2 norm, `|v_i|`. Costs nothing and agrees with dearer scores more than one would
    think, so a score has to be compared with it."""

    name: ClassVar[str] = "norm"
    summary: ClassVar[str] = "keeps the longest tokens, by L2 norm (baseline)"

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        from vtc import scores

        return ops.top_select(checked(scores.norm(tokens.features), "norm", tokens), count, tokens.mask)
