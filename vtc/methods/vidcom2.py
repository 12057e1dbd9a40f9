"""VidCom2: Video Compression Commander, https://arxiv.org/abs/2505.14454."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.budget import share_out
from vtc.checks import check_flag, check_fraction
from vtc.frames import scales, similarity
from vtc.methods.ranked import require
from vtc.methods.selector import Selector, by_unit
from vtc.tokens import Tokens


@dataclass(frozen=True)
class VidCom2(Selector):
    """Gives the frames of a video that are least like all of it more tokens, and keeps of every frame those that are
    least like the video and like their frame.

    With v and w of `vtc.frames.similarity`, frame t has the quota `min(1, keep (1 + pi_t - mean pi)) P` of its P tokens
    (`vtc.frames.scales`), and its tokens of smallest v + w stay. A picture is a video of one frame.

    Args:
        exact: the frames' quotas are rounded down and filled up where the most is missing, so that the whole budget
            stays, and no more. False: each is rounded by itself (half to even, at least 1), as in the released code,
            whose totals differ by some tokens.
    """

    exact: bool = True

    name: ClassVar[str] = "vidcom2"
    summary: ClassVar[str] = "keeps what is unlike the whole video, more of the frames that are"
    needs: ClassVar[frozenset[str]] = frozenset({"frames"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("exact", self.exact)
        if not self.exact:
            check_fraction("keep with exact=False", self.keep, or_count=False)

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        return by_unit(self._of, tokens, count, tokens.features, require(tokens, "frames", self.name))

    def _of(self, x: Tensor, frames: tuple[int, ...], count: int) -> Tensor:
        video, frame = similarity(x, frames)
        # of the fraction that was asked for, not of the tokens that it was rounded to
        ratio = self.keep if isinstance(self.keep, float) else count / sum(frames)
        quotas = [min(1.0, ratio * s) * n for s, n in zip(scales(video, frames).tolist(), frames, strict=True)]  # type: ignore[operator]
        if self.exact:
            shares = share_out(count, quotas, frames, least=int(count >= len(frames)))
        else:
            shares = [max(1, round(q)) for q in quotas]
        # unit vectors of one direction are off by rounding
        alike = (video + frame).round(decimals=5).split(list(frames))
        starts = torch.tensor([0, *frames]).cumsum(0).tolist()
        picked = [ops.top_select(-own[None], k)[0] + at for own, k, at in zip(alike, shares, starts, strict=False)]
        return torch.cat(picked)
