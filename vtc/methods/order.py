"""Orders of picks: [B, K] long, the tokens that an image keeps, in the order in which they were picked, then -1."""

from __future__ import annotations

import torch
from torch import Tensor


def marked(order: Tensor, tokens: int) -> Tensor:
    """[B, tokens] bool, True for the tokens in `order` [B, K]."""
    spare = torch.where(order < 0, tokens, order)
    none = torch.zeros(len(order), tokens + 1, dtype=torch.bool, device=order.device)
    return none.scatter(1, spare, True)[:, :tokens]


def packed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen tokens' indices [B, P], ascending, at the front of every row, and which entries are real."""
    order = (~chosen).long().argsort(dim=1, stable=True)
    most = int(chosen.sum(1).max()) if chosen.numel() else 0
    return order[:, :most], chosen.gather(1, order)[:, :most]


def joined(*orders: Tensor) -> Tensor:
    """One order after the other, every image's tokens at the front, then -1."""
    order = torch.cat(orders, 1)
    return order.gather(1, (order < 0).long().argsort(dim=1, stable=True))
