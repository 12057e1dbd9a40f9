"""The few hot tensor operations. Callers import from here and never learn which backend ran."""

from vtc.ops.definitions import bipartite_match, energy, merge, nearest_kept, normalize, seeded_uniform
from vtc.ops.selection import coverage_select, dpc_knn, dpp_select, greedy_select, top_select

__all__ = [
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
    "top_select",
]
