"""Measurements of speed on this machine: interleaved runs, medians, ratios from the same round."""

from vtc.bench.environment import environment
from vtc.bench.models import Named, named
from vtc.bench.photo import Comparison, compare
from vtc.bench.timing import Row, interleave, measure, runs, shared_copy

__all__ = [
    "Comparison",
    "Named",
    "Row",
    "compare",
    "environment",
    "interleave",
    "measure",
    "named",
    "runs",
    "shared_copy",
]
