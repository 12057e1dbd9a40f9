"""The base of methods that pick tokens: where they work, their budget, their frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.methods import frame as frames
from vtc.methods.base import Method
from vtc.token_map import TokenMap
from vtc.tokens import Tokens


@dataclass(frozen=True)
class Selector(Method):
    """A method that picks the tokens that stay. Subclasses override `pick`.

    Args:
        frame: part of the budget for tokens kept for their place alone: a share, for an even grid; "corners"; or
            "rotary", where the decoder's rotary table is near 1 or a quarter turn ("rotary:0.25": with that share). See
            docs/frame.md.
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
        return TokenMap.from_order(order, tokens.features.shape[1], tokens.size)


def stays(tokens: Tokens, r: int | Tensor) -> int | Tensor:
    """How many tokens remain when `r` are removed."""
    assert not tokens.prefix, "there is no prefix where a multimodal LLM takes its image tokens"
    if tokens.mask is None:
        assert isinstance(r, int)
        return tokens.features.shape[1] - r
    return tokens.mask.sum(1) - r


def by_unit(pick: Callable[..., Tensor], tokens: Tokens, count: int | Tensor, *given: Any) -> Tensor:
    """The order of picks [B, K], -1-padded, of a method that decides for one unit at a time: `pick(*its part of each of
    given, count)` -> [K]. given: tensors [B, N, ...], of which a unit gets its real tokens, or tuples, one per unit."""
    orders = []
    for i, k in enumerate(each(count, len(tokens.features))):
        real = slice(None) if tokens.mask is None else tokens.mask[i]
        place = torch.arange(tokens.features.shape[1], device=tokens.features.device)[real]
        part = [x[i][real] if isinstance(x, Tensor) else x[i] for x in given]
        orders.append(place[pick(*part, k)])
    return torch.nn.utils.rnn.pad_sequence(orders, True, -1)


def each(count: int | Tensor, batch: int) -> list[int]:
    """`count` per image, on the host."""
    return [count] * batch if isinstance(count, int) else count.tolist()
