"""The C++ kernels against the torch definitions: the same picks, groups and values."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vtc
from vtc import ops
from vtc.ops import definitions, kernels, selection

pytestmark = pytest.mark.skipif(not kernels._load("cpp"), reason="the C++ kernels are not built here (no compiler)")


def both(call, *args, **options):
    """What a call gives with the kernels and with the definitions."""
    try:
        ops.set_backend("cpp")
        fast = call(*args, **options)
        ops.set_backend("torch")
        return fast, call(*args, **options)
    finally:
        ops.set_backend(None)


@st.composite
def cases(draw):
    """Unit vectors [B, N, D] without ties, a mask or none, and a generator for more. N and D up to 4,096 each."""
    size = draw(st.sampled_from(["usual"] * 8 + ["long", "wide"]))
    batch, tokens = draw(st.integers(0, 3)), draw(st.integers(1, 150))
    width = draw(st.sampled_from([1, 2, 3, 7, 31, 32, 33, 59, 64, 111, 257, 300]))
    if size == "long":
        batch, tokens, width = min(batch, 1), draw(st.integers(1000, 4096)), draw(st.integers(1, 40))
    elif size == "wide":
        tokens, width = draw(st.integers(1, 60)), draw(st.integers(1000, 4096))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(batch, tokens, width, generator=generator)
    kind = draw(st.sampled_from(["none", "some", "nobody"]))
    mask = None if kind == "none" else torch.rand(batch, tokens, generator=generator) > (0.4 if kind == "some" else 2.0)
    if draw(st.booleans()):  # as a view with other strides
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    return x, mask, generator


def count_of(x, mask, generator):
    if mask is None:
        return int(torch.randint(1, min(x.shape[1], 300) + 1, (), generator=generator))
    return (mask.sum(1) * torch.rand(len(mask), generator=generator)).long().clamp(max=300)


def tie_free(x, width=3):
    """In few dimensions, or among thousands of tokens, two values are easily within rounding of one another."""
    return x.shape[2] >= width and x.shape[1] < 1000


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from(definitions.ENERGIES), st.floats(-0.5, 0.95))
@example(
    (torch.ones(1, 1, 1), None, torch.Generator()), "gaussian", 0.9441762966334841
)  # 1 - margin, to its last digit
def test_energy(case, form, margin):
    x, mask, _ = case
    unit = ops.normalize(x)
    fast, plain = both(ops.energy, unit, form, margin, 1.3, mask)
    exact = definitions.energy(ops.normalize(x).double(), form, margin, 1.3, mask)
    assert fast.shape == plain.shape and torch.equal(fast.isinf(), plain.isinf())
    error, own = ((y.double() - exact).nan_to_num(0, 0, 0).abs() for y in (fast, plain))
    assert not len(x) or bool((error <= 2 * own.amax() + 2e-6).all())


def objective(unit, importance, order, kind, balance, mask):
    """The greedy objective's value at every pick, in float64; NaN where nothing is picked."""
    unit, out = unit.double(), []
    nearest = definitions.energy(unit, "nearest", 0.0, mask=mask)
    for b, picks in enumerate(order.tolist()):
        best, row = torch.full((unit.shape[1],), -1.0, dtype=torch.float64), []
        for place, pick in enumerate(p for p in picks if p >= 0):
            m = best[pick]
            if kind == "max_min":
                row.append(float(-nearest[b, pick]) if place == 0 else float(-m))
            elif place == 0:
                row.append(float(importance[b, pick]))
            elif kind == "mmr":
                row.append(float(balance * importance[b, pick] - (1 - balance) * m))
            else:
                row.append(float(importance[b, pick] * (1 - m)))
            best = torch.maximum(best, unit[b] @ unit[b, pick])
        out.append(row)
    return out


def agree(fast, plain, value):
    """The same picks; or, at a near tie of a width or two, picks of the same worth."""
    assert fast.shape == plain.shape and torch.equal(fast < 0, plain < 0)
    if not torch.equal(fast, plain):
        for a, b in zip(value(fast), value(plain), strict=True):
            first = next((i for i, (p, q) in enumerate(zip(a, b, strict=True)) if abs(p - q) > 1e-5), None)
            assert first is None, (first, a[first], b[first])


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from(selection.SELECTIONS), st.floats(0, 1), st.sampled_from([1, 1, 3]))
def test_greedy_select(case, kind, balance, step):
    x, mask, generator = case
    unit, importance = ops.normalize(x), torch.rand(x.shape[:2], generator=generator)
    count = count_of(x, mask, generator)
    fast, plain = both(ops.greedy_select, unit, importance, count, kind, balance, step, mask)
    if step == 1:
        agree(fast, plain, lambda order: objective(unit, importance, order, kind, balance, mask))
    elif tie_free(x):
        assert (fast != plain).float().mean() < 0.1 if fast.numel() else True


@pytest.mark.parametrize("kind", selection.SELECTIONS)
def test_greedy_select_at_size(kind):
    """Tie-free data of real sizes: exactly the same picks, also with scores that rise (negative importance)."""
    generator = torch.Generator().manual_seed(3)
    unit = ops.normalize(torch.randn(2, 577, 256, generator=generator))
    for importance in (torch.rand(2, 577, generator=generator), torch.randn(2, 577, generator=generator)):
        fast, plain = both(ops.greedy_select, unit, importance, 200, kind)
        assert torch.equal(fast, plain)


@pytest.mark.parametrize("kind", selection.SELECTIONS)
def test_ties_go_to_the_lowest_index(kind):
    unit = ops.normalize(torch.ones(2, 40, 8))
    fast, plain = both(ops.greedy_select, unit, torch.ones(2, 40), 40, kind)
    assert torch.equal(fast, plain) and fast[0].tolist() == list(range(40))
    copies = ops.normalize(torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(5, 1))
    fast, plain = both(ops.greedy_select, copies, torch.ones(1, 30), 12, kind)
    assert torch.equal(fast, plain)


@settings(deadline=None, max_examples=40)
@given(cases())
def test_dpp_select(case):
    x, mask, generator = case
    unit, relevance = ops.normalize(x), 0.2 + torch.rand(x.shape[:2], generator=generator)
    count = count_of(x, mask, generator)
    if isinstance(count, int):  # beyond the width nothing is left, and what follows is by index
        count = min(count, max(1, x.shape[2] // 2))
    else:
        count = count.clamp(max=max(1, x.shape[2] // 2))
    fast, plain = both(ops.dpp_select, unit, relevance, count, mask)

    def worth(order):
        kernel = relevance[:, :, None].double() * (unit.double() @ unit.double().mT) * relevance[:, None].double()
        return [[float(torch.logdet(kernel[b][p][:, p])) for p in [[i for i in row if i >= 0]] if p]
                for b, row in enumerate(order.tolist())]  # fmt: skip

    assert torch.equal(fast < 0, plain < 0)
    if not torch.equal(fast, plain):
        for a, b in zip(worth(fast), worth(plain), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-2)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_match_and_merge(case):
    x, mask, generator = case
    unit, tokens = ops.normalize(x), x.shape[1]
    a, b = (torch.arange(start, tokens, 2).expand(len(x), -1) for start in (0, 1))
    valid = [None, None] if mask is None else [mask.gather(1, at) for at in (a, b)]
    r = tokens // 4 if mask is None else mask.sum(1) // 4
    fast, plain = both(ops.bipartite_match, unit, a, b, r, *valid)
    if tie_free(x):
        assert all(torch.equal(p, q) for p, q in zip(fast[:2], plain[:2], strict=True))
    assert torch.allclose(fast[2], plain[2], atol=2e-6)
    token_map = vtc.TokenMap.from_pairs(tokens, plain, mask=mask)
    weight = torch.rand(x.shape[:2], generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.randn(*x.shape[:2], 21, generator=generator).to(dtype)
        slots = token_map.anchor.shape[1]
        fast, plain = both(ops.merge, values, token_map.group, slots, weight)
        exact = definitions.merge(values.double(), token_map.group, slots, weight.double())
        assert fast.dtype == dtype and fast.shape == plain.shape
        error, own = ((y.double() - exact).abs() for y in (fast, plain))
        assert not error.numel() or error.max() <= 2 * own.max() + 1e-6


@settings(deadline=None, max_examples=60)
@given(cases())
def test_coverage(case):
    x, mask, generator = case
    unit, weight = ops.normalize(x), torch.rand(x.shape[:2], generator=generator)
    fast, plain = both(ops.coverage_select, unit, weight, count_of(x, mask, generator), mask)
    assert fast.shape == plain.shape and torch.equal(fast < 0, plain < 0)
    if tie_free(x):
        assert torch.equal(fast, plain)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_distinct(case):
    x, mask, generator = case
    chosen = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    each = (chosen.sum(1) * torch.rand(len(x), generator=generator)).long()
    fast, plain = both(ops.distinct_select, ops.normalize(x), chosen, each)
    assert torch.equal(fast.sum(1), plain.sum(1)) and not (fast & ~chosen).any()
    if tie_free(x):
        assert torch.equal(fast, plain)


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.sampled_from([1, 3]), st.sampled_from([0.3, 30.0]))
def test_attention_received(case, heads, every, scale):
    x, mask, generator = case
    batch, tokens, width = x.shape
    heads = heads if tokens < 1000 else (1, 1)  # the definition makes the whole matrix of every head, in float64
    query, key = (torch.randn(batch, h, tokens, width, generator=generator) for h in heads)
    query, mask = query[:, :, ::every], mask if every == 1 else None
    fast, plain = both(ops.attention_received, query, key, scale / width**0.5, mask)
    logits = query.double() @ key.double().repeat_interleave(heads[0] // heads[1], 1).mT * scale / width**0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
    share = logits.softmax(-1).nan_to_num(0)
    exact = (share if mask is None else share * mask[:, None, :, None]).sum(2).mean(1)
    error, own = ((y.double() - exact).abs() for y in (fast, plain))
    assert fast.shape == plain.shape
    if error.numel():  # a logit that is rounded by 2^-24 of itself moves its share by as much as that, relatively
        rounding = 2e-6 + 4 * 2**-24 * logits.nan_to_num(0, 0, 0).abs().amax()
        assert bool((error <= 2 * own.amax() + rounding * exact.amax()).all())


@settings(deadline=None, max_examples=30)
@given(cases(), st.integers(0, 5))
def test_probe_norms(case, probes):
    x, _, generator = case
    difference = torch.randn(probes, *x.shape, generator=generator)
    fast, plain = both(ops.probe_norms, difference, 0.01)
    torch.testing.assert_close(fast, plain)


@settings(deadline=None, max_examples=30)
@given(cases(), st.sampled_from([0.0, 1e-6]))
def test_minmax(case, floor):
    x, mask, generator = case
    scores = torch.randn(x.shape[:2], generator=generator) if x.shape[2] else torch.ones(x.shape[:2])
    fast, plain = both(partial(ops.minmax, eps=1e-6, floor=floor), scores, mask)
    assert torch.equal(fast.nan_to_num(9), plain.nan_to_num(9))  # an image of padding alone has nothing to go by


@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_rows(case, dtype):
    x, _, generator = case
    x, at = x.to(dtype), torch.randint(-1, x.shape[1], (len(x), 70), generator=generator)
    fast, plain = both(ops.rows, x, at)
    assert fast.dtype == dtype and torch.equal(fast, plain)


def test_rows_are_differentiable():
    at = torch.tensor([[2, 0, 2, -1, 2], [1, 1, 0, -1, -1]])
    aim = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))

    def gradient(dtype):
        leaf = torch.zeros(2, 3, 4, dtype=dtype, requires_grad=True)
        return torch.autograd.grad((ops.rows(leaf, at) * aim.to(dtype)).sum(), leaf)[0]

    for dtype, gap in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        fast, plain = both(gradient, dtype)
        assert fast.dtype == dtype and torch.allclose(fast, plain, atol=gap)
    assert not fast[1, 2].any()  # nobody took it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_decide_as_their_values_in_float32(dtype):
    """A decision is float32 whatever comes in, with every backend."""
    generator = torch.Generator().manual_seed(11)
    unit = ops.normalize(torch.randn(2, 60, 33, generator=generator)).to(dtype)
    a, b = torch.arange(0, 60, 2).expand(2, -1), torch.arange(1, 60, 2).expand(2, -1)
    score = torch.rand(2, 60, generator=generator)
    for call, args in (
        (ops.energy, ("elu", 0.4)),
        (ops.bipartite_match, (a, b, 12)),
        (ops.greedy_select, (score, 20, "mmr")),
        (ops.dpp_select, (0.5 + score, 20)),
        (ops.dpc_knn, (9,)),
    ):
        wide = call(unit.float(), *args)
        for have in both(call, unit, *args):
            have, want = (t if isinstance(t, tuple) else (t,) for t in (have, wide))
            assert all(torch.allclose(h, w, atol=1e-6) for h, w in zip(have, want, strict=True)), call


def test_merge_is_differentiable():
    group = torch.tensor([[0, 0, 1, -1, 2, 1]])
    weight = torch.rand(1, 6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(1))
    aim = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(2))

    def gradient():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad((ops.merge(leaf, group, 4, weight) * aim).sum(), leaf)[0]

    fast, plain = both(gradient)
    assert torch.allclose(fast, plain, atol=1e-6)
    assert fast[0, 3].abs().max() == 0  # a dropped token has no part in it


@settings(deadline=None, max_examples=40)
@given(cases(), st.integers(1, 7))
def test_dpc_knn(case, neighbors):
    x, mask, generator = case
    count = count_of(x, mask, generator)
    fast, plain = both(ops.dpc_knn, x, count, neighbors, mask)
    assert torch.equal(fast[0] < 0, plain[0] < 0)
    assert torch.equal(fast[1] < 0, plain[1] < 0)
    if tie_free(x, 31):
        assert torch.equal(fast[0].sort(1).values, plain[0].sort(1).values)
        assert torch.equal(fast[1], plain[1]) and torch.allclose(fast[2], plain[2], atol=1e-5)
    real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    for b, picks in enumerate(fast[0].tolist()):
        centres = torch.tensor([p for p in picks if p >= 0], dtype=torch.long)
        assert len(centres.unique()) == len(centres) and bool(real[b, centres].all())
        if len(centres):  # everybody is with the nearest centre, and a centre with itself
            apart = torch.cdist(x[b].double(), x[b, centres].double()) / x.shape[2] ** 0.5
            chosen = (x[b].double() - x[b, fast[1][b].clamp(min=0)].double()).norm(dim=1) / x.shape[2] ** 0.5
            assert torch.allclose(chosen[real[b]], apart.amin(1)[real[b]], atol=1e-5)
            assert torch.equal(fast[1][b, centres], centres)


@pytest.mark.parametrize(("tokens", "width"), [(577, 64), (1025, 384)])
def test_dpc_knn_at_size(tokens, width):
    x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(4))
    for structured in (x, x + 3 * torch.randn(12, width)[torch.arange(tokens) % 12]):
        fast, plain = both(ops.dpc_knn, structured, tokens // 4)
        assert torch.equal(fast[0].sort(1).values, plain[0].sort(1).values)
        assert torch.equal(fast[1], plain[1]) and torch.allclose(fast[2], plain[2], atol=1e-6)


def test_without_the_whole_matrix():
    """Beyond 4,096 tokens distances are computed twice instead of kept."""
    x = torch.randn(1, 4100, 8, generator=torch.Generator().manual_seed(5))
    fast, plain = both(ops.dpc_knn, x, 300)
    assert torch.equal(fast[0].sort(1).values, plain[0].sort(1).values) and torch.equal(fast[1], plain[1])


MEMORY = """
import resource, torch, vtc
from vtc import ops
x = torch.randn(1, 16384, 32)
unit = ops.normalize(x)
half = torch.arange(0, 16384, 2)[None]
ops.set_backend("cpp")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.energy(unit, "elu", 0.5)
ops.bipartite_match(unit, half, half + 1, 4000)
ops.greedy_select(unit, torch.rand(1, 16384), 500, "mmr")
ops.dpp_select(unit, torch.rand(1, 16384), 16)
ops.dpc_knn(x, 500)
ops.merge(x, half.repeat_interleave(2, 1) // 2, 8192)
ops.attention_received(x[:, None], x[:, None], 0.2)
ops.probe_norms(x[None], 0.1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_no_operator_makes_a_matrix_of_all_pairs():
    """At N = 16,384 that would be 1,024 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200


def test_the_order_of_sums_never_changes():
    """The same bits with one thread and with two, run after run."""
    x = torch.randn(4, 301, 70, generator=torch.Generator().manual_seed(6))
    threads, found = torch.get_num_threads(), []
    try:
        ops.set_backend("cpp")
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            unit, group = ops.normalize(x), torch.arange(301).expand(4, -1) % 50
            found.append(
                (
                    ops.energy(unit, "elu", 0.3),
                    ops.merge(x, group, 50),
                    *ops.dpc_knn(x, 40),
                    ops.attention_received(x[:, None], x[:, None], 0.1),
                    ops.probe_norms(x[None], 0.1),
                )
            )
    finally:
        torch.set_num_threads(threads)
        ops.set_backend(None)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_nan_and_infinity_are_never_a_crash():
    x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(9))
    x[0, 3], x[0, 7, 2] = float("nan"), float("inf")
    importance = torch.rand(1, 20)
    importance[0, 5] = float("nan")
    for kind in selection.SELECTIONS:
        order = ops.greedy_select(ops.normalize(x), importance, 20, kind)
        assert sorted(order[0].tolist()) == list(range(20))
    assert sorted(ops.dpp_select(ops.normalize(x), importance, 20)[0].tolist()) == list(range(20))
    assert ops.dpc_knn(x, 5)[0].unique().numel() == 5
    ops.energy(ops.normalize(x), "gaussian", 0.5)
    ops.bipartite_match(ops.normalize(x), torch.arange(10)[None], torch.arange(10, 20)[None], 4)
