"""The few hot tensor operations. Callers import from here and never learn which backend ran.

What each does, and its rules, is said by its definition in plain torch (`definitions.py`, `selection.py`); kernels give
the same for float32 (`kernels.py` says which there are).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops import definitions, selection
from vtc.ops.definitions import nearest_kept, normalize, seeded_uniform
from vtc.ops.kernels import backend, compiled, set_backend
from vtc.ops.selection import coverage_select, top_select

__all__ = [
    "backend",
    "bipartite_match",
    "coverage_select",
    "dpc_knn",
    "dpp_select",
    "energy",
    "greedy_select",
    "merge",
    "nearest_kept",
    "normalize",
    "seeded_uniform",
    "set_backend",
    "top_select",
]


def energy(unit: Tensor, form: str, margin: float, alpha: float = 1.0, mask: Tensor | None = None) -> Tensor:
    if compiled(unit) and unit.shape[1]:
        return torch.ops.vtc.energy(unit, form, margin, alpha, mask)
    return definitions.energy(unit, form, margin, alpha, mask)


def bipartite_match(
    unit: Tensor,
    a: Tensor,
    b: Tensor,
    r: int | Tensor | None = None,
    a_valid: Tensor | None = None,
    b_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    partner = torch.ops.vtc.match if compiled(unit) else definitions.best_partner
    return definitions.bipartite_match(unit, a, b, r, a_valid, b_valid, partner)


def merge(x: Tensor, group: Tensor, slots: int, weight: Tensor | None = None) -> Tensor:
    if compiled(x, differentiable=True) and not (weight is not None and weight.requires_grad):
        return torch.ops.vtc.merge(x, group, slots, None if weight is None else weight.float())
    return definitions.merge(x, group, slots, weight)


def greedy_select(
    unit: Tensor,
    importance: Tensor | None,
    count: int | Tensor,
    kind: str,
    balance: float = 0.5,
    step: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    if not compiled(unit.detach()) or kind not in selection.SELECTIONS:
        return selection.greedy_select(unit, importance, count, kind, balance, step, mask)
    most, each = selection.budget(unit, count, mask)
    importance = None if importance is None else importance.detach().float()
    return torch.ops.vtc.greedy_select(
        unit.detach(), importance, _each(unit, most, each), most, kind, balance, step, mask
    )


def dpp_select(unit: Tensor, relevance: Tensor, count: int | Tensor, mask: Tensor | None = None) -> Tensor:
    if not compiled(unit.detach()):
        return selection.dpp_select(unit, relevance, count, mask)
    most, each = selection.budget(unit, count, mask)
    return torch.ops.vtc.dpp_select(unit.detach(), relevance.detach().float(), _each(unit, most, each), most, mask)


def dpc_knn(
    x: Tensor, count: int | Tensor, neighbors: int = 5, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().float()
    if not compiled(x):
        return selection.dpc_knn(x, count, neighbors, mask)
    most, each = selection.budget(x, count, mask)
    return torch.ops.vtc.dpc_knn(x, _each(x, most, each), most, neighbors, mask)


def _each(x: Tensor, most: int, each: Tensor | None) -> Tensor:
    return torch.full((x.shape[0],), most, device=x.device) if each is None else each


for _name in ("energy", "bipartite_match", "merge"):
    globals()[_name].__doc__ = getattr(definitions, _name).__doc__
for _name in ("greedy_select", "dpp_select", "dpc_knn"):
    globals()[_name].__doc__ = getattr(selection, _name).__doc__
