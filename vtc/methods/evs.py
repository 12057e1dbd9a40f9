"""EVS: Efficient Video Sampling, https://arxiv.org/abs/2510.14624."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.budget import kept_at_once
from vtc.errors import OptionError
from vtc.frames import by_place, to_the_last
from vtc.methods.ranked import require
from vtc.methods.selector import Selector, by_unit
from vtc.tokens import Tokens


@dataclass(frozen=True)
class EVS(Selector):
    """Keeps the first frame of a video, and of the others the tokens that differ most from the same place one frame
    before: by `1 - cos` of the tokens, or by the sum of the absolute differences of the pixels that a token covers.

    Pictures are left as they are. What changes slowly is dropped for ever: each frame is compared with the one before,
    not with what was kept last.

    Args:
        on: "features" or "pixels".
        cut: "count": of the whole video `max(first frame, floor(keep n))` tokens stay, a number that is known before
            the frames are seen. "quantile", as the paper has it: the first frame, and of the others whatever is not
            below the (1 - keep)-quantile of all differences, and differs at all; so about a frame more.
    """

    on: str = "features"
    cut: str = "count"

    name: ClassVar[str] = "evs"
    summary: ClassVar[str] = "keeps what changed since the frame before, in videos"
    only_videos: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, known in (("on", ("features", "pixels")), ("cut", ("count", "quantile"))):
            if getattr(self, option) not in known:
                raise OptionError(f"{option}={getattr(self, option)!r} is unknown; choose {' or '.join(known)}")
        if self.cut == "quantile" and not isinstance(self.keep, float):
            raise OptionError(f'keep={self.keep!r} with cut="quantile": give a fraction, of which the quantile follows')
        if self.cut == "quantile" and self.frame:
            raise OptionError('frame= takes part of a number of tokens, and cut="quantile" leaves the number open')

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"frames"} | ({"pixels"} if self.on == "pixels" else set()))

    def kept_of_video(self, frames: tuple[int, ...]) -> int:
        count = sum(frames)
        if isinstance(self.keep, float):
            return min(count, max(frames[0], math.floor(count * self.keep)))
        if kept_at_once(self.keep, count) < frames[0]:  # type: ignore[arg-type]
            raise OptionError(
                f"keep={self.keep}: evs keeps the first frame of a video whole, and this one has {frames[0]} tokens"
            )
        return self.keep  # type: ignore[return-value]

    def notes(self, tokens: Tokens) -> str:
        pictures = sum(len(frames) == 1 for frames in tokens.frames or ())
        return "pictures stay whole: evs compares the frames of a video" if pictures else ""

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        frames = require(tokens, "frames", self.name)
        seen = require(tokens, "pixels", self.name) if self.on == "pixels" else tokens.features
        return by_unit(self._of, tokens, count, seen, frames)

    def _of(self, x: Tensor, frames: tuple[int, ...], count: int) -> Tensor:
        if len(frames) == 1:  # a picture
            return torch.arange(count, device=x.device)
        moved = differences(x, frames, self.on)
        if self.cut == "count":
            return ops.top_select(moved[None], count)[0]
        others = moved[frames[0] :]
        least = torch.quantile(others.double(), 1 - self.keep)  # type: ignore[operator]
        stays = int(((moved >= least) & (moved > 0)).sum())
        return ops.top_select(moved[None], stays)[0]


def differences(x: Tensor, frames: Sequence[int], on: str = "features") -> Tensor:
    """How much every token [n, C] differs from the one at its place a frame before [n]; infinite in the first frame.

    Raises:
        InputError: the frames differ in their numbers of tokens.
    """
    x = by_place(ops.normalize(x) if on == "features" else x.float(), frames)
    moved = 1 - ops.exact(to_the_last(x)) if on == "features" else (x[1:] - x[:-1]).abs().sum(-1)
    return torch.cat([moved.new_full((1, x.shape[1]), float("inf")), moved]).flatten()
