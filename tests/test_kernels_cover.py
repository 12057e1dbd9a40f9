"""Tables of all cosines, and picks by what they cover: the C++ kernels against the definitions and a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_cpu import both, cases, count_of

from vtc import ops
from vtc.ops import kernels

pytestmark = pytest.mark.skipif(not kernels._load("cpp"), reason="the C++ kernels are not built here (no compiler)")


@settings(deadline=None, max_examples=60)
@given(cases(), st.booleans(), st.booleans())
def test_covering_a_table(case, some, weighted):
    """Items of their own, of which some need not be covered, whatever stands there."""
    gains, mask, generator = case
    weight = torch.rand(gains.shape[:2], generator=generator) if weighted else None
    items = torch.rand(len(gains), gains.shape[2], generator=generator) > 0.3 if some else None
    count = count_of(gains, mask, generator).clamp(max=30) if mask is not None else min(gains.shape[1], 30)
    fast, plain = both(ops.cover_select, gains, count, mask, items, weight)
    assert fast.shape == plain.shape and torch.equal(fast < 0, plain < 0)
    for b, row in enumerate(fast.tolist()):
        table = gains[b].double().numpy()[:, slice(None) if items is None else items[b].numpy()]
        cover, free = (
            np.zeros(table.shape[1]),
            list(range(len(table)) if mask is None else mask[b].nonzero()[:, 0].numpy()),
        )
        for pick in [t for t in row if t >= 0]:
            added = np.maximum(0, table[free] - cover).sum(1)
            added = added if weight is None else added * weight[b].double().numpy()[free]
            assert added[free.index(pick)] >= added.max() - 1e-5 * (1 + added.max())
            assert added[free.index(pick)] > 0 or pick == min(free)
            free.remove(pick)
            cover = np.maximum(cover, table[pick])


def test_cosines():
    """Each pair in any place has the same bits, copies exactly 1; padding is 0, whatever stands in it."""
    x = torch.randn(2, 75, 300, generator=torch.Generator().manual_seed(3))
    x[:, 40:50] = x[:, :10]
    unit, mask = ops.normalize(x), torch.rand(2, 75, generator=torch.Generator().manual_seed(4)) > 0.2
    fast, plain = both(ops.cosines, unit)
    assert torch.allclose(fast, plain, atol=1e-6) and torch.equal(fast, fast.mT)
    assert (fast[:, 40:50, :10].diagonal(0, 1, 2) == 1).all() and torch.equal(fast[:, 40:50], fast[:, :10])
    padded, plain = both(ops.cosines, unit.masked_fill(~mask[..., None], float("nan")), mask)
    real = mask[:, None] & mask[:, :, None]
    assert torch.equal(padded, fast.masked_fill(~real, 0.0)) and torch.allclose(plain, padded, atol=1e-6)
