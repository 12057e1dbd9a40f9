"""What the methods that pick tokens share: their place, their budget, their evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.errors import InputError, OptionError
from vtc.methods import frame as frames
from vtc.methods.base import Method, Tokens
from vtc.methods.order import selected
from vtc.token_map import TokenMap

# What the fields of Tokens are called in messages.
_FIELDS = {
    "attention": "the attention that each token received near the end of the vision tower",
    "middle": "the attention that each token received in the middle of the vision tower",
    "keys": "attention keys",
    "inputs": "what the projector made the tokens from",
    "projector": "the projector",
    "text": "the embeddings of the prompt's text",
    "grid": "the rows and columns of each image's tokens",
}


@dataclass(frozen=True)
class Selector(Method):
    """A method that picks the tokens that stay. Subclasses override `pick`.

    Args:
        frame: which part of the budget goes to tokens that stay for their place: a share of it, to an even grid;
            "corners"; or "rotary", where the decoder's rotary table is near 1 or a quarter turn ("rotary:0.25": so much
            of the budget). See docs/frame.md.
    """

    frame: frames.Frame = 0.0

    merges: ClassVar[bool] = False
    halves: ClassVar[bool] = False
    one_shot: ClassVar[bool] = True
    encoder: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        frames.read(self.frame)

    @property
    def label(self) -> str:
        given = "" if self.frame == frames.USUAL else f"={self.frame}"
        return super().label + (f"+frame{given}" if self.frame else "")

    @property
    def turned(self) -> bool:  # type: ignore[override]
        return frames.read(self.frame)[0] == "rotary"

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        """Which `count` tokens stay (an int, or [B] when there is a mask): [B, K] in the order of picking, -1-padded,
        as the selections of `vtc.ops` return it."""
        raise NotImplementedError

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        count = stays(tokens, r)
        order = self.pick(tokens, count)
        if frames.read(self.frame)[1]:
            order = frames.framed(order, tokens, each(count, len(order)), self.frame)
        return selected(order, tokens.features.shape[1], tokens.size)


def stays(tokens: Tokens, r: int | Tensor) -> int | Tensor:
    """How many tokens remain when `r` go."""
    assert not tokens.prefix, "there is no prefix where a multimodal LLM takes its image tokens"
    if tokens.mask is None:
        assert isinstance(r, int)
        return tokens.features.shape[1] - r
    return tokens.mask.sum(1) - r


def each(count: int | Tensor, batch: int) -> list[int]:
    """`count` of every image, on the host."""
    return [count] * batch if isinstance(count, int) else count.tolist()


def evidence(tokens: Tokens, field: str, method: str) -> Any:
    """`tokens.field`, or an OptionError that says what is missing and what to do."""
    value = getattr(tokens, field)
    if value is None:
        raise OptionError(
            f"{method} needs {_FIELDS[field]} (Tokens.{field}), which this model or call does not give: choose a "
            "method that needs nothing beside the tokens, such as divprune, dpc_knn, norm or random"
        )
    return value


def checked(scores: Tensor, what: str, tokens: Tokens) -> Tensor:
    """`scores` as float32, once they are [B, N] and finite; 0 on padding."""
    from vtc.checks import check_finite

    if scores.shape != tokens.features.shape[:2]:
        raise InputError(f"{what} must be {tuple(tokens.features.shape[:2])}, not {tuple(scores.shape)}")
    scores = scores.float() if tokens.mask is None else scores.float().masked_fill(~tokens.mask, 0.0)
    check_finite(scores, what)
    return scores


def minmax(scores: Tensor, mask: Tensor | None = None, *, eps: float, floor: float = 0.0) -> Tensor:
    """`(s - min + floor) / (max - min + eps)`, over each image's real tokens. [B, N]"""
    if not scores.shape[1]:
        return scores
    scores = scores.float()
    low = (scores if mask is None else scores.masked_fill(~mask, float("inf"))).amin(1, keepdim=True)
    high = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).amax(1, keepdim=True)
    return (scores - low + floor) / (high - low + eps)


def rank(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """The share of the other real tokens that score lower, in [0, 1]: no outlier moves it. [B, N]"""
    scores = scores.float().contiguous()
    others = scores.new_full((len(scores), 1), scores.shape[1] - 1.0)
    if mask is not None:
        scores, others = scores.masked_fill(~mask, float("inf")), mask.sum(1, keepdim=True) - 1.0
    return torch.searchsorted(scores.sort(1).values, scores) / others.clamp(min=1)
