"""ZOO-Prune: zeroth-order sensitivity and diversity, https://arxiv.org/abs/2509.24837."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.checks import check_number, check_seed
from vtc.errors import OptionError
from vtc.methods.ranked import Ranked
from vtc.methods.selector import Selector
from vtc.scores.registry import Score
from vtc.tokens import Tokens

# A linear projector is equally sensitive everywhere; any differences are rounding.
_FLAT = 1e-3


@dataclass(frozen=True)
class ZOOPrune(Ranked, Selector):
    """Picks, one after the other, the token to which the projector M is sensitive and that is unlike those picked
    before: `argmax_i S_i (1 - max_(j picked) cos(z_i, z_j))`, the most sensitive one first, z = M(x).

    `S_i = mean_u |M(x_i + h u) - M(x_i - h u)| / 2h` over random unit directions u, then min-max normalised per image.
    If S hardly varies (less than 1e-3 of its size, as for a linear projector), it is set to 1: diversity alone decides.

    Args:
        probes: number of directions u.
        step: h. Not used with the closed form.
        exact: the limit h -> 0 in closed form: "auto" where the projector allows it, True = required, False = never.
        seed: of the directions.
        importance: a score to use instead of S; the options probes, step, exact and seed concern the sensitivity only.
    """

    importance: str = "sensitivity"
    probes: int = 64
    step: float = 0.01
    exact: bool | str = "auto"
    seed: int = 0

    name: ClassVar[str] = "zoo_prune"
    summary: ClassVar[str] = "keeps tokens to which the projector is sensitive, unlike each other"
    nested: ClassVar[bool] = True
    _how: ClassVar[frozenset[str]] = frozenset({"probes", "step", "exact", "seed"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("probes", self.probes, 1, whole=True)
        check_number("step", self.step, 0)
        check_seed(self.seed)
        if self.step == 0:
            raise OptionError("step=0: it takes a number > 0")
        if not isinstance(self.exact, bool) and self.exact != "auto":
            raise OptionError(f'exact={self.exact!r} is unknown; choose "auto", True or False')
        if (self.scorer or self.importance != "sensitivity") and self._how & self.options().keys():
            given = ", ".join(f"{name}=" for name in sorted(self._how & self.options().keys()))
            raise OptionError(f"{given} belongs to the sensitivity, which importance={self.importance!r} does not read")

    def score(self, tokens: Tokens) -> Score:
        found = super().score(tokens)
        if found.name != "sensitivity":
            return found
        return replace(found, of=partial(found.of, **{name: getattr(self, name) for name in self._how}))

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        scaled = normalized(self.weight(tokens), tokens.mask)
        return ops.greedy_select(ops.normalize(tokens.features), scaled, count, "sads", mask=tokens.mask)


def normalized(sensitivity: Tensor, mask: Tensor | None) -> Tensor:
    """S in [0, 1] per image; 1 everywhere if it is flat. [B, N]"""
    if not sensitivity.shape[1]:
        return sensitivity
    sensitivity = sensitivity.float()
    low = (sensitivity if mask is None else sensitivity.masked_fill(~mask, float("inf"))).amin(1, keepdim=True)
    high = (sensitivity if mask is None else sensitivity.masked_fill(~mask, float("-inf"))).amax(1, keepdim=True)
    flat = high - low <= _FLAT * torch.maximum(low.abs(), high.abs())
    return torch.where(flat, 1.0, ops.minmax(sensitivity, mask, eps=1e-8))
