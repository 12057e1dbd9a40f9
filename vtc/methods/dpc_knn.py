"""DPC-KNN: density peaks among nearest neighbours, as Chat-UniVi merges tokens, https://arxiv.org/abs/2311.08046."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.checks import check_fraction, check_number
from vtc.errors import OptionError
from vtc.methods.base import Method
from vtc.methods.order import marked
from vtc.methods.selector import stays
from vtc.token_map import TokenMap
from vtc.tokens import Tokens


@dataclass(frozen=True)
class DPCKNN(Method):
    """Clusters the tokens: K density peaks become centres, every token joins the nearest centre, and each cluster
    becomes its mean.

    With d the Euclidean distance / sqrt(width), `rho_i = exp(-mean of the k smallest d_i^2)` and
    `delta_i = min d_ij over j with rho_j > rho_i`, the centres are the K tokens of highest rho delta.
    `vtc.ops.dpc_knn` has the details.

    Args:
        neighbors: k, the number of nearest neighbours, including the token itself.
        events: for videos: after each frame is merged, the frames are clustered by their means into events, as many as
            this fraction of the frames, and the tokens of each event are merged once more, to `keep` of them.
    """

    neighbors: int = 5
    events: float | None = None

    name: ClassVar[str] = "dpc_knn"
    summary: ClassVar[str] = "clusters tokens around density peaks and merges each cluster"
    halves: ClassVar[bool] = False
    one_shot: ClassVar[bool] = True
    encoder: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("neighbors", self.neighbors, 1, whole=True)
        if self.events is not None:
            check_fraction("events", self.events, or_count=False)
            if not isinstance(self.keep, float) or self.pooled:
                raise OptionError(
                    "events= merges frames, then events, each to a fraction: give keep= as one, not pooled"
                )

    @property
    def groups_frames(self) -> bool:  # type: ignore[override]
        return self.events is not None

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        return dpc_knn_map(tokens.features, stays(tokens, r), self.neighbors, tokens.mask, tokens.size)

    def events_of(self, means: Tensor) -> list[list[int]]:
        assert self.events is not None
        group = dpc_knn_map(means[None], max(1, round(len(means) * self.events)), self.neighbors).group[0].tolist()
        return [[i for i, mine in enumerate(group) if mine == event] for event in range(max(group) + 1)]


def dpc_knn_map(
    features: Tensor, count: int | Tensor, neighbors: int = 5, mask: Tensor | None = None, size: Tensor | None = None
) -> TokenMap:
    """The map that merges every token into its centre. features [B, N, D]."""
    centres, target, distance = ops.dpc_knn(features, count, neighbors, mask)
    kept = marked(centres, features.shape[1])
    index = torch.arange(features.shape[1], device=features.device).expand_as(target)
    source = index.masked_fill(kept | (target < 0), -1)
    return TokenMap.from_anchors(kept, (source, target, -distance), slots=centres.shape[1], weight=size)
