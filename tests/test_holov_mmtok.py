"""HoloV and MMTok: the reference vectors (tests/video_vectors.json), plain loops in float64, and what they promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import video_vectors as vectors

import vtc
from vtc import functional, ops
from vtc.methods import Tokens, holov, mmtok
from vtc.methods.downsample import cells, coarse_grid

CASES = 200
VECTORS = [case for case in vectors.cases("holov", "mmtok") if case["stable_rel_1e_6"]]
BOTH = [torch.float32, torch.float64]


# -- plain loops -------------------------------------------------------------------------------------------------------
def runs(n, crops):
    """Consecutive runs, the first of them one longer."""
    crops = min(crops, n)
    ends = np.cumsum([n // crops + (c < n % crops) for c in range(crops)])
    return [list(range(e - n // crops - (c < n % crops), e)) for c, e in enumerate(ends)]


def slow_holov(z, a, k, parts, inside="attention", upstream=False):
    """The kept tokens, crop by crop, the crops' quotas and their weights. upstream: as the released code, with what it
    loses, and with 1e-6 more in the norm, which makes some copies more alike than others."""
    u = z / (np.linalg.norm(z, axis=1, keepdims=True) + 1e-6 * upstream)
    s, weights = np.zeros(len(a)), []
    for part in parts:
        m = len(part)
        if m > 1:
            cosine = u[part] @ u[part].T
            np.fill_diagonal(cosine, 0)
            mu = cosine.sum(1) / (m - 1)
            var = ((cosine - mu[:, None]) ** 2).sum(1) / (m - 1)
            received = 1000 * a[part]
            s[part] = received + 0.09 * var * received.mean() / (var.mean() + 1e-6)
        else:
            s[part] = a[part]
        weights.append(s[part].mean())
    share = np.array(weights) / (sum(weights) + 1e-6)
    quota = [int(np.floor(w * k)) for w in share]
    heavy = sorted(range(len(parts)), key=lambda c: -np.float32(share[c]))
    for c in heavy[: k - sum(quota)]:
        quota[c] += 1
    given = list(quota)
    if not upstream:
        given = [min(n, len(part)) for n, part in zip(quota, parts, strict=True)]
        while sum(given) < k:
            for c in heavy:
                given[c] += given[c] < len(parts[c]) and sum(given) < k
    value = a if inside == "attention" else s.astype(np.float32)
    kept = []
    for n, part in zip(given, parts, strict=True):
        best = sorted(part, key=lambda t: -value[t])[:n]
        kept += sorted(best) if upstream and n >= len(part) else best
    return kept, given, share


def slow_table(q, z, v, t_text=0.02, t_vision=0.2, alpha=0.5):
    """A, the rows of the text above those of the image."""

    def unit(x):
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8)

    def softmax(x):
        e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    image = (alpha if len(q) else 1.0) * softmax(unit(v) @ unit(v).T / t_vision) / len(v)
    return np.concatenate([softmax(unit(q) @ unit(z).T / t_text) / len(q), image]) if len(q) else image


def greedy(table, k, allowed=None):
    free, cover, order = list(range(table.shape[1]) if allowed is None else allowed), np.zeros(len(table)), []
    while free and len(order) < k:
        gain = np.maximum(0, table[:, free] - cover[:, None]).sum(0)
        order.append(free.pop(int(gain.argmax())))
        cover = np.maximum(cover, table[:, order[-1]])
    return order


class Case:
    """Three images of different sizes with padding in front, in the middle or behind. Of every other case most tokens
    are copies of each other and many attentions are equal."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.grids = [tuple(int(n) for n in rng.integers(1, 7, 2)) for _ in range(3)]
        self.lengths = [h * w for h, w in self.grids]
        self.counts = [int(rng.integers(1, n + 1)) for n in self.lengths]
        total, where = max(self.lengths) + 3, int(rng.integers(0, 3))
        self.ties = seed % 2 == 1
        self.crops = int(rng.integers(1, 8))
        self.inside = ("attention", "score")[seed // 2 % 2]
        self.x, self.v = rng.standard_normal((3, total, 6)), rng.standard_normal((3, total, 2, 5))
        self.a = rng.random((3, total)) + 0.01
        if self.ties:
            source = rng.integers(0, 4, (3, total))
            self.x, self.v = (
                np.take_along_axis(y, source.reshape(3, total, *[1] * (y.ndim - 2)), 1) for y in (self.x, self.v)
            )
            self.a = rng.integers(0, 4, (3, total)) / 8
        self.words = [int(rng.integers(0, 5)) for _ in range(3)]
        self.text = rng.standard_normal((3, max(self.words) + 1, 6))
        self.at = [
            {0: np.arange(total - n, total), 1: np.arange(n), 2: np.sort(rng.permutation(total)[:n])}[where]
            for n in self.lengths
        ]
        self.mask = torch.zeros(3, total, dtype=torch.bool)
        for b, at in enumerate(self.at):
            self.mask[b, at] = True

    def tokens(self):
        holes = ~self.mask  # whatever stands in the padding
        words = torch.arange(self.text.shape[1]) < torch.tensor(self.words)[:, None]
        return Tokens(
            tensor(self.x).masked_fill(holes[..., None], float("nan")),
            mask=self.mask,
            attention=tensor(self.a).masked_fill(holes, float("nan")),
            inputs=tensor(self.v).masked_fill(holes[..., None, None], float("nan")),
            text=tensor(self.text).masked_fill(~words[..., None], float("nan")),
            text_mask=words,
            grid=tuple(self.grids),
        )

    def alone(self, b):
        """One image as a batch of its own."""
        at, of = self.at[b], slice(b, b + 1)
        return Tokens(
            tensor(self.x[of, at]),
            attention=tensor(self.a[of, at]),
            inputs=tensor(self.v[of, at]),
            text=tensor(self.text[of, : self.words[b]]),
            grid=(self.grids[b],),
        )

    def both(self, method):
        """(image, its tokens, its count, the picks), of a batch, which are those of the image alone."""
        order = method.pick(self.tokens(), torch.tensor(self.counts))
        for b, (at, k) in enumerate(zip(self.at, self.counts, strict=True)):
            assert (order[b, k:] == -1).all()
            alone = method.pick(self.alone(b), k)[0].tolist()
            assert order[b, :k].tolist() == at[alone].tolist() and len(set(alone)) == k
            yield b, at, k, alone


def tensor(x):
    return torch.from_numpy(np.ascontiguousarray(x)).float()


# -- the reference vectors ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["name"])
def test_vectors(case, dtype):
    arrays, expected, p = [x.numpy() for x in vectors.inputs(case)], case["expect"], case["params"]
    given = [torch.from_numpy(x)[None].to(dtype) for x in arrays]
    if case["method"] == "holov":
        upstream = p.get("upstream", True)
        kept, quota, share = slow_holov(*arrays, p["k"], runs(len(arrays[1]), p["crops"]), upstream=upstream)
        assert share == pytest.approx(expected["weights"], abs=1e-8) and quota == expected["alloc"]
        assert (kept if upstream else sorted(kept)) == expected["indices"]
        if not expected["pad"]:  # the released code loses what a crop has no room for; vtc does not
            made = functional.holov(*given, keep=p["k"], crops=p["crops"])
            assert made.anchor[0].tolist() == sorted(expected["indices"])
        return
    text, z, tower = given
    table = slow_table(*arrays, **{name: p[name] for name in ("t_text",) if name in p})
    allowed = [t for t in range(z.shape[1]) if t not in p.get("banned", [])]
    assert greedy(table, p["k"], allowed) == expected["order"]
    options = {"t_text": p.get("t_text", 0.02)}
    if "banned" not in p:
        made = functional.mmtok(z, text, tower=tower, keep=p["k"], **options)
        assert made.order[0].tolist() == expected["order"] and made.anchor[0].tolist() == expected["indices"]
    words, real = torch.ones(text.shape[:2], dtype=torch.bool), torch.ones(z.shape[:2], dtype=torch.bool)
    cover = vtc.MMTok(keep=0.5, **options).cover(z, text, tower, real, words)
    assert float(cover[0, expected["order"][0]].sum()) == pytest.approx(expected["first_gain"], rel=1e-6)
    mask = torch.tensor([[t in allowed for t in range(z.shape[1])]])  # not to be picked, but to be covered
    assert ops.cover_select(cover, p["k"], mask)[0].tolist() == expected["order"]


# -- by definition -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", [False, True])
def test_holov_is_its_definition(grid):
    for seed in range(CASES):
        case = Case(seed)
        method = vtc.HoloV(keep=0.5, crops=case.crops, inside=case.inside, cells="grid" if grid else "runs")
        for b, at, k, picks in case.both(method):
            parts = runs(len(at), case.crops)
            if grid:
                cell = cells(case.grids[b], coarse_grid(case.grids[b], case.crops))[0].numpy()
                parts = [list(np.flatnonzero(cell == c)) for c in range(cell.max() + 1)]
            kept, quota, _ = slow_holov(
                tensor(case.x)[b, at].double().numpy(), tensor(case.a)[b, at].double().numpy(), k, parts, case.inside
            )
            assert sorted(picks) == sorted(kept), (seed, b)
            crop = {t: c for c, part in enumerate(parts) for t in part}
            ranked = [[t for t in kept if crop[t] == c] for c in range(len(parts))]
            turn = {t: ((i + 1) / quota[c], t) for c, row in enumerate(ranked) for i, t in enumerate(row)}
            if ops.backend() == "cpp" or not case.ties:  # in torch's products copies differ by rounding
                assert picks == sorted(kept, key=turn.__getitem__), (seed, b)  # all crops in step


def test_mmtok_is_its_definition():
    """Every pick has the highest gain but for rounding, and of copies the first comes first."""
    same = steps = 0
    for seed in range(CASES):
        case = Case(seed)
        method = vtc.MMTok(keep=0.5, t_text=0.05 if seed % 3 else 0.01, alpha=float(seed % 4) / 2)
        for b, at, k, picks in case.both(method):
            x, v = case.x[b, at], case.v[b, at].mean(1)
            table = slow_table(case.text[b, : case.words[b]], x, v, method.t_text, method.t_vision, method.alpha)
            cover, free = np.zeros(len(table)), list(range(len(at)))
            for pick in picks:
                gain = np.maximum(0, table[:, free] - cover[:, None]).sum(0)
                assert gain[free.index(pick)] >= gain.max() - 2e-6, (seed, b)
                assert all((x[t] != x[pick]).any() for t in free if t < pick), (seed, b)
                same, steps = same + (free[int(gain.argmax())] == pick), steps + 1
                free.remove(pick)
                cover = np.maximum(cover, table[:, pick])
            if not case.ties and method.alpha:  # text alone is soon covered, but for rounding
                assert picks == greedy(table, k), (seed, b)
    assert steps > 3000


def test_ties_go_to_the_lowest_index():
    """Equal tokens with equal attention: crops get the same, and in each the first tokens stay."""
    x, a = torch.ones(1, 32, 8), torch.full((1, 32), 1 / 32)
    for inside in holov.INSIDE:
        made = functional.holov(x, a, keep=8, crops=4, inside=inside)
        assert made.anchor[0].tolist() == [0, 1, 8, 9, 16, 17, 24, 25] and made.order[0, :4].tolist() == [0, 8, 16, 24]
    assert functional.holov(x, 0 * a, keep=5, crops=4).anchor[0].tolist() == [0, 1, 8, 16, 24]  # w = 0: by index
    assert functional.mmtok(x, torch.randn(1, 3, 8), keep=5).order[0].tolist() == list(range(5))
    few = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1)).repeat(1, 4, 1)
    order = functional.mmtok(few, few[:, :2], keep=20).order[0].tolist()
    assert sorted(order[:5]) == list(range(5)) and order[5:] == list(range(5, 20))


@pytest.mark.parametrize("method", [vtc.HoloV(keep=0.5), vtc.HoloV(keep=0.5, inside="score"), vtc.MMTok(keep=0.5)])
def test_counts_end_at_the_image(method):
    case = Case(0)
    order = method.pick(case.tokens(), torch.tensor([99, 2, 0]))
    assert [int((row >= 0).sum()) for row in order] == [case.lengths[0], 2, 0]
    assert sorted(order[0].tolist()) == case.at[0].tolist()
    assert sorted(method.pick(case.alone(1), 99)[0].tolist()) == list(range(case.lengths[1]))
    nobody = replace(case.tokens(), mask=torch.zeros_like(case.mask))
    assert method.pick(nobody, torch.tensor([3, 3, 3])).shape == (3, 0)


@pytest.mark.parametrize("method", [vtc.HoloV(keep=0.5), vtc.HoloV(keep=0.5, inside="score"), vtc.MMTok(keep=0.5)])
def test_the_order_of_channels_does_not_matter(method):
    g = torch.Generator().manual_seed(2)
    tokens = Tokens(
        torch.randn(2, 60, 16, generator=g),
        attention=torch.rand(2, 60, generator=g),
        text=torch.randn(2, 4, 16, generator=g),
        inputs=torch.randn(2, 60, 4, 12, generator=g),
    )
    at, of = torch.randperm(16, generator=g), torch.randperm(12, generator=g)
    moved = {"features": tokens.features[..., at], "text": tokens.text[..., at], "inputs": tokens.inputs[..., of]}
    assert torch.equal(method.pick(tokens, 20), method.pick(replace(tokens, **moved), 20))


# -- HoloV -------------------------------------------------------------------------------------------------------------
def test_diversity_cancels_unless_it_is_asked_for():
    """As the released code is: other features, the same tokens; with inside="score", others."""
    g = torch.Generator().manual_seed(3)
    a, x, y = torch.rand(4, 200, generator=g), *(torch.randn(4, 200, 16, generator=g) for _ in range(2))
    assert torch.equal(functional.holov(x, a, keep=50).order, functional.holov(y, a, keep=50).order)
    close = 1 + a / 1000
    by_score = [functional.holov(z, close, keep=50, inside="score") for z in (x, y)]
    assert not torch.equal(by_score[0].order, by_score[1].order)


def test_more_crops_than_tokens():
    """Crops of one token weigh a thousandth of others, as in the released code; here all of them are."""
    a = torch.tensor([[0.1, 0.5, 0.3, 0.4, 0.2]])
    assert functional.holov(torch.randn(1, 5, 4), a, keep=3, crops=16).anchor[0].tolist() == [1, 2, 3]
    kept, quota, share = slow_holov(np.random.default_rng(0).standard_normal((5, 4)), a[0].numpy(), 2, runs(5, 3))
    assert [len(part) for part in runs(5, 3)] == [2, 2, 1] and share[2] < 0.01 and quota[2] == 0


def test_a_full_crop_hands_its_surplus_on():
    a = torch.full((1, 24), 1e-3)
    a[0, 4:8] = 1.0
    made = functional.holov(torch.randn(1, 24, 4), a, keep=9, crops=6)
    assert made.anchor[0].tolist() == [0, 4, 5, 6, 7, 8, 12, 16, 20]  # one for each of the others, by weight or index
    g = torch.Generator().manual_seed(4)
    for k in range(1, 25):
        peaked = torch.rand(3, 24, generator=g) ** 8
        assert functional.holov(torch.randn(3, 24, 4, generator=g), peaked, keep=k, crops=6).anchor.shape == (3, k)


def test_cells_of_the_grid():
    """Attention on the left half alone: with cells every kept token is there; runs are rows and know no left."""
    left = (torch.arange(64) % 8 < 4).float()[None]
    x = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(5))
    method = vtc.HoloV(keep=16, crops=4, cells="grid")
    tokens = Tokens(x, attention=left + torch.rand(1, 64) / 1e6, grid=((8, 8),))
    kept = method.pick(tokens, 16)[0]
    assert method.needs == {"attention", "grid"} and vtc.HoloV(keep=16).needs == {"attention"}
    assert (kept % 8 < 4).all() and [int((kept // 32 == half).sum()) for half in (0, 1)] == [8, 8]
    assert torch.equal(functional.holov(x, tokens.attention, keep=16, crops=4, grid=(8, 8)).order[0], kept)
    for grid in (((8, 7),), (None,)):
        with pytest.raises(vtc.OptionError, match="needs all tokens of each image"):
            method.pick(replace(tokens, grid=grid), 16)
    with pytest.raises(vtc.OptionError, match=r"Tokens\.grid"):
        method.pick(replace(tokens, grid=None), 16)
    with pytest.raises(vtc.InputError, match="grid=8: it takes"):
        functional.holov(x, left, keep=4, grid=8)
    with pytest.raises(vtc.InputError, match="the attention holds negative values"):
        functional.holov(x, -left - 1, keep=4)


# -- MMTok -------------------------------------------------------------------------------------------------------------
def test_without_text_the_image_decides():
    case = Case(2)
    case.words = [3, 0, 0]
    silent, said = vtc.MMTok(keep=0.5, alpha=0.0), []
    for method in (silent, vtc.MMTok(keep=0.5)):
        for b, _, k, picks in case.both(method):
            x, v = case.x[b, case.at[b]], case.v[b, case.at[b]].mean(1)
            assert b == 0 or picks == greedy(slow_table(x[:0], x, v), k)
    silent.pick(replace(case.tokens(), said=said), torch.tensor(case.counts))
    assert said == ["a prompt holds no text: there, the image alone decides"]
    said.clear()
    spoken = replace(case.tokens(), text=tensor(case.text), text_mask=None, said=said)
    silent.pick(spoken, torch.tensor(case.counts))
    assert said == []


def test_a_batch_beyond_a_tile_goes_in_parts(monkeypatch):
    case = Case(7)
    method, counts = vtc.MMTok(keep=0.5), torch.tensor(case.counts)
    whole = method.pick(case.tokens(), counts)
    for tile in (1, 2 * case.mask.shape[1] * (case.mask.shape[1] + case.text.shape[1])):
        monkeypatch.setattr(mmtok, "TILE", tile)
        assert torch.equal(method.pick(case.tokens(), counts), whole)


def test_mmtok_says_what_does_not_fit():
    x, text = torch.randn(2, 10, 6), torch.randn(2, 3, 6)
    with pytest.raises(vtc.InputError, match=r"text must be \[2, T, 6\] like the features"):
        functional.mmtok(x, text[:1], keep=4)
    with pytest.raises(vtc.InputError, match=r"tower must be \[2, 10\] like the features"):
        functional.mmtok(x, text, tower=x[:, :9], keep=4)
    with pytest.raises(vtc.InputError, match=r"mask must be bool \(2, 3\)"):
        functional.mmtok(x, text, text_mask=torch.ones(2, 4).bool(), keep=4)
    with pytest.raises(vtc.InputError, match="text hold NaN"):
        functional.mmtok(x, text * float("nan"), keep=4)
    with pytest.raises(vtc.OptionError, match="more than the 10 tokens"):
        functional.mmtok(x, text, keep=11)
    with pytest.raises(vtc.OptionError, match="t_vision=0: a temperature"):
        functional.mmtok(x, text, keep=4, t_vision=0)
    assert torch.equal(functional.mmtok(x, text, keep=4).order, functional.mmtok(x, text, tower=x, keep=4).order)
