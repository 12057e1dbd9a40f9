"""The few performance-critical tensor operations. Callers import from here and need not know which backend runs.

Each is specified by its definition in plain torch (`definitions.py`, `selection.py`); kernels give the same results for
float32 (`kernels.py` lists them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops import definitions, selection
from vtc.ops.definitions import joined, nearest_kept, normalize, over_heads, seeded_uniform, sizes
from vtc.ops.kernels import backend, compiled, set_backend
from vtc.ops.selection import between, euclidean, exact, top_select

__all__ = [
    "attention_received",
    "backend",
    "between",
    "bipartite_match",
    "cosines",
    "cover_select",
    "coverage_select",
    "distinct_select",
    "dpc_knn",
    "dpp_select",
    "energy",
    "euclidean",
    "exact",
    "greedy_select",
    "joined",
    "merge",
    "minmax",
    "nearest_kept",
    "normalize",
    "over_heads",
    "pair_round",
    "probe_norms",
    "rows",
    "seeded_uniform",
    "set_backend",
    "sizes",
    "top_select",
]


def energy(unit: Tensor, form: str, margin: float, alpha: float = 1.0, mask: Tensor | None = None) -> Tensor:
    unit = _wide(unit)
    if compiled(unit) and unit.shape[1] and form in definitions.ENERGIES:
        return torch.ops.vtc.energy(unit, definitions.ENERGIES.index(form), margin, alpha, mask)
    return definitions.energy(unit, form, margin, alpha, mask)


def bipartite_match(
    unit: Tensor,
    a: Tensor,
    b: Tensor,
    r: int | Tensor | None = None,
    a_valid: Tensor | None = None,
    b_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    unit = _wide(unit)
    if not compiled(unit):
        return definitions.bipartite_match(unit, a, b, r, a_valid, b_valid)
    kernels = torch.ops.vtc
    return definitions.bipartite_match(unit, a, b, r, a_valid, b_valid, kernels.match, kernels.top_pairs)


def pair_round(
    metric: Tensor,
    weight: Tensor | None,
    r: int,
    prefix: int = 0,
    form: tuple[str, float, float] | None = None,
    half: bool = False,
    protect: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    metric = _wide(metric) if metric.is_cpu else _wide(definitions.over_heads(metric))
    if compiled(metric) and (form is None or form[0] in definitions.ENERGIES):
        name, margin, alpha = form or (None, 0.0, 1.0)
        kind = -1 if name is None else definitions.ENERGIES.index(name)
        return torch.ops.vtc.pair_round(metric, weight, r, prefix, kind, margin, alpha, half, protect)
    return definitions.pair_round(metric, weight, r, prefix, form, half, protect)


def merge(x: Tensor, group: Tensor, slots: int, weight: Tensor | None = None, size: Tensor | None = None) -> Tensor:
    if compiled(x, differentiable=True) and not (weight is not None and weight.requires_grad):
        return torch.ops.vtc.merge(x, group, slots, None if weight is None else weight.float())
    return definitions.merge(x, group, slots, weight, size)


def rows(x: Tensor, at: Tensor, complete: bool = False) -> Tensor:
    if x.ndim == 3 and compiled(x, differentiable=True):
        return torch.ops.vtc.rows(x, at)
    return definitions.rows(x, at, complete)


def greedy_select(
    unit: Tensor,
    importance: Tensor | None,
    count: int | Tensor,
    kind: str,
    balance: float = 0.5,
    step: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    unit = _wide(unit.detach())
    if not compiled(unit) or kind not in selection.SELECTIONS:
        return selection.greedy_select(unit, importance, count, kind, balance, step, mask)
    most, each = selection.budget(unit, count, mask)
    importance = None if importance is None else importance.detach().float()
    which = selection.SELECTIONS.index(kind)
    return torch.ops.vtc.greedy_select(unit, importance, _each(unit, most, each), most, which, balance, step, mask)


def dpp_select(unit: Tensor, relevance: Tensor, count: int | Tensor, mask: Tensor | None = None) -> Tensor:
    unit = _wide(unit.detach())
    if not compiled(unit):
        return selection.dpp_select(unit, relevance, count, mask)
    most, each = selection.budget(unit, count, mask)
    return torch.ops.vtc.dpp_select(unit, relevance.detach().float(), _each(unit, most, each), most, mask)


def cosines(unit: Tensor, mask: Tensor | None = None) -> Tensor:
    unit = _wide(unit.detach())
    if not (compiled(unit) and unit.is_cpu):
        return selection.cosines(unit, mask)
    return torch.ops.vtc.cosines(unit, mask)


def cover_select(
    gains: Tensor,
    count: int | Tensor,
    mask: Tensor | None = None,
    items: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    gains = _wide(gains.detach())
    if not (compiled(gains) and gains.is_cpu):
        return selection.cover_select(gains, count, mask, items, weight)
    most, each = selection.budget(gains, count, mask)
    weight = None if weight is None else weight.detach().float()
    return torch.ops.vtc.cover_select(gains, weight, _each(gains, most, each), most, mask, items)


def coverage_select(unit: Tensor, weight: Tensor, count: int | Tensor, mask: Tensor | None = None) -> Tensor:
    unit = _wide(unit.detach())
    if not (compiled(unit) and unit.is_cpu and selection.fits(unit)):
        return selection.coverage_select(unit, weight, count, mask)
    return cover_select(cosines(unit, mask), count, mask, mask, weight)


def distinct_select(unit: Tensor, chosen: Tensor, each: Tensor) -> Tensor:
    unit = _wide(unit.detach())
    if not (compiled(unit) and unit.is_cpu and selection.fits(unit)):
        return selection.distinct_select(unit, chosen, each)
    return torch.ops.vtc.distinct_select(unit, chosen, each)


def dpc_knn(
    x: Tensor, count: int | Tensor, neighbors: int = 5, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().float()
    if not compiled(x):
        return selection.dpc_knn(x, count, neighbors, mask)
    most, each = selection.budget(x, count, mask)
    return torch.ops.vtc.dpc_knn(x, _each(x, most, each), most, neighbors, mask)


def attention_received(
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None = None,
    asking: Tensor | None = None,
    tile: int = definitions._MAP,
) -> Tensor:
    query, key = query.detach().float(), key.detach().float()
    if asking is None and compiled(query):
        return torch.ops.vtc.received(query, key, scale, mask)
    return definitions.attention_received(query, key, scale, mask, asking, tile)


def probe_norms(difference: Tensor, step: float) -> Tensor:
    if compiled(difference):
        return torch.ops.vtc.probe_norms(difference, step)
    return definitions.probe_norms(difference, step)


def minmax(scores: Tensor, mask: Tensor | None = None, *, eps: float, floor: float = 0.0) -> Tensor:
    scores = scores.float()
    if compiled(scores):
        return torch.ops.vtc.minmax(scores, mask, eps, floor)
    return definitions.minmax(scores, mask, eps=eps, floor=floor)


def _wide(x: Tensor) -> Tensor:
    """Decisions are made in float32 for any input dtype."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _each(x: Tensor, most: int, each: Tensor | None) -> Tensor:
    return torch.full((x.shape[0],), most, device=x.device) if each is None else each


for _name in __all__:
    if not globals()[_name].__doc__:
        globals()[_name].__doc__ = getattr(selection if hasattr(selection, _name) else definitions, _name).__doc__
