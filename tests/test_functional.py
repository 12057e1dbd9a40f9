"""The decisions against slow definitions in float64 numpy-style loops, and their properties."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import matrix

import vtc
from vtc import functional, ops


def features(batch, tokens, width=8, seed=0):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def cosine(x):
    x = x.double()
    unit = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (unit @ unit.T).fill_diagonal_(1.0).tolist()


def slow_energy(x, form, margin, alpha):
    similarity = cosine(x)
    energy = []
    for i, row in enumerate(similarity):
        if form == "nearest":
            energy.append(max((max(s, similarity[j][i]) for j, s in enumerate(row) if j != i), default=-2.0))
            continue
        total = 0.0
        for s in row:
            if form == "paper":
                total += s if s >= margin else alpha * (math.exp(s - margin) - 1)
            elif form == "elu":
                total += s - margin if s > margin else alpha * (math.exp(s - margin) - 1)
            else:
                sigma = 1 - margin
                total += math.exp(-0.5 * ((1 - s) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        energy.append(total / len(row))
    return energy


def slow_match(x, sources, targets, r):
    """The r best (source, target) pairs; ties to the lowest index."""
    similarity = cosine(x)
    best = []
    for a in sorted(sources):
        b = max(sorted(targets), key=lambda t: similarity[a][t])
        best.append((-similarity[a][b], a, b))
    return {(a, b) for _, a, b in sorted(best)[:r]}


def pairs(token_map, item=0):
    group, anchor = token_map.group[item].tolist(), token_map.anchor[item].tolist()
    return {(t, anchor[s]) for t, s in enumerate(group) if s >= 0 and anchor[s] != t}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(0, 3), st.integers(0, 15), st.integers(0, 10**6))
def test_tome_is_its_definition(patches, prefix, r, seed):
    x = features(1, prefix + patches, seed=seed)
    made = functional.tome(x, r=r, prefix=prefix)
    rows = range(prefix, prefix + patches)
    even, odd = [t for t in rows if t % 2 == 0], [t for t in rows if t % 2 == 1]
    expected = slow_match(x[0], even, odd, min(r, patches // 2)) if even and odd else set()
    assert pairs(made) == expected


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(0, 3),
    st.integers(0, 15),
    st.sampled_from(ops.definitions.ENERGIES),
    st.sampled_from(["protect", "open", "half"]),
    st.integers(0, 10**6),
)
def test_pitome_is_its_definition(patches, prefix, r, form, path, seed):
    x, margin, alpha = features(1, prefix + patches, seed=seed), 0.2, 0.7
    split = "half" if path == "half" else "alternate"
    made = functional.pitome(
        x, r=r, prefix=prefix, margin=margin, alpha=alpha, energy=form, split=split, protect=path != "open"
    )
    r = min(r, patches // 2)
    energy = slow_energy(x[0, prefix:], form, margin, alpha)
    order = [prefix + t for t in sorted(range(patches), key=lambda t: (-energy[t], t))]
    if path == "protect":
        a, b = order[: 2 * r : 2], order[1 : 2 * r : 2]
    elif path == "half":
        a, b = order[:r], order[r : 2 * r]
    else:
        a, b = order[0::2], order[1::2]
    assert pairs(made) == (slow_match(x[0], a, b, r) if a and b else set())


@pytest.mark.parametrize("form", ops.definitions.ENERGIES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 97, 197])
def test_energy_by_tiles_is_the_energy(form, tokens, monkeypatch):
    x = features(2, tokens, 16)
    expected = torch.tensor([slow_energy(item, form, 0.4, 0.5) for item in x])
    for tile in (1, 1000, 1 << 24):
        monkeypatch.setattr(ops.definitions, "_TILE", tile)
        torch.testing.assert_close(ops.energy(ops.normalize(x), form, 0.4, 0.5), expected.float(), rtol=1e-5, atol=1e-6)


METHODS = {
    "tome": functional.tome,
    "random": functional.random,
    **{
        f"pitome-{form}-{path}": lambda x, form=form, path=path, **kw: functional.pitome(
            x, margin=0.1, energy=form, split="half" if path == "half" else "alternate", protect=path != "open", **kw
        )
        for form in ops.definitions.ENERGIES
        for path in ("protect", "open", "half")
    },
}


@matrix("name, tokens, prefix", product(METHODS, (1, 2, 3, 8, 33), (0, 1, 5)))
def test_batch_equals_singles_and_padding_is_invisible(name, tokens, prefix):
    method = METHODS[name]
    lengths = [prefix + tokens, prefix + max(0, tokens - 2), prefix + tokens // 2]
    x = features(3, prefix + tokens)
    for keep in (0.9, 0.5, 0.2):
        alone = [method(x[b : b + 1, :n], keep=keep, prefix=prefix) for b, n in enumerate(lengths)]
        for shift in (0, 3):  # padding behind, and in front as well
            padded = torch.full((3, prefix + tokens + shift + 2, 8), float("nan"))
            padded[:] = 1e4
            mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
            for b, n in enumerate(lengths):
                padded[b, shift : shift + n], mask[b, shift : shift + n] = x[b, :n], True
            together = method(padded, keep=keep, prefix=prefix, mask=mask)
            for b, n in enumerate(lengths):
                assert torch.equal(together.group[b, shift : shift + n], alone[b].group[0])
                assert (together.group[b][~mask[b]] == -1).all()
                m = alone[b].anchor.shape[1]
                assert torch.equal(together.anchor[b, :m] - shift, alone[b].anchor[0])
                assert torch.equal(together.size[b, :m], alone[b].size[0])


# where two tokens are each other's nearest they tie, and the tie goes by their order
@pytest.mark.parametrize("name", [n for n in METHODS if n.startswith("pitome") and "nearest" not in n])
def test_pitome_does_not_see_the_order_of_the_tokens(name):
    x, order = features(1, 40), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    made, moved = METHODS[name](x, keep=0.7), METHODS[name](x[:, order], keep=0.7)
    assert {frozenset((order[a].item(), order[b].item())) for a, b in pairs(moved)} == {
        frozenset(pair) for pair in pairs(made)
    }


def test_tome_sees_the_order_of_the_tokens():
    x = features(1, 40)
    assert pairs(functional.tome(x, r=5)) != {(39 - a, 39 - b) for a, b in pairs(functional.tome(x.flip(1), r=5))}


@pytest.mark.parametrize("name", METHODS)
def test_budgets(name):
    x, method = features(2, 41), METHODS[name]
    for keep in (1.0, 0.99, 0.5, 0.3, 0.01):
        made = method(x, keep=keep, prefix=1)
        assert made.anchor.shape[1] == 1 + max(1, 40 - math.floor(40 - 40 * keep))
    for keep in (40, 17, 1):
        assert method(x, keep=keep, prefix=1).anchor.shape[1] == 1 + keep
    identity = method(x, keep=1.0)
    assert torch.equal(identity.group, torch.arange(41).expand(2, 41)) and (identity.size == 1).all()
    assert method(x, r=0).anchor.shape[1] == 41
    assert method(x, r=100).anchor.shape[1] == 21  # a round halves at most


@pytest.mark.parametrize("name", METHODS)
def test_ties_go_to_the_lowest_index(name):
    """All tokens alike: the decision must still be one particular one."""
    x = torch.ones(1, 8, 4)
    made = METHODS[name](x, r=2)
    if name == "random":
        return
    if name == "tome":
        assert pairs(made) == {(0, 1), (2, 1)}
    elif name.endswith("half"):
        assert pairs(made) == {(0, 2), (1, 2)}
    else:
        assert pairs(made) == {(0, 1), (2, 1)}


def test_zero_tokens_have_cosine_zero():
    x = features(1, 6)
    x[0, 2] = 0
    assert ops.normalize(x)[0, 2].eq(0).all()
    assert functional.tome(x, r=3).merge(x).isfinite().all()
    assert functional.pitome(x, r=3, margin=0.5).merge(x).isfinite().all()


def test_downsample_averages_cells():
    x = torch.arange(1.0, 13)[None, :, None]
    made = functional.downsample(x, keep=4, grid=(3, 4))
    rows, columns = vtc.methods.downsample.coarse_grid((3, 4), 4)
    assert rows * columns == made.anchor.shape[1] <= 4
    assert made.size.sum() == 12 and torch.isclose((made.merge(x)[..., 0] * made.size).sum(), x.sum())
    with_prefix = functional.downsample(torch.cat([torch.zeros(1, 1, 1), x], 1), keep=4, grid=(3, 4), prefix=1)
    assert torch.equal(with_prefix.group[0, 1:] - 1, made.group[0]) and with_prefix.group[0, 0] == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 1600))
def test_coarse_grids_fit_and_cover(rows, columns, budget):
    from vtc.methods.downsample import cells, coarse_grid

    height, width = coarse_grid((rows, columns), budget)
    assert 1 <= height <= rows and 1 <= width <= columns and height * width <= max(1, budget)
    if budget >= rows * columns:
        assert (height, width) == (rows, columns)
    cell, middle = cells((rows, columns), (height, width))
    assert sorted(set(cell.tolist())) == list(range(height * width))  # no cell is empty
    assert cell[middle].tolist() == list(range(height * width))  # and its middle lies in it
    counts = torch.bincount(cell)
    assert counts.max() <= -(-rows // height) * -(-columns // width)


def test_random_is_seeded_and_not_always_the_same():
    x = features(1, 100)
    kept = [functional.random(x, keep=50, seed=seed).anchor for seed in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
    made = functional.random(x, keep=50)
    assert sorted(made.order[0].tolist()) == made.anchor[0].tolist()


def test_a_longer_draw_continues_a_shorter_one():
    for seed in range(5):
        long = ops.seeded_uniform(seed, 4000, torch.device("cpu"))
        for n in (1, 7, 16, 17, 255, 1000):
            assert torch.equal(ops.seeded_uniform(seed, n, torch.device("cpu")), long[:n])


def test_operators_are_well_formed():
    torch.library.opcheck(ops.seeded_uniform, (0, 5, torch.device("cpu")))


BAD = [
    ({"keep": 0}, "whole number"),
    ({"keep": 0.0}, "out of range"),
    ({"keep": 1.2}, "out of range"),
    ({"keep": "abc"}, "str"),
    ({"keep": True}, "bool"),
    ({"keep": float("nan")}, "out of range"),
    ({"keep": 99}, "more than the 10 tokens"),
    ({"keep": 0.5, "r": 3}, "keep and r"),
    ({}, "no budget"),
    ({"r": -1}, "r=-1"),
    ({"r": 1.5}, "r=1.5"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_budgets_say_what_was_wrong(options, message):
    with pytest.raises(vtc.OptionError, match=message):
        functional.tome(features(1, 10), **options)


def test_bad_tensors_say_what_was_wrong():
    x = features(2, 10)
    broken = x.clone()
    broken[1, 3, 2] = float("nan")
    for bad, message in [
        ({"features": broken}, "NaN"),
        ({"features": x[0]}, r"\[B, N, D\]"),
        ({"features": x.long()}, "float tensor"),
        ({"features": x, "mask": torch.ones(2, 9, dtype=torch.bool)}, "mask must be"),
        ({"features": x, "mask": torch.ones(2, 10)}, "mask must be bool"),
        ({"features": x, "size": torch.ones(3, 10)}, "size must be"),
        ({"features": x, "prefix": 11}, "prefix=11"),
    ]:
        with pytest.raises(vtc.InputError, match=message):
            functional.tome(bad.pop("features"), keep=0.5, **bad)
    with pytest.raises(vtc.InputError, match="grid 3x4"):
        functional.downsample(x, keep=0.5, grid=(3, 4))
    with pytest.raises(vtc.OptionError, match="energy='soft'"):
        functional.pitome(x, keep=0.5, margin=0.5, energy="soft")
    with pytest.raises(vtc.OptionError, match="below 1"):
        functional.pitome(x, keep=0.5, margin=1.0, energy="gaussian")
