"""IDPruner: importance and diversity by maximal marginal relevance, https://arxiv.org/abs/2602.13315."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vtc import ops
from vtc.checks import check_number
from vtc.errors import OptionError
from vtc.methods.base import Tokens
from vtc.methods.selector import Selector, checked, evidence, minmax, rank

NORMALIZE = ("minmax", "rank", "none")
# What each kind of importance reads.
_NEEDS: dict[str, frozenset[str]] = {
    "auto": frozenset({"attention"}),
    "attention": frozenset({"attention"}),
    "norm": frozenset(),
    "sensitivity": frozenset({"inputs", "projector"}),
    "relevance": frozenset({"text"}),
    "selector": frozenset(),
}


@dataclass(frozen=True)
class IDPruner(Selector):
    """Picks, one after the other, the token that is important and unlike those picked before:
    `argmax_j balance I_j - (1 - balance) max_(i picked) cos(v_i, v_j)`, the most important one first.

    I is the importance in [0, 1]: `(w - min w) / (max w - min w + 1e-6)` per image. The paper's w comes from a trained
    scorer of visual tokens (`scorer=`); the formula takes any importance. Where cosines are negative, the second term
    rewards; the paper met none.

    Args:
        balance: lambda; 1 = importance alone, 0 = diversity alone.
        importance: "attention" (received in the vision tower), "sensitivity" (of the projector's output, as in
            ZOO-Prune), "relevance" (cosine to the prompt's text), "norm" (L2), "selector" (a trained scorer), or
            "auto": attention where the model gives it, else sensitivity, else norm.
        normalize: "minmax" as in the paper, "rank" (one outlier does not press all others together) or "none".
        step: tokens picked per round without seeing each other.
        scorer: path of a scorer's weights (safetensors); means importance="selector".
    """

    balance: float = 0.5
    importance: str = "auto"
    normalize: str = "minmax"
    step: int = 1
    scorer: str | None = None

    name: ClassVar[str] = "idpruner"
    summary: ClassVar[str] = "keeps tokens that are important and unlike each other (greedy MMR)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mmr(self.balance, self.normalize, self.step)
        if self.importance not in list(_NEEDS):
            raise OptionError(f"importance={self.importance!r} is unknown; choose one of {', '.join(_NEEDS)}")
        if isinstance(self.scorer, Path):
            object.__setattr__(self, "scorer", str(self.scorer))
        if self.scorer is not None and not isinstance(self.scorer, str):
            raise OptionError(f"scorer={self.scorer!r}: it takes the path of a scorer's weights (safetensors)")
        if self.scorer is None and self.importance == "selector":
            raise OptionError('importance="selector" needs scorer=, the path of a scorer\'s weights (safetensors)')
        if self.scorer is not None and self.importance not in ("auto", "selector"):
            raise OptionError(f"scorer= and importance={self.importance!r} contradict each other: give one of them")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return _NEEDS["selector" if self.scorer is not None else self.importance]

    @property
    def optional(self) -> frozenset[str]:  # type: ignore[override]
        return self.needs if self.importance == "auto" else frozenset()

    def source(self, tokens: Tokens) -> str:
        """Where the importance of these tokens comes from."""
        if self.scorer is not None:
            return "selector"
        if self.importance != "auto":
            return self.importance
        if tokens.attention is not None:
            return "attention"
        return "sensitivity" if tokens.inputs is not None and tokens.projector is not None else "norm"

    def check(self, width: int) -> None:
        if self.scorer is not None and (trained := _load(self.scorer)).width != width:
            of = f" for {trained.model}" if trained.model else ""
            raise OptionError(
                f"scorer={self.scorer!r} was trained{of} on tokens of width {trained.width}, but this model's have "
                f"{width}: train one for this model (vtc.train)"
            )

    def notes(self, tokens: Tokens) -> str:
        return f"importance: {self.source(tokens)}" if self.importance == "auto" else ""

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        source = self.source(tokens)
        weight = checked(self._weight(tokens, source), f"importance ({source})", tokens)
        scaled = normalized(weight, self.normalize, tokens.mask)
        unit = ops.normalize(tokens.features)
        return ops.greedy_select(unit, scaled, count, "mmr", self.balance, self.step, tokens.mask)

    def _weight(self, tokens: Tokens, source: str) -> Tensor:
        from vtc import scores

        of = {field: evidence(tokens, field, f"idpruner by {source}") for field in _NEEDS[source]}
        if source == "attention":
            return of["attention"]
        if source == "sensitivity":
            return scores.sensitivity(
                of["projector"], of["inputs"], mask=tokens.mask, hidden=tokens.hidden, said=tokens.said
            )
        if source == "relevance":
            return scores.relevance(tokens.features, of["text"], tokens.text_mask, said=tokens.said)
        if source == "selector":
            assert self.scorer is not None
            return _load(self.scorer).to(tokens.features.device).score(tokens.features, tokens.mask)
        return scores.norm(tokens.features)


def _load(path: str) -> Any:
    try:
        return _read(path, Path(path).stat().st_mtime_ns)  # a file that is written anew is read anew
    except OSError as error:
        raise OptionError(f"scorer={path!r} cannot be read: {error.strerror}") from None


@lru_cache(maxsize=1)
def _read(path: str, written: int) -> Any:
    from vtc import scores

    return scores.load_selector(path)


def normalized(weight: Tensor, how: str, mask: Tensor | None) -> Tensor:
    if how == "minmax":
        return minmax(weight, mask, eps=1e-6)
    return rank(weight, mask) if how == "rank" else weight


def check_mmr(balance: float, normalize: str, step: int) -> None:
    check_number("balance", balance, 0, 1)
    check_number("step", step, 1, whole=True)
    if normalize not in NORMALIZE:
        raise OptionError(f"normalize={normalize!r} is unknown; choose one of {', '.join(NORMALIZE)}")
