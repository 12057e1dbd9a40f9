"""Measurements of speed on this machine: interleaved runs, medians, ratios from the same round."""

from vtc.bench.environment import environment
from vtc.bench.photo import PhotoComparison, compare
from vtc.bench.prefill import Dense, Prefill, measure_prefill, methods_at
from vtc.bench.timing import Row, interleave, measure, runs, shared_copy
from vtc.models.encoders import Named, named

__all__ = [
    "Dense",
    "Named",
    "PhotoComparison",
    "Prefill",
    "Row",
    "compare",
    "environment",
    "interleave",
    "measure",
    "measure_prefill",
    "methods_at",
    "named",
    "runs",
    "shared_copy",
]
