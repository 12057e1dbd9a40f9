"""The frames of a video: how its budget is shared out over them, and where it is cut into segments.

A method that ranks tokens within a frame then spends the frame's share there. The tokens of a video are [n, C], one
frame after the other; `frames` says how many tokens each frame has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.budget import share_out
from vtc.checks import is_int
from vtc.errors import InputError, OptionError
from vtc.ops import normalize

SCORES = ("uniform", "uniqueness", "change")
_SHARP = 0.01  # VidCom2's temperature
_WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)  # variances of its Gaussian kernels


@dataclass(frozen=True)
class FrameShares:
    """How the tokens that stay of a video are shared out over its frames; together they are the budget, exactly.

    Args:
        by: "uniform", the same for every frame; "uniqueness", VidCom2's (arXiv 2505.14454): up to about twice the mean
            for the frames that are least like the whole video; "change": in proportion to `change`.
        least: tokens of every frame that stay whatever its score: 1, or 0.
        window: how many frames the method sees at a time, with their shares together; or "segments", those between the
            cuts of `segments`.
    """

    by: str = "uniform"
    least: int = 1
    window: int | str = 1

    def __post_init__(self) -> None:
        if self.by not in SCORES:
            raise OptionError(f"shares: by={self.by!r} is unknown; choose one of {', '.join(SCORES)}")
        if not is_int(self.least) or self.least not in (0, 1):
            raise OptionError(f"shares: least={self.least!r}: it takes 1 or 0 tokens of every frame")
        if self.window != "segments" and (not is_int(self.window) or self.window < 1):  # type: ignore[operator]
            raise OptionError(f'shares: window={self.window!r}: it takes a number of frames >= 1, or "segments"')

    def weights(self, x: Tensor, frames: Sequence[int]) -> list[float]:
        """Of every frame of a video x [n, C], on any scale."""
        if self.by == "uniform":
            return [1.0] * len(frames)
        found = scales(similarity(x, frames)[0], frames) if self.by == "uniqueness" else change(x, frames)
        return found.tolist()

    def of(self, x: Tensor, frames: Sequence[int], total: int) -> list[int]:
        """How many of `total` tokens stay of every frame of a video x [n, C]. Raises OptionError if that is less than
        `least` for each."""
        if total < self.least * len(frames):
            raise OptionError(
                f"{total} tokens are less than one for each of a video's {len(frames)} frames: keep more, or give "
                "shares=vtc.FrameShares(least=0)"
            )
        weights = self.weights(x, frames)
        return share_out(total, [total * w / sum(weights) for w in weights], frames, self.least)

    def windows(self, x: Tensor, frames: Sequence[int]) -> list[range]:
        """The frames that are seen together, in order."""
        if self.window == "segments":
            lengths = segments(means(x, frames))
        else:
            assert isinstance(self.window, int)
            lengths = [min(self.window, len(frames) - start) for start in range(0, len(frames), self.window)]
        edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def read(value: Any) -> FrameShares | None:
    """The option `shares` in whatever form it is given: None, a score's name, a FrameShares, or a dict from a file."""
    if value is None or isinstance(value, FrameShares):
        return value
    if isinstance(value, str):
        return FrameShares(value)
    if isinstance(value, Mapping) and set(value) <= {"by", "least", "window"}:
        return FrameShares(**value)
    raise OptionError(f"shares={value!r}: it takes one of {', '.join(SCORES)}, or vtc.FrameShares(...)")


def frame_of(frames: Sequence[int], device: torch.device | None = None) -> Tensor:
    """[n] long, the frame of each token."""
    lengths = torch.tensor(frames, device=device)
    return torch.arange(len(frames), device=device).repeat_interleave(lengths)


def means(x: Tensor, frames: Sequence[int]) -> Tensor:
    """[n, C] -> [T, C], the mean token of every frame."""
    return torch.stack([part.mean(0) for part in x.split(list(frames))])


def similarity(x: Tensor, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
    """VidCom2's measure of how much every token is like the whole video, and like its frame: two of [n], higher is more
    alike.

    With y the half of the channels that varies least, each token to unit length, and k a sum of Gaussians of variance
    1/8 to 2: `v = k(y, mean of y)` and `w = k(y, mean of y in its frame)`; the means are not made unit vectors again.
    """
    x = x if x.dtype == torch.float64 else x.float()
    variance = (x - x.mean(0)).square_().mean(0)  # several times as fast as var
    calm = variance.argsort(stable=True)[: max(1, x.shape[1] // 2)].sort().values
    y = normalize(x[:, calm])

    def alike(centre: Tensor) -> Tensor:
        apart = torch.linalg.vector_norm(y - centre, dim=-1).square()
        return torch.stack([torch.exp(-apart / (2 * s)) for s in _WIDTHS]).sum(0)

    return alike(y.mean(0)), alike(means(y, frames)[frame_of(frames, x.device)])


def scales(alike: Tensor, frames: Sequence[int]) -> Tensor:
    """VidCom2's share of every frame, as a multiple of the mean [T]: `1 + pi - mean pi`, where pi is the softmax over
    the frames of how unlike the video they are, at temperature 0.01. alike: [n], the first of `similarity`."""
    unlike = -means(alike[:, None], frames)[:, 0]
    pi = torch.softmax((unlike - unlike.max()) / _SHARP, 0)
    return 1 + pi - pi.mean()


def change(x: Tensor, frames: Sequence[int]) -> Tensor:
    """How much every frame differs from the one before: 1 - the mean cosine of tokens at the same place, [T] in [0, 2].
    The first counts as much as the one that changes most; of a video that stands still all count 1.

    Raises:
        InputError: the frames differ in their numbers of tokens.
    """
    unit = by_place(normalize(x), frames)
    if len(unit) == 1:
        return unit.new_ones(1)
    apart = (1 - to_the_last(unit)).clamp(min=0).mean(1)
    if not bool((apart > 1e-6).any()):  # cosines of copies are off by rounding
        return unit.new_ones(len(unit))
    return torch.cat([apart.max()[None], apart])


def to_the_last(unit: Tensor) -> Tensor:
    """The cosine of each of the unit vectors [T, ..., C] but the first to the one before it: [T - 1, ...]."""
    return (unit[1:] * unit[:-1]).sum(-1)


def by_place(x: Tensor, frames: Sequence[int]) -> Tensor:
    """[n, ...] -> [T, P, ...]. Raises InputError if the frames differ in their numbers of tokens."""
    if len(set(frames)) > 1:
        raise InputError(f"the frames of a video have {min(frames)} to {max(frames)} tokens, but are compared by place")
    return x.unflatten(0, (len(frames), -1))


def segments(mean: Tensor, threshold: float = 0.9, least: int = 8) -> list[int]:
    """Lengths of the segments of a video, as FlashVID (arXiv 2602.08024) cuts it: where the cosine of two consecutive
    mean tokens is below `threshold`; if these are fewer than `least` segments, also at the lowest of the other cosines,
    the earliest first among equals. mean: [T, C]."""
    unit = normalize(mean)
    alike = to_the_last(unit)
    cut = alike < threshold
    missing = min(least, len(mean)) - 1 - int(cut.sum())
    if missing > 0:
        more = alike.masked_fill(cut, float("inf")).argsort(stable=True)[:missing]
        cut[more] = True
    edges = [0, *(cut.nonzero()[:, 0] + 1).tolist(), len(mean)]
    return [b - a for a, b in zip(edges, edges[1:], strict=False)]
