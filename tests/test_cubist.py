"""CubistMerge's decision and its merge: the public vectors, and the loops of cubist_oracle.py."""

import numpy as np
import pytest
import torch
import video_vectors as vectors
from cubist_oracle import cubist as oracle

import vtc
from vtc.functional import cubist
from vtc.methods import Tokens
from vtc.methods.downsample import coarse_grid


def groups(token_map, b=0):
    """Of every slot its members, the anchor first."""
    made = []
    for slot, anchor in enumerate(token_map.anchor[b].tolist()):
        members = (token_map.group[b] == slot).nonzero()[:, 0].tolist()
        assert anchor in members
        made.append([anchor, *(m for m in members if m != anchor)])
    return made


@pytest.mark.parametrize("dtype", vectors.DTYPES, ids=str)
@pytest.mark.parametrize("case", vectors.cases("cubist"), ids=lambda case: case["name"])
def test_public_vectors(case, dtype):
    (x,), given, expected = vectors.inputs(case), case["params"], case["expect"]
    x, d = x.numpy(), x.shape[1]
    grid, options = (given["h"], given["w"]), {"rows": given["rh"], "columns": given["rw"]}
    made = cubist(torch.tensor(x, dtype=dtype)[None], grid, **options)
    assert [sorted(group) for group in groups(made)] == expected["groups"]
    assert oracle(x, grid, **options)[2] == expected["shared_targets"]
    values = made.largest(torch.tensor(x, dtype=dtype)[None])[0]
    assert values.dtype == dtype
    checksum = float((values.double() * torch.arange(1, d + 1)).sum())
    assert checksum == pytest.approx(expected["token_checksum"], abs=1e-6 if dtype == torch.float64 else 1e-4)


def test_random_cases_with_ties():
    """Copies of a few tokens, so that many cosines are the same; values of both signs with the same magnitude."""
    generator, hit = np.random.default_rng(0), 0
    for number in range(200):
        height, width = (int(n) for n in generator.integers(1, 10, 2))
        rows, columns = int(generator.integers(0, height + 1)), int(generator.integers(0, width + 1))
        d = int(generator.integers(1, 7)) * 2
        few = generator.normal(size=(int(generator.integers(1, 12)), d)) if number % 3 else np.zeros((1, d))
        x = few[generator.integers(0, len(few), height * width)]
        if number % 4 == 0:
            x = x * generator.choice([-1.0, 1.0], (height * width, 1))
        dtype = (torch.float32, torch.float64)[number % 2]
        x = torch.tensor(x, dtype=dtype)
        values, members, shared = oracle(x.numpy(), (height, width), rows, columns)
        made = cubist(x[None], (height, width), rows=rows, columns=columns)
        # members besides the anchor stand in the oracle in the order of the passes
        assert [[g[0], *sorted(g[1:])] for g in members] == groups(made), number
        assert np.array_equal(made.largest(x[None])[0].double().numpy(), values), number
        hit += shared
    assert hit > 100


def test_a_partition_of_the_grid():
    x = torch.randn(3, 9 * 11, 8, generator=torch.Generator().manual_seed(0))
    made = cubist(x, (9, 11), rows=4, columns=3)
    assert made.group.shape == (3, 99) and made.slots == 5 * 8 and made.complete
    assert made.size.sum(1).tolist() == [99.0] * 3 and made.size.max() <= 9
    for b in range(3):
        every = sorted(p for group in groups(made, b) for p in group)
        assert every == list(range(99))
        assert all(made.group[b, a] == slot for slot, a in enumerate(made.anchor[b]))
    assert (made.rank[torch.arange(3)[:, None], made.anchor] == 0).all()
    # anchors go down in every column and right in every row of the smaller rectangle
    anchor = made.anchor.view(3, 5, 8)
    assert (anchor.div(11, rounding_mode="floor").diff(dim=1) > 0).all()
    assert torch.equal(made.merge(torch.ones(3, 99, 1)), torch.ones(3, 40, 1))


def test_restored_places_copy_their_target():
    x = torch.randn(2, 6 * 8, 5, generator=torch.Generator().manual_seed(1))
    made = cubist(x, (6, 8), rows=3, columns=4)
    values = made.largest(x)
    whole = made.unmerge(values)
    for b in range(2):
        for slot, group in enumerate(groups(made, b)):
            assert (whole[b, group] == values[b, slot]).all()
    assert torch.equal(made.gather(whole), values)


def test_a_target_hit_from_both_sides():
    """Both sources count: the second does not start from the target as it was before the first."""
    x = torch.tensor([[0.0, 0, 1], [9, 1, 0], [1, 1, 0], [1, 9, 0], [0, 0, -1]])[None]
    made = cubist(x, (1, 5), rows=0, columns=2)
    assert groups(made) == [[0], [2, 1, 3], [4]]
    assert made.largest(x)[0].tolist() == [[0, 0, 1], [9, 9, 0], [0, 0, -1]]
    same = torch.tensor([[2.0, 9], [-2, 9]])[None]  # of equal magnitudes the target's
    assert cubist(same, (2, 1), rows=1, columns=0).largest(same).tolist() == [[[2, 9]]]
    both = torch.tensor([[9.0, 0, 0], [1, 9, 0], [0, 9, 0], [-1, 9, 0], [-9, 0, 0]])[None]
    made = cubist(both, (1, 5), rows=0, columns=2)  # and of two sources the left one's
    assert groups(made) == [[0], [2, 1, 3], [4]] and made.largest(both)[0, 1].tolist() == [1, 9, 0]


def test_the_second_pass_goes_by_what_the_first_made():
    """By the values as they were, another row would go."""
    generator, other = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        x = torch.randn(1, 36, 4, generator=generator)
        whole = cubist(x, (6, 6), rows=2, columns=2)
        first = cubist(x, (6, 6), rows=0, columns=2)
        again = first.compose(cubist(first.largest(x), (6, 4), rows=2, columns=0))
        assert torch.equal(whole.group, again.group) and torch.equal(whole.largest(x), again.largest(x))
        unmerged = first.compose(cubist(first.gather(x), (6, 4), rows=2, columns=0))
        other += not torch.equal(whole.group, unmerged.group)
    assert other > 5


def test_batches_channels_and_dtypes():
    x = torch.randn(4, 7 * 10, 16, generator=torch.Generator().manual_seed(2))
    made = cubist(x, (7, 10), rows=3, columns=5)
    for b in range(4):
        alone = cubist(x[b : b + 1], (7, 10), rows=3, columns=5)
        assert torch.equal(alone.group[0], made.group[b]) and torch.equal(alone.anchor[0], made.anchor[b])
        assert torch.equal(alone.largest(x[b : b + 1])[0], made.largest(x)[b])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(cubist(x[..., order], (7, 10), rows=3, columns=5).group, made.group)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        decided = cubist(half, (7, 10), rows=3, columns=5)
        assert torch.equal(decided.group, cubist(half.float(), (7, 10), rows=3, columns=5).group)
        assert torch.equal(decided.largest(half).float(), decided.largest(half.float()))


def test_the_merge_is_differentiable():
    x = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
    made = cubist(x, (3, 4), rows=1, columns=2)
    assert torch.autograd.gradcheck(made.largest, x)
    made.largest(x).sum().backward()
    assert x.grad.sum() == made.slots * 3 and set(x.grad.unique().tolist()) <= {0.0, 1.0}


def test_the_largest_of_any_map():
    """Also of one that drops tokens, and with slots that are padding."""
    made = vtc.TokenMap.from_anchors(
        torch.tensor([[True, False, True, False], [False, True, False, False]]),
        (torch.tensor([[1], [3]]), torch.tensor([[2], [1]]), torch.zeros(2, 1)),
    )
    x = torch.tensor([[1.0, -9, 3, 7], [1, -2, 5, 2]])[..., None]
    assert made.largest(x)[..., 0].tolist() == [[1, -9], [-2, 0]]


# -- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(64, 64), (14, 14), (24, 13), (5, 9), (1, 8), (2, 2)])
@pytest.mark.parametrize("keep", [1.0, 0.9, 0.75, 0.5, 0.4])
def test_keep_is_the_largest_rectangle_near_the_aspect(grid, keep):
    count = grid[0] * grid[1]
    budget, least = max(1, round(keep * count)), tuple(n - n // 2 for n in grid)
    method = vtc.CubistMerge(keep=keep)
    if budget < least[0] * least[1]:
        with pytest.raises(vtc.OptionError, match=f"keep={keep} is {budget} of the {grid[0]}x{grid[1]} tokens"):
            method.coarse(grid)
        return
    found = method.coarse(grid)
    assert all(low <= n <= high for low, n, high in zip(least, found, grid, strict=True))
    assert least[0] * least[1] <= found[0] * found[1] <= budget
    assert found == vtc.CubistMerge(keep=budget).coarse(grid)
    free = coarse_grid(grid, budget)  # downsample's rectangle, where half of each stays in it
    assert found == free or any(n < low for n, low in zip(free, least, strict=True))
    assert (found == grid) == (budget == count)


def test_rows_and_columns():
    assert vtc.CubistMerge(rows=2, columns=3).coarse((6, 8)) == (4, 5)
    assert vtc.CubistMerge(columns=2).coarse((6, 8)) == (6, 6)
    assert vtc.CubistMerge(rows=99, columns=99).coarse((7, 8)) == (4, 4)  # one pass takes at most half
    x = torch.randn(2, 48, 4, generator=torch.Generator().manual_seed(0))
    made = vtc.CubistMerge(rows=2, columns=3).decide(Tokens(x, grid=((6, 8), (6, 8))), 28)
    assert torch.equal(made.group, cubist(x, (6, 8), rows=2, columns=3).group)
    assert vtc.methods.make("cubist_merge", keep=0.5) == vtc.CubistMerge(keep=0.5)
    with pytest.raises(vtc.OptionError, match="the same for all images"):
        vtc.CubistMerge(keep=0.5).decide(Tokens(x, grid=((6, 8), (8, 6))), 24)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "no budget given"),
        ({"keep": 0.5, "rows": 1}, "rows=1 beside keep=0.5"),
        ({"rows": -1}, "rows=-1: it takes a whole number >= 0"),
        ({"columns": 1.5}, "columns=1.5"),
        ({"keep": 0.2}, "keep=0.2: at most half of the rows and of the columns go, so 0.25 stays"),
        ({"keep": 1.5}, "keep=1.5: out of range"),
        ({"r": 4}, "r=4: cubist_merge takes keep=, or rows= and columns="),
        ({"flops": 0.5}, "flops=0.5"),
        ({"keep": 0.5, "layer": -1}, "layer=-1"),
        ({"keep": 0.5, "where": "tower"}, "where='tower'"),
        ({"keep": 0.5, "pooled": True}, "pooled=True: cubist_merge works in the layers of a vision encoder alone"),
        ({"keep": 0.5, "positions": "ppe"}, "positions='ppe'"),
        ({"keep": 0.5, "proportional": True}, "proportional=True"),
        ({"keep": 0.5, "cascade": {2: 0.5}}, "cascade="),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(vtc.OptionError, match=says.replace("(", r"\(")):
        vtc.methods.make("cubist_merge", **options)


def test_wrong_inputs():
    x = torch.randn(1, 12, 4)
    for grid in ((3, 5), (12,), "3x4", (0, 12), (3.0, 4)):
        with pytest.raises(vtc.InputError, match="grid"):
            cubist(x, grid, rows=1, columns=1)
    for rows in (-1, 0.5, True, None):
        with pytest.raises(vtc.OptionError, match="rows="):
            cubist(x, (3, 4), rows=rows, columns=1)
    with pytest.raises(vtc.InputError, match="NaN"):
        cubist(x / 0, (3, 4), rows=1, columns=1)
    assert cubist(x[:, :1], (1, 1), rows=3, columns=3).slots == 1
    assert cubist(x[:0], (3, 4), rows=1, columns=2).group.shape == (0, 12)
