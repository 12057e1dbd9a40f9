"""The base of methods that rank tokens: the source of their importance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vtc.checks import check_finite, renamed
from vtc.errors import InputError, OptionError
from vtc.methods.base import Method
from vtc.scores.registry import SCORES, Score
from vtc.tokens import FIELDS, Tokens

_AUTO = ("attention", "sensitivity", "norm")


@dataclass(frozen=True)
class Ranked(Method):
    """A method that ranks tokens by importance, which may be any registered score. Subclasses read `weight`.

    Args:
        importance: the name of a score, of `vtc.scores.SCORES`: "attention" (received in the vision tower, near its
            end), "middle_attention" (in its middle), "sensitivity" (of the projector's output), "relevance" (cosine to
            the prompt's text), "norm" (L2), inside the decoder "prompt_attention" (from the prompt's last word);
            "scorer", a trained one; or "auto": attention if it is available, else sensitivity if its inputs are, else
            norm.
        scorer: path of a trained scorer's weights (safetensors); means importance="scorer".
    """

    importance: str = "auto"
    scorer: str | None = None

    reads: ClassVar[frozenset[str]] = frozenset()  # fields of Tokens that are read with any importance

    def __post_init__(self) -> None:
        if self.importance == "selector":
            renamed('importance="selector"', 'importance="scorer"')
            object.__setattr__(self, "importance", "scorer")
        super().__post_init__()
        if self.importance not in (names := ["auto", *SCORES, "scorer"]):
            raise OptionError(f"importance={self.importance!r} is unknown; choose one of {', '.join(names)}")
        if isinstance(self.scorer, Path):
            object.__setattr__(self, "scorer", str(self.scorer))
        if self.scorer is not None and not isinstance(self.scorer, str):
            raise OptionError(f"scorer={self.scorer!r}: it takes the path of a scorer's weights (safetensors)")
        if self.scorer is None and self.importance == "scorer":
            raise OptionError('importance="scorer" needs scorer=, the path of a scorer\'s weights (safetensors)')
        usual = type(self).__dataclass_fields__["importance"].default
        if self.scorer is not None and self.importance not in (usual, "auto", "scorer"):
            raise OptionError(f"scorer= and importance={self.importance!r} contradict each other: give one of them")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        if self.scorer is not None:
            return self.reads
        return self.reads | SCORES[_AUTO[0] if self.importance == "auto" else self.importance].needs

    @property
    def optional(self) -> frozenset[str]:  # type: ignore[override]
        return self.needs - self.reads if self.importance == "auto" else frozenset()

    def score(self, tokens: Tokens) -> Score:
        """The score that these tokens are ranked by."""
        if self.scorer is not None:
            return Score("scorer", frozenset(), self._trained)
        if self.importance != "auto":
            return SCORES[self.importance]
        given = (SCORES[name] for name in _AUTO)
        return next(s for s in given if all(getattr(tokens, field) is not None for field in s.needs))

    def weight(self, tokens: Tokens) -> Tensor:
        """The importance of every token: [B, N] float32, finite, 0 on padding. Raises OptionError if an input of the
        score is missing."""
        score = self.score(tokens)
        for field in sorted(score.needs):
            require(tokens, field, f"{self.name} by {score.name}")
        return checked(score.of(tokens), f"importance ({score.name})", tokens)

    def check(self, width: int) -> None:
        super().check(width)
        if self.scorer is not None and (trained := _load(self.scorer)).width != width:
            of = f" for {trained.model}" if trained.model else ""
            raise OptionError(
                f"scorer={self.scorer!r} was trained{of} on tokens of width {trained.width}, but this model's have "
                f"{width}: train one for this model (vtc.train)"
            )

    def notes(self, tokens: Tokens) -> str:
        is_open = self.importance == "auto" or self.scorer is not None
        return f"importance: {self.score(tokens).name}" if is_open else ""

    def _trained(self, tokens: Tokens) -> Tensor:
        assert self.scorer is not None
        return _load(self.scorer).to(tokens.features.device).score(tokens.features, tokens.mask)


def require(tokens: Tokens, field: str, method: str) -> Any:
    """`tokens.field`, or an OptionError that says what is missing and what to do."""
    value = getattr(tokens, field)
    if value is None:
        raise OptionError(
            f"{method} needs {FIELDS.get(field, field)} (Tokens.{field}), which this model or call does not give: "
            "choose a method that needs nothing beside the tokens, such as divprune, dpc_knn, norm or random"
        )
    return value


def checked(scores: Tensor, what: str, tokens: Tokens) -> Tensor:
    """`scores` as float32, checked to be [B, N] and finite; 0 on padding."""
    if scores.shape != tokens.features.shape[:2]:
        raise InputError(f"{what} must be {tuple(tokens.features.shape[:2])}, not {tuple(scores.shape)}")
    scores = scores.float() if tokens.mask is None else scores.float().masked_fill(~tokens.mask, 0.0)
    check_finite(scores, what)
    return scores


def _load(path: str) -> Any:
    try:
        return _read(path, Path(path).stat().st_mtime_ns)  # a changed file is read again
    except OSError as error:
        raise OptionError(f"scorer={path!r} cannot be read: {error.strerror}") from None


@lru_cache(maxsize=1)
def _read(path: str, written: int) -> Any:
    from vtc.scores.scorer import load_scorer

    return load_scorer(path)
