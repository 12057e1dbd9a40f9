"""The few hot tensor operations. Callers import from here and never learn which backend ran."""

from vtc.ops.definitions import bipartite_match, energy, merge, nearest_kept, normalize, seeded_uniform

__all__ = ["bipartite_match", "energy", "merge", "nearest_kept", "normalize", "seeded_uniform"]
