"""IDPruner: importance and diversity by maximal marginal relevance, https://arxiv.org/abs/2602.13315."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.checks import check_number
from vtc.errors import OptionError
from vtc.methods.ranked import Ranked
from vtc.methods.selector import Selector
from vtc.scores.simple import rank
from vtc.tokens import Tokens

NORMALIZE = ("minmax", "rank", "none")


@dataclass(frozen=True)
class IDPruner(Ranked, Selector):
    """Picks, one after the other, the token that is important and unlike those picked before:
    `argmax_j balance I_j - (1 - balance) max_(i picked) cos(v_i, v_j)`, the most important one first.

    I is the importance in [0, 1]: `(w - min w) / (max w - min w + 1e-6)` per image. The paper's w comes from a trained
    scorer of visual tokens (`scorer=`); the formula works with any importance. If cosines are negative, the second term
    becomes a bonus; in the paper none were.

    Args:
        balance: lambda; 1 = importance alone, 0 = diversity alone.
        normalize: "minmax" as in the paper, "rank" (robust to outliers) or "none".
        step: tokens picked per round, without comparing them with each other.
    """

    balance: float = 0.5
    normalize: str = "minmax"
    step: int = 1

    name: ClassVar[str] = "idpruner"
    summary: ClassVar[str] = "keeps tokens that are important and unlike each other (greedy MMR)"
    nested: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mmr(self.balance, self.normalize, self.step)

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        scaled = normalized(self.weight(tokens), self.normalize, tokens.mask)
        unit = ops.normalize(tokens.features)
        return ops.greedy_select(unit, scaled, count, "mmr", self.balance, self.step, tokens.mask)


def normalized(weight: Tensor, how: str, mask: Tensor | None) -> Tensor:
    if how == "minmax":
        return ops.minmax(weight, mask, eps=1e-6)
    return rank(weight, mask) if how == "rank" else weight


def check_mmr(balance: float, normalize: str, step: int) -> None:
    check_number("balance", balance, 0, 1)
    check_number("step", step, 1, whole=True)
    if normalize not in NORMALIZE:
        raise OptionError(f"normalize={normalize!r} is unknown; choose one of {', '.join(NORMALIZE)}")
