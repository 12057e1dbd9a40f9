"""The scores that `importance=` accepts. To add one, add an entry to `SCORES`, here or after importing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor

from vtc.scores.sensitivity import sensitivity
from vtc.scores.simple import norm, relevance
from vtc.tokens import Tokens


@dataclass(frozen=True)
class Score:
    """One measure of how important tokens are.

    Attributes:
        name: what `importance=` calls it.
        needs: the fields of `Tokens` beyond the features that it reads.
        of: Tokens -> [B, N] float, higher is more important, on any scale; padding may have any value.
    """

    name: str
    needs: frozenset[str]
    of: Callable[[Tokens], Tensor]


def _sensitivity(tokens: Tokens, **options: Any) -> Tensor:
    given = {"mask": tokens.mask, "hidden": tokens.hidden, "said": tokens.said}
    return sensitivity(tokens.projector, tokens.inputs, **given, **options)  # type: ignore[arg-type]


def _relevance(tokens: Tokens) -> Tensor:
    assert tokens.text is not None
    return relevance(tokens.features, tokens.text, tokens.text_mask, said=tokens.said)


SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        Score("attention", frozenset({"attention"}), attrgetter("attention")),
        Score("middle_attention", frozenset({"middle"}), attrgetter("middle")),
        Score("prompt_attention", frozenset({"prompt_attention"}), attrgetter("prompt_attention")),
        Score("sensitivity", frozenset({"inputs", "projector"}), _sensitivity),
        Score("relevance", frozenset({"text"}), _relevance),
        Score("norm", frozenset(), lambda tokens: norm(tokens.features)),
    )
}
