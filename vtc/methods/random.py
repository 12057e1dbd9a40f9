"""Random pruning: the baseline that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.checks import check_seed
from vtc.methods.base import Method
from vtc.token_map import TokenMap
from vtc.tokens import Tokens


@dataclass(frozen=True)
class Random(Method):
    """Drops tokens at random. Every image has its own random generator that starts at `seed`, so an image keeps the
    same tokens alone and in a batch, padded or not."""

    seed: int = 0

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "drops tokens at random (baseline)"
    merges: ClassVar[bool] = False
    halves: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        return random_round(tokens.features, r, self.seed + tokens.layer, tokens.prefix, tokens.mask, tokens.size)


def random_round(
    features: Tensor,
    r: int | Tensor,
    seed: int = 0,
    prefix: int = 0,
    mask: Tensor | None = None,
    size: Tensor | None = None,
) -> TokenMap:
    """Drop the r real tokens behind the prefix with the smallest draws; `order` lists the rest, largest draw first."""
    batch, count = features.shape[:2]
    draw = ops.seeded_uniform(seed, count, features.device).expand(batch, count)
    real = torch.arange(count, device=features.device).expand(batch, count)
    if mask is not None:
        real = (mask.long().cumsum(1) - 1).clamp(min=0)
        draw = draw.gather(1, real).masked_fill(~mask, -1.0)
    draw = torch.where((real < prefix) & (draw >= 0), 2.0, draw)
    order = draw.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(count, device=features.device)
    if mask is None and not isinstance(r, Tensor):
        return TokenMap.from_order(order[:, : count - r], count, size)
    alive = torch.full((batch,), count, device=features.device) if mask is None else mask.sum(1)
    stays = place < (alive - r)[:, None]
    most = int(stays.sum(1).max()) if batch else 0
    return TokenMap.from_order(order.masked_fill(~stays, -1)[:, :most], count, size)
