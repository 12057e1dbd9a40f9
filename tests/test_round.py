"""One round of pairwise merging in one operator, against the same round step by step."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import pytest
import torch

import vtc
from vtc import ops
from vtc.ops import definitions, kernels
from vtc.token_map import TokenMap
from vtc.tokens import Tokens

BACKENDS = ["torch", *(["cpp"] if kernels._load("cpp") else [])]
FORMS = [None, ("elu", 0.5, 1.0), ("paper", 0.4, 0.7), ("gaussian", 0.5, 1.0), ("nearest", 0.0, 1.0)]
SHAPES = [(1, 2, 3), (1, 9, 5), (2, 33, 16), (3, 98, 24), (2, 131, 64)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    ops.set_backend(request.param)
    yield request.param
    ops.set_backend(None)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def by_steps(metric, weight, r, prefix, form, half, protect):
    """The round by its parts: energies, a sort, two ascending sets, partners, pairs, a map."""
    batch, tokens, _ = metric.shape
    unit = definitions.normalize(metric)
    if form is None:
        index = torch.arange(tokens).expand(batch, -1)
        a, b = (index[:, [i for i in range(prefix, tokens) if i % 2 == side]] for side in (0, 1))
    else:
        order = definitions.energy(unit[:, prefix:], *form).argsort(dim=1, descending=True, stable=True) + prefix
        order = order[:, : 2 * r] if half or protect else order
        sides = (order[:, :r], order[:, r:]) if half else (order[:, 0::2], order[:, 1::2])
        a, b = (side.sort(dim=1).values for side in sides)
    pairs = definitions.bipartite_match(unit, a, b, r)
    return TokenMap.from_pairs(tokens, pairs, weight=weight)


def same(made, expected):
    assert torch.equal(made.group, expected.group) and torch.equal(made.anchor, expected.anchor)
    assert torch.equal(made.size, expected.size) and torch.equal(made.rank, expected.rank)
    assert made.complete and made.slots == expected.slots


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_round_is_its_steps(backend, form, shape):
    for prefix, (half, protect), sized in product((0, 1, 2), ((False, False), (False, True), (True, False)), (0, 1)):
        if (form is None and (half or protect)) or prefix >= shape[1]:
            continue
        metric = draw(*shape)
        weight = torch.randint(1, 5, shape[:2], generator=torch.Generator().manual_seed(1)).float() if sized else None
        for r in {0, 1, (shape[1] - prefix) // 4, (shape[1] - prefix) // 2}:
            if r > (shape[1] - prefix) // 2:
                continue
            made = TokenMap.from_round(metric, r, prefix, weight, form, half, protect)
            expected = by_steps(metric, weight, r, prefix, form, half, protect)
            same(made, expected)
            x = draw(*shape[:2], 7)
            torch.testing.assert_close(made.merge(x), expected.merge(x))
            assert torch.equal(made.gather(x), expected.gather(x))
            y = draw(shape[0], made.slots, 7)
            assert torch.equal(made.unmerge(y), expected.unmerge(y))
            assert torch.equal(made.unmerge(y, "nearest"), expected.unmerge(y, "nearest"))
            assert torch.equal(made.drop_prefix(prefix).group, expected.drop_prefix(prefix).group)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_copies_tie_to_the_lowest_index(backend, form):
    """Two tokens over and over, one of them more often, with exact products: all their ties are ties."""
    metric = torch.eye(2)[(torch.arange(41) % 3 == 0).long()].expand(2, -1, -1)
    for prefix, r in ((0, 20), (1, 9)):
        same(TokenMap.from_round(metric, r, prefix, None, form), by_steps(metric, None, r, prefix, form, False, False))


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_what_does_not_fit_in_memory_at_once_gives_the_same(form, monkeypatch):
    metric = draw(2, 50, 16)
    whole = definitions.pair_round(metric, None, 12, 1, form)
    monkeypatch.setattr(definitions, "_TILE", 600)
    for ours, theirs in zip(definitions.pair_round(metric, None, 12, 1, form), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rounds_compose(backend):
    metric = draw(2, 40, 8)
    first = TokenMap.from_round(metric, 10, 1, None)
    second = TokenMap.from_round(first.merge(metric), 9, 1, first.size, ("elu", 0.5, 1.0))
    steps = by_steps(metric, None, 10, 1, None, False, False)
    both = steps.compose(by_steps(steps.merge(metric), steps.size, 9, 1, ("elu", 0.5, 1.0), False, False))
    same(first.compose(second), both)
    dropped = TokenMap.from_anchors(torch.arange(second.slots)[None] % 2 == torch.tensor([[0], [0]]))
    assert not first.compose(second).compose(dropped).complete
    assert torch.equal(first.compose(second).compose(dropped).group, both.compose(dropped).group)


def test_a_map_that_nobody_asked_can_be_copied_and_kept(backend):
    made = TokenMap.from_round(draw(1, 12, 4), 3, 1, None)
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other.anchor, made.anchor) and torch.equal(other.rank, made.rank)
    with pytest.raises(AttributeError, match="no attribute 'anchors'"):
        made.anchors  # noqa: B018


def test_features_of_any_type(backend):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        metric = draw(2, 21, 6).to(dtype)
        made = TokenMap.from_round(metric, 8, 1, None)
        same(made, by_steps(metric.float(), None, 8, 1, None, False, False))
        assert made.merge(metric).dtype == dtype


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_keys_of_several_heads(backend, form):
    """As they lie in an attention's projection, one after the other, and in other orders: their mean decides."""
    keys = draw(2, 35, 3, 4, 8)[:, :, 1]  # of q, k and v
    for x in (keys, keys.transpose(1, 2).contiguous().transpose(1, 2), keys.mT.contiguous().mT, keys[:, :, :1]):
        expected = TokenMap.from_round(x.mean(2), 12, 1, None, form)
        same(TokenMap.from_round(x, 12, 1, None, form), expected)
        same(
            TokenMap.from_round(x.bfloat16(), 12, 1, None, form),
            TokenMap.from_round(x.bfloat16().float(), 12, 1, None, form),
        )


@pytest.mark.parametrize("method", ["tome", "pitome"])
def test_a_method_takes_the_keys_of_every_head(method):
    keys, x, mask = draw(2, 20, 3, 8), draw(2, 20, 5), torch.ones(2, 20, dtype=torch.bool)
    mask[0, 14:] = False
    for given, r in ((None, 6), (mask, torch.tensor([4, 6]))):
        maps = [
            vtc.methods.make(method, keep=0.7).decide(Tokens(x, layer_keys=k, mask=given, prefix=1), r)
            for k in (keys, keys.mean(2))
        ]
        assert torch.equal(maps[0].group, maps[1].group)


def test_more_than_half_cannot_go(backend):
    assert TokenMap.from_round(draw(1, 10, 4), 9, 1, None).slots == 6
    assert vtc.functional.tome(draw(1, 10, 4), keep=3).slots == 3  # in rounds
