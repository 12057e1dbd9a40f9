"""The selectors: reference vectors, slow definitions in float64 numpy, and what they promise."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import vtc
from vtc import functional, ops, scores
from vtc.methods import METHODS, Tokens
from vtc.methods.ranked import Ranked
from vtc.methods.selector import Selector
from vtc.ops import definitions
from vtc.scores.simple import rank


# -- the reference vectors: closed forms, kept sets, orders ------------------------------------------------------------
def closed(n, d):
    i, j = np.arange(n)[:, None], np.arange(d)[None]
    return (np.sin(0.7 * i * (j + 1) + 0.3 * j) + 0.5 * np.cos(0.11 * i * i + j)).astype(np.float32)


F = torch.from_numpy(closed(24, 8))[None]
W = torch.from_numpy(np.cos(0.37 * np.arange(24)) + 0.01 * np.arange(24)).float()[None]


def tower():
    """Attention received and mean keys of the reference's ViT: 4 consecutive patches of 2 heads are one token."""
    key = np.cos(1.7 * closed(96, 8)).astype(np.float32)
    query, key = (torch.from_numpy(x).reshape(96, 2, 4).transpose(0, 1) for x in (closed(96, 8), key))
    received = (query @ key.mT / 2).softmax(-1).mean(0).sum(0).reshape(24, 4).sum(1)
    return received[None], key.reshape(2, 24, 4, 4).mean((0, 2))[None]


A, KAPPA = tower()


def everywhere(tokens):
    """What a decoder's input gives, told as what a layer of the decoder gives too."""
    return replace(tokens, prompt_attention=tokens.attention, decoder_keys=tokens.keys, decoder_text=tokens.text)


def reference_tokens():
    return everywhere(Tokens(F, keys=KAPPA, attention=A, middle=A, grid=((4, 6),)))


def kept(token_map, item=0):
    return [t for t in token_map.anchor[item].tolist() if t >= 0]


def numbers(text):
    return [int(word) for word in text.split()]


def test_the_closed_forms_are_the_references():
    expected = [0.5, 0.565671, 0.356569, 0.288331, 0.605217, 1.139326, 1.453933, 1.240160]
    assert F[0, 0].tolist() == pytest.approx(expected, abs=2e-6)
    assert F[0, 17, :3].tolist() == pytest.approx([-0.152714, -0.760979, -1.345116], abs=2e-6)
    assert A[0, :4].tolist() == pytest.approx([4.10165, 3.84496, 4.22664, 3.92130], abs=1e-5)
    assert A.sum().item() == pytest.approx(96, abs=1e-4)
    unit = ops.normalize(F)[0]
    assert (unit @ unit.T)[0, 1:3].tolist() == pytest.approx([0.394192, 0.198771], abs=2e-6)
    scaled = vtc.methods.idpruner.normalized(W, "minmax", None)
    assert scaled[0, :3].tolist() == pytest.approx([0.918025, 0.890212, 0.801542], abs=2e-6)


VECTORS = [
    ("mmr", 12, "0 1 2 3 4 13 14 15 16 17 18 21", lambda k: functional.mmr(F, W, keep=k)),
    ("mmr", 6, "2 15 16 17 18 21", lambda k: functional.mmr(F, W, keep=k)),
    ("mmr-step-3", 6, "15 16 17 18 21 23", lambda k: functional.mmr(F, W, keep=k, balance=0.1, step=3)),
    ("top", 12, "0 1 2 3 14 15 16 17 18 19 20 21", lambda k: functional.mmr(F, W, keep=k, balance=1.0)),
    ("top", 6, "0 1 16 17 18 19", lambda k: functional.mmr(F, W, keep=k, balance=1.0)),
    ("max_min", 12, "0 3 4 8 10 11 13 15 16 18 21 23", lambda k: functional.max_min(F, keep=k)),
    ("vispruner", 12, "0 2 4 6 7 9 11 12 13 17 20 23", lambda k: decide("vispruner", k)),
    ("scope", 12, "0 3 4 6 11 12 13 14 16 17 18 19", lambda k: decide("scope", k)),
    ("scope", 12, "0 3 4 6 11 12 13 14 16 17 18 19", lambda k: functional.coverage(F, A, keep=k)),
    ("hiprune", 12, "0 2 4 5 6 10 11 12 13 17 20 22", lambda k: decide("hiprune", k, alpha=0.5)),
    ("hiprune", 6, "2 5 10 11 12 17", lambda k: decide("hiprune", k, alpha=0.5)),
    ("visionzip", 12, "0 1 2 4 6 11 12 13 14 15 20 22", lambda k: decide("visionzip", k)),
]


def decide(name, k, tokens=None, **options):
    tokens = reference_tokens() if tokens is None else tokens
    return vtc.methods.make(name, keep=k, **options).decide(tokens, tokens.features.shape[1] - k)


@pytest.mark.parametrize(("name", "k", "expected", "call"), VECTORS, ids=[f"{v[0]}-{v[1]}" for v in VECTORS])
def test_idpruner_vectors(name, k, expected, call):
    made = call(k)
    assert kept(made) == numbers(expected)
    if made.order is not None:
        assert sorted(made.order[0].tolist()) == kept(made)


def test_visionzip_absorbs():
    group = decide("visionzip", 12).group[0].tolist()
    anchors = kept(decide("visionzip", 12))
    members = {a: [t for t in range(24) if group[t] == slot and t != a] for slot, a in enumerate(anchors)}
    assert members.pop(1) == [3, 5, 9, 10] and members.pop(14) == [7, 8, 16, 17, 18, 19, 21, 23]
    assert not any(members.values())


def test_zoo_prune_vectors(monkeypatch):
    sensitivity = torch.from_numpy(1.5 + np.sin(1.1 * np.arange(24)))[None]
    made = functional.sads(F, sensitivity, keep=12)
    assert made.order[0].tolist() == numbers("7 13 2 18 8 14 12 6 1 0 3 22")

    directions = torch.from_numpy(closed(5, 8)).double()
    directions = directions / directions.norm(dim=1, keepdim=True)
    first, second = torch.nn.Linear(8, 16).double(), torch.nn.Linear(16, 12).double()
    with torch.no_grad():
        first.weight.copy_(0.5 * torch.from_numpy(closed(16, 8)).double())
        second.weight.copy_(0.4 * torch.cos(1.3 * torch.from_numpy(closed(12, 16)).double()))
        first.bias.copy_(torch.cos(torch.arange(16.0, dtype=torch.float64)))
        second.bias.copy_(torch.sin(torch.arange(12.0, dtype=torch.float64)))
    net = torch.nn.Sequential(first, torch.nn.GELU(), second)
    x, h = F.double(), 1e-2
    with torch.no_grad():
        z = net(x)
        differences = [(net(x + h * u) - net(x - h * u)).norm(dim=-1) / (2 * h) for u in directions]
    assert z[0, 0, :3].tolist() == pytest.approx([2.653648, 1.043117, 1.175907], abs=1e-6)
    score = torch.stack(differences).mean(0)
    assert score[0, :4].tolist() == pytest.approx([1.457521, 1.835014, 1.547148, 1.463158], abs=1e-6)
    assert score.sum().item() == pytest.approx(32.084466, abs=1e-5)
    expected = numbers("1 2 16 9 3 5 4 0")
    assert functional.sads(z, score, keep=8).order[0].tolist() == expected

    # the method: it asks for the sensitivity with its own options, and picks among the projected tokens
    asked = {}

    def stand_in(projector, inputs, **options):
        asked.update(options)
        return score.float()

    monkeypatch.setattr(scores.registry, "sensitivity", stand_in)
    tokens = Tokens(z.float(), inputs=x.float()[:, :, None], projector=net)
    method = vtc.ZOOPrune(keep=8, probes=5, step=h, exact=False, seed=3)
    assert method.decide(tokens, 16).order[0].tolist() == expected
    assert asked == {"probes": 5, "step": h, "exact": False, "seed": 3, "mask": None, "hidden": None, "said": None}


def test_dpc_knn_vectors():
    centres, target, _ = ops.dpc_knn(F, 11)
    assert centres[0].tolist() == numbers("20 14 22 19 18 12 17 15 0 1 3")
    cluster = {c: i for i, c in enumerate(centres[0].tolist())}
    expected = numbers("8 9 0 10 2 1 7 2 6 4 9 0 5 3 1 7 2 6 4 3 0 5 2 1")
    assert [cluster[t] for t in target[0].tolist()] == expected
    # ranks: nearest to the centre first
    made = functional.dpc_knn(F, keep=11)
    assert kept(made) == sorted(cluster) and made.order is None
    for line in ("20 2 11", "14 5 23", "22 4 7 16", "19 13", "18 9", "12 21", "17 8", "15 6", "1 10", "0", "3"):
        members = numbers(line)
        assert [made.rank[0, t].item() for t in members] == list(range(len(members)))
        assert len({made.group[0, t].item() for t in members}) == 1
    assert decide("dpc_knn", 11).group.tolist() == made.group.tolist()


# -- the slow definitions: one image, float64, plain lists; max() takes the first of several ---------------------------
def cosines(x):
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    unit = x / np.maximum(norm, 1e-12)
    return unit @ unit.T


def first_best(score, free):
    return max(free, key=lambda j: score[j])


def slow_greedy(kind, x, weight, k, balance=0.5, step=1):
    c, n = cosines(x), len(x)
    if kind == "max_min":
        weight = [-max((c[i, j] for j in range(n) if j != i), default=-2.0) for i in range(n)]
    picked, score = [], list(weight)
    while len(picked) < k:
        free = [j for j in range(n) if j not in picked]
        picked += sorted(free, key=lambda j: -score[j])[: min(step, k - len(picked))]
        m = c[:, picked].max(1)
        score = {"mmr": balance * np.asarray(weight) - (1 - balance) * m, "sads": weight * (1 - m), "max_min": -m}[kind]
    return picked


def slow_dpp(x, r, k):
    """By determinants: the token that makes det L of the picked ones the largest, compared by their ratios."""
    kernel = np.outer(r, r) * cosines(x)
    picked = []
    while len(picked) < k:
        free = [j for j in range(len(x)) if j not in picked]
        base = [p for p in picked if p in independent(kernel, picked)]
        gain = {}
        for j in free:
            left = kernel[j, j]
            if base:
                left -= kernel[j, base] @ np.linalg.solve(kernel[np.ix_(base, base)], kernel[base, j])
            gain[j] = left if left > 1e-5 * kernel[j, j] else 0.0
        picked.append(first_best(gain, free))
    return picked


def independent(kernel, picked):
    """Those picked tokens that added something."""
    base = []
    for j in picked:
        left = kernel[j, j]
        if base:
            left -= kernel[j, base] @ np.linalg.solve(kernel[np.ix_(base, base)], kernel[base, j])
        if left > 1e-5 * kernel[j, j]:
            base.append(j)
    return base


def slow_coverage(x, a, k):
    c, cover, picked = cosines(x), np.zeros(len(x)), []
    while len(picked) < k:
        gain = [a[j] * np.maximum(0, c[j] - cover).sum() for j in range(len(x))]
        picked.append(first_best(gain, [j for j in range(len(x)) if j not in picked]))
        cover = np.maximum(cover, c[picked[-1]])
    return picked


def slow_top(score, k):
    return sorted(range(len(score)), key=lambda j: -score[j])[:k]


def slow_dpc(x, k, neighbors):
    """(centres in order, every token's centre)"""
    n = len(x)
    d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1)) / math.sqrt(x.shape[1])
    near = neighbors if neighbors <= k else min(3, max(k // 2, 1))
    rho = [-sum(sorted(row**2)[:near]) / near for row in d]
    denser = [[j for j in range(n) if (rho[j], -j) > (rho[i], -i)] for i in range(n)]
    delta = [min((d[i, j] for j in denser[i]), default=d.max()) for i in range(n)]
    with np.errstate(divide="ignore"):
        centres = slow_top(rho + np.log(delta), k)
    return centres, [i if i in centres else min(sorted(centres), key=lambda c: d[i, c]) for i in range(n)]


def slow_vispruner(x, a, k, fraction):
    c, n = cosines(x), round(k * fraction)
    n = k - 1 if n >= k > 1 else n
    top = slow_top(a, n)
    rest = [j for j in range(len(x)) if j not in top]
    rest = rest if k > n else []
    while len(rest) > k - n:
        even, odd = rest[::2], rest[1::2]
        drop = min(8, len(rest) // 2, len(rest) - (k - n))
        worst = sorted(even, key=lambda j: -max(c[j, o] for o in odd))[:drop]
        rest = [j for j in rest if j not in worst]
    return top + rest


def slow_hiprune(a, middle, width, k, alpha):
    n, count = len(a), round(k * alpha / 5)
    anchors = slow_top(middle, count or int(k >= 5))
    around = [min(max(i + s, 0), n - 1) for i in anchors for s in (-1, 1, -width, width)]
    return list(dict.fromkeys(anchors + around + slow_top(a, n)))[:k]


def slow_visionzip(keys, a, k):
    c, targets = cosines(keys), min(k, max(1, round(k * 10 / 64)))
    dominant = slow_top(a, k - targets)
    rest = [j for j in range(len(a)) if j not in dominant]
    aims = rest[:: len(rest) // targets][:targets]
    return {j: j if j in aims else max(aims, key=lambda t: c[j, t]) for j in rest} | {j: j for j in dominant}


def slow_dart(x, keys, text, k, pivots=4):
    first = slow_top(np.abs(keys).sum(1), min(pivots, k))
    c = cosines(np.concatenate([x, text[:pivots]]))
    all_pivots = first + [len(x) + t for t in range(len(text[:pivots]))]
    picked, quota = list(first), -(-(k - len(first)) // len(all_pivots))
    for p in all_pivots:
        free = [j for j in range(len(x)) if j not in picked]
        picked += sorted(free, key=lambda j: c[p, j])[: min(quota, k - len(picked))]
    return picked


# -- the same cases for every selector: half of them full of exact ties ------------------------------------------------
CASES = 200
CORNERS = [*np.eye(4), *-np.eye(4), *(np.array(s) for s in [(1, 1, 1, 1), (1, -1, 1, -1), (-1, 1, 1, 1)])]


class Case:
    """A ragged batch of three images and its evidence. In cases with ties the norms are powers of two, cosines and
    scores multiples of 1/8: exact in float32 and float64."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.ties = seed % 2 == 1
        self.grids = [tuple(rng.integers(1, 5, 2)) for _ in range(3)]
        self.lengths = [int(h * w) for h, w in self.grids]
        self.counts = [int(rng.integers(1, n + 1)) for n in self.lengths]
        total, place = max(self.lengths) + 3, rng.integers(0, 3)  # padding in front, in the middle or behind
        shape = (3, total)
        corners = [CORNERS[i] for i in rng.integers(0, len(CORNERS), 3 * total)]
        scale = 2.0 ** rng.integers(-1, 2, (*shape, 1))
        lattice = np.array(corners).reshape(*shape, 4) * scale
        self.x = lattice if self.ties else rng.standard_normal((*shape, 4))
        self.basis = np.eye(4)[rng.integers(0, 4, shape)] * scale if self.ties else rng.standard_normal((*shape, 6))
        self.line = np.zeros((*shape, 4))
        self.line[..., 1] = rng.integers(0, 9, shape)
        self.line = self.line if self.ties else rng.standard_normal((*shape, 4))
        draw = (lambda: rng.integers(1, 9, shape) / 8) if self.ties else (lambda: rng.random(shape) + 0.01)
        self.a, self.b = draw(), draw()
        self.keys = self.x[:, ::-1].copy()
        self.text = rng.standard_normal((3, 5, 4)) if not self.ties else lattice[:, :5].copy()
        self.words = [int(rng.integers(0, min(6, total))) for _ in range(3)]
        self.text = self.text[:, : max(self.words)]
        self.fraction, self.neighbors = float(rng.choice([0.0, 0.25, 0.5, 1.0])), int(rng.integers(1, 7))
        self.step, self.balance = int(rng.integers(1, 4)), float(rng.choice([0.0, 0.25, 0.5, 1.0]))
        self.at = []
        for n in self.lengths:
            rest = total - n
            self.at.append({
                0: np.arange(rest, total),
                1: np.arange(n),
                2: np.sort(rng.permutation(total)[:n]),
            }[int(place)])  # fmt: skip
        self.mask = torch.zeros(shape, dtype=torch.bool)
        for b, at in enumerate(self.at):
            self.mask[b, at] = True

    def tokens(self, x):
        text_mask = torch.arange(self.text.shape[1]) < torch.tensor(self.words)[:, None]
        return everywhere(
            Tokens(
                tensor(x),
                keys=tensor(self.keys),
                mask=self.mask,
                attention=tensor(self.a),
                middle=tensor(self.b),
                text=tensor(self.text),
                text_mask=text_mask,
                grid=tuple((int(h), int(w)) for h, w in self.grids),
            )
        )


def tensor(x):
    return torch.from_numpy(np.ascontiguousarray(x)).float()


def method(name, **options):
    def run(case, x):
        removed = torch.tensor([n - k for n, k in zip(case.lengths, case.counts, strict=True)])
        return vtc.methods.make(name, keep=1.0, **{k: v(case) for k, v in options.items()}).decide(
            case.tokens(x), removed
        )

    return run


def greedy(kind):
    def fast(case, x):
        weight = None if kind == "max_min" else tensor(case.a)
        count = torch.tensor(case.counts)
        return ops.greedy_select(ops.normalize(tensor(x)), weight, count, kind, case.balance, case.step, case.mask)

    def slow(case, x, k, at, b):
        return slow_greedy(kind, x[b, at], case.a[b, at], k, case.balance, case.step)

    return "x", fast, slow


SELECTORS = {
    "mmr": greedy("mmr"),
    "sads": greedy("sads"),
    "max_min": greedy("max_min"),
    "dpp": (
        "basis",
        lambda case, x: ops.dpp_select(ops.normalize(tensor(x)), tensor(case.a), torch.tensor(case.counts), case.mask),
        lambda case, x, k, at, b: slow_dpp(x[b, at], case.a[b, at], k),
    ),
    "scope": ("x", method("scope"), lambda case, x, k, at, b: slow_coverage(x[b, at], case.a[b, at], k)),
    "divprune": ("x", method("divprune"), lambda case, x, k, at, b: slow_greedy("max_min", x[b, at], None, k)),
    "fastv": ("x", method("fastv"), lambda case, x, k, at, b: slow_top(case.a[b, at], k)),
    "norm": ("line", method("norm"), lambda case, x, k, at, b: slow_top((x[b, at] ** 2).sum(1), k)),
    "vispruner": (
        "x",
        method("vispruner", fraction=lambda case: case.fraction),
        lambda case, x, k, at, b: slow_vispruner(x[b, at], case.a[b, at], k, case.fraction),
    ),
    "hiprune": (
        "x",
        method("hiprune", alpha=lambda case: case.fraction),
        lambda case, x, k, at, b: slow_hiprune(case.a[b, at], case.b[b, at], case.grids[b][1], k, case.fraction),
    ),
    "dart": (
        "x",
        method("dart"),
        lambda case, x, k, at, b: slow_dart(x[b, at], case.keys[b, at], case.text[b, : case.words[b]], k),
    ),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_are_their_definitions(name):
    data, fast, slow = SELECTORS[name]
    for seed in range(CASES):
        case = Case(seed)
        x = getattr(case, data)
        made = fast(case, x)
        order = made if isinstance(made, torch.Tensor) else made.order
        for b, (at, k) in enumerate(zip(case.at, case.counts, strict=True)):
            expected = at[slow(case, x, k, at, b)].tolist()
            assert len(set(expected)) == k
            assert [t for t in order[b].tolist() if t >= 0] == expected, (seed, b)
            assert (order[b, k:] == -1).all()
            if not isinstance(made, torch.Tensor):
                assert kept(made, b) == sorted(expected)
                assert made.group[b, sorted(expected)].tolist() == list(range(k))
                assert (made.group[b] >= 0).sum() == k


@pytest.mark.parametrize("name", ["dpc_knn", "visionzip"])
def test_merges_are_their_definitions(name):
    for seed in range(CASES):
        case = Case(seed)
        x = case.line
        run = method(name, **({"neighbors": lambda case: case.neighbors} if name == "dpc_knn" else {}))
        made = run(case, x)
        for b, (at, k) in enumerate(zip(case.at, case.counts, strict=True)):
            if name == "dpc_knn":
                joined = dict(enumerate(slow_dpc(x[b, at], k, case.neighbors)[1]))
            else:
                joined = slow_visionzip(case.keys[b, at], case.a[b, at], k)
            assert kept(made, b) == sorted({int(at[t]) for t in joined.values()}), (seed, b)
            assert len(kept(made, b)) == k
            for token, target in joined.items():
                assert made.anchor[b, made.group[b, at[token]]] == at[target], (seed, b, token)
            assert (made.group[b][~case.mask[b]] == -1).all()
            assert made.size[b].sum() == len(at)


# -- promises ----------------------------------------------------------------------------------------------------------
def evidence(n, batch=2, seed=0, width=16):
    """Every field a selector may read, without ties."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    net = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.GELU(), torch.nn.Linear(24, width)).requires_grad_(
        False
    )
    for p in net.parameters():
        p.copy_(draw(*p.shape))
    inputs = draw(batch, n, 1, 12)
    return everywhere(
        Tokens(
            net(inputs)[:, :, 0],
            keys=draw(batch, n, 8),
            attention=draw(batch, n).exp(),
            middle=draw(batch, n).exp(),
            inputs=inputs,
            projector=lambda x: net(x)[:, :, 0],
            text=draw(batch, 6, width),
            text_mask=torch.arange(6) < torch.tensor([[6], [3]])[:batch],
            grid=((n // 4, 4),) * batch,
            frames=((n,),) * batch,
        )
    )


NEW = [name for name, cls in METHODS.items() if not cls.encoder and not cls.rectangle and cls.budgeted]
VARIANTS = [(name, {}) for name in NEW]
RANKED = [name for name in NEW if issubclass(METHODS[name], Ranked)]  # each of them by each score
VARIANTS += [
    (name, {"importance": score})
    for name in RANKED
    for score in scores.SCORES
    if score != METHODS[name].__dataclass_fields__["importance"].default
]
VARIANTS += [("idpruner", {"normalize": "rank", "step": 3}), ("hiprune", {"alpha": 1.0})]
VARIANTS += [("holov", {"cells": "grid", "inside": "score", "crops": 5}), ("mmtok", {"t_text": 0.01, "alpha": 2.0})]
by_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else str(v))


def pieces(tokens, item, at=slice(None)):
    """One image's tokens, of each field."""
    per_token = ("features", "keys", "attention", "middle", "inputs")
    picked = {name: getattr(tokens, name)[item : item + 1, at] for name in per_token}
    text = {name: getattr(tokens, name)[item : item + 1] for name in ("text", "text_mask")}
    told = {"grid": tokens.grid[item : item + 1], "frames": ((picked["features"].shape[1],),)}
    return everywhere(Tokens(**picked, **text, projector=tokens.projector, **told))


@by_variant
def test_exact_counts_and_the_identity(name, options):
    tokens = evidence(24)
    chosen = vtc.methods.make(name, keep=1.0, **options)
    for r in range(24):
        made = chosen.decide(tokens, r)
        assert made.anchor.shape == (2, 24 - r) and made.mask().all()
        assert (made.anchor.diff(dim=1) > 0).all()
        assert (made.size.sum(1) == (24 if chosen.merges else 24 - r)).all()
        if made.order is not None:
            assert torch.equal(made.order.sort(dim=1).values, made.anchor)
    identity = chosen.decide(tokens, 0)
    assert torch.equal(identity.group, torch.arange(24).expand(2, 24)) and (identity.size == 1).all()


@by_variant
def test_a_batch_is_its_images(name, options):
    tokens = evidence(24)
    chosen = vtc.methods.make(name, keep=1.0, **options)
    together = chosen.decide(tokens, 15)
    for item in range(2):
        alone = chosen.decide(pieces(tokens, item), 15)
        for field in ("group", "anchor", "size", "order", "rank"):
            left, right = getattr(together, field), getattr(alone, field)
            assert left is right is None or torch.equal(left[item], right[0]), field


@by_variant
@pytest.mark.parametrize("where", ["front", "middle", "behind"])
def test_padding_is_invisible(name, options, where):
    tokens, lengths = evidence(24), [24, 16]
    chosen = vtc.methods.make(name, keep=1.0, **options)
    total = 30
    spread = torch.randperm(total, generator=torch.Generator().manual_seed(5))
    fields = {}
    for field in ("features", "keys", "attention", "middle", "inputs"):
        value = getattr(tokens, field)
        fields[field] = torch.full((2, total, *value.shape[2:]), 1e4)
    mask = torch.zeros(2, total, dtype=torch.bool)
    at = []
    for b, n in enumerate(lengths):
        at.append({"front": torch.arange(total - n, total), "behind": torch.arange(n)}.get(where, spread[:n].sort()[0]))
        mask[b, at[b]] = True
        for field in fields:
            fields[field][b, at[b]] = getattr(tokens, field)[b, :n]
    padded = Tokens(
        **fields,
        projector=tokens.projector,
        text=tokens.text,
        text_mask=tokens.text_mask,
        grid=((6, 4), (4, 4)),
        frames=((24,), (16,)),
        mask=mask,
    )
    padded = everywhere(padded)
    for share in (1.0, 0.5, 0.2):
        counts = [max(1, round(n * share)) for n in lengths]
        made = chosen.decide(padded, torch.tensor(lengths) - torch.tensor(counts))
        for b, (n, k) in enumerate(zip(lengths, counts, strict=True)):
            one = pieces(tokens, b, slice(n))
            one = Tokens(**{**vars(one), "grid": ((n // 4, 4),)})
            alone = chosen.decide(one, n - k)
            assert torch.equal(made.group[b, at[b]], alone.group[0])
            assert made.anchor[b, :k].tolist() == at[b][alone.anchor[0]].tolist()
            assert torch.equal(made.size[b, :k], alone.size[0])
            assert (made.anchor[b, k:] == -1).all() and (made.group[b][~mask[b]] == -1).all()
            if alone.order is not None:
                assert made.order[b, :k].tolist() == at[b][alone.order[0]].tolist()


RASTER = ("evs", "hiprune", "holov", "vispruner", "visionzip")  # go by places


@pytest.mark.parametrize("name", [n for n in NEW if n not in RASTER])
def test_the_order_of_the_tokens_does_not_matter(name):
    tokens, order = evidence(40, batch=1), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    chosen = vtc.methods.make(name, keep=1.0)
    made, moved = chosen.decide(tokens, 25), chosen.decide(pieces(tokens, 0, order), 25)
    if made.order is not None:
        assert order[moved.order[0]].tolist() == made.order[0].tolist()
    else:
        assert sorted(order[moved.anchor[0]].tolist()) == made.anchor[0].tolist()


FUNCTIONS = {
    "mmr": lambda x, s, **kw: functional.mmr(x, s, **kw),
    "mmr-rank": lambda x, s, **kw: functional.mmr(x, s, normalize="rank", **kw),
    "mmr-step": lambda x, s, **kw: functional.mmr(x, s, step=4, **kw),
    "sads": lambda x, s, **kw: functional.sads(x, s, **kw),
    "max_min": lambda x, s, **kw: functional.max_min(x, **kw),
    "dpp": lambda x, s, **kw: functional.dpp(x, s, **kw),
    "coverage": lambda x, s, **kw: functional.coverage(x, s, **kw),
    "holov": lambda x, s, **kw: functional.holov(x, s, **kw),
    "dpc_knn": lambda x, s, **kw: functional.dpc_knn(x, **kw),
}
by_function = pytest.mark.parametrize("name", FUNCTIONS)


@by_function
def test_tiles_and_rows_pick_the_same(name, monkeypatch):
    g = torch.Generator().manual_seed(7)
    x, s = torch.randn(2, 70, 12, generator=g), torch.rand(2, 70, generator=g)
    mask = torch.rand(2, 70, generator=g) > 0.2
    expected = [FUNCTIONS[name](x, s, keep=0.4), FUNCTIONS[name](x, s, keep=0.4, mask=mask)]
    for tile in (1, 2 * 70 * 9, 2 * 70 * 70 - 1):
        monkeypatch.setattr(definitions, "_TILE", tile)
        for made, m in zip(expected, (None, mask), strict=True):
            again = FUNCTIONS[name](x, s, keep=0.4, mask=m)
            assert torch.equal(again.group, made.group)
            assert made.order is again.order is None or torch.equal(again.order, made.order)


@by_function
def test_budgets_round(name):
    g = torch.Generator().manual_seed(8)
    x, s = torch.randn(2, 10, 6, generator=g), torch.rand(2, 10, generator=g)
    for n, keep, left in [(5, 0.5, 2), (3, 0.5, 2), (10, 0.25, 2), (10, 0.01, 1), (10, 1.0, 10), (10, 3, 3)]:
        assert FUNCTIONS[name](x[:, :n], s[:, :n], keep=keep).anchor.shape == (2, left)
    mask = torch.arange(10) < torch.tensor([[5], [3]])
    assert FUNCTIONS[name](x, s, keep=0.5, mask=mask).mask().sum(1).tolist() == [2, 2]
    assert FUNCTIONS[name](x, s, keep=3, mask=mask).mask().sum(1).tolist() == [3, 3]
    empty = torch.arange(10) < torch.tensor([[5], [0]])  # an image without tokens
    assert FUNCTIONS[name](x, s, keep=0.5, mask=empty).mask().sum(1).tolist() == [2, 0]
    assert FUNCTIONS[name](x[:, :0], s[:, :0], keep=0.5).anchor.shape == (2, 0)
    with pytest.raises(vtc.OptionError, match="more than the 10 tokens"):
        FUNCTIONS[name](x, s, keep=11)
    with pytest.raises(vtc.OptionError, match="more than the 3 tokens"):
        FUNCTIONS[name](x, s, keep=4, mask=mask)
    with pytest.raises(vtc.OptionError, match="out of range"):
        FUNCTIONS[name](x, s, keep=1.5)


@by_function
def test_bad_numbers_raise(name):
    x, s = torch.randn(1, 10, 6, generator=torch.Generator().manual_seed(0)), torch.ones(1, 10)
    broken = x.clone()
    broken[0, 3, 1] = float("nan")
    with pytest.raises(vtc.InputError, match="NaN"):
        FUNCTIONS[name](broken, s, keep=0.5)
    if name not in ("max_min", "dpc_knn"):
        for bad in (float("nan"), float("inf")):
            with pytest.raises(vtc.InputError, match="NaN"):
                FUNCTIONS[name](x, s.index_fill(1, torch.tensor([2]), bad), keep=0.5)
        with pytest.raises(vtc.InputError, match="like the features"):
            FUNCTIONS[name](x, s[:, :9], keep=0.5)
        padding = torch.arange(10)[None] < 8  # what stands in the padding is nobody's business
        made = FUNCTIONS[name](x, s.index_fill(1, torch.tensor([9]), float("nan")), keep=0.5, mask=padding)
        assert made.mask().sum() == 4
    with pytest.raises(vtc.InputError, match="negative"):
        functional.coverage(x, -s, keep=0.5)


@by_function
def test_degenerate_tokens(name):
    """Copies, zero vectors, constant scores: exactly K different tokens, and always the same."""
    g = torch.Generator().manual_seed(9)
    copies = torch.randn(1, 1, 6, generator=g).expand(1, 12, 6)
    few = torch.randn(1, 3, 6, generator=g).repeat(1, 4, 1)
    for x in (copies, torch.zeros(1, 12, 6), few, torch.cat([few, torch.zeros(1, 2, 6)], 1)):
        for s in (torch.ones(1, x.shape[1]), torch.zeros(1, x.shape[1]), torch.arange(1.0, 1 + x.shape[1])[None]):
            made, again = FUNCTIONS[name](x, s, keep=7), FUNCTIONS[name](torch.cat([x, x]), torch.cat([s, s]), keep=7)
            assert made.anchor.shape == (1, 7) and (made.anchor.diff(dim=1) > 0).all()
            assert torch.equal(again.group, made.group.expand(2, -1))
    if name in ("mmr", "sads", "max_min", "dpp"):  # all alike: by index
        assert FUNCTIONS[name](copies, torch.ones(1, 12), keep=7).order[0].tolist() == list(range(7))


def test_rounding_does_not_order_copies():
    """Once every different token is in, the copies add nothing: they follow by index, not by the noise of a cosine."""
    for seed in range(20):
        few = torch.randn(1, 5, 96, generator=torch.Generator().manual_seed(seed))
        x = few.repeat(1, 4, 1)
        for made in (
            functional.sads(x, torch.ones(1, 20), keep=12),
            functional.max_min(x, keep=12),
            functional.coverage(x, torch.ones(1, 20), keep=12),
            functional.dpp(x, torch.ones(1, 20), keep=12),
        ):
            order = made.order[0].tolist()
            assert {t % 5 for t in order[:5]} == set(range(5))
            assert order[5:] == sorted(order[5:])
        assert functional.max_min(x, keep=1).order[0, 0] == 0  # every token has a nearest one at distance 0
        centres, target, _ = ops.dpc_knn(x, 12)
        assert target[0, centres[0]].tolist() == centres[0].tolist()  # also where two centres coincide


def test_nothing_makes_a_pick_twice():
    """Unchecked, as inside a CUDA graph: whatever the scores are, K different tokens, broken ones last."""
    x = ops.normalize(torch.randn(1, 9, 5, generator=torch.Generator().manual_seed(2)))
    nan, inf = float("nan"), float("inf")
    for values in ([nan] * 9, [inf] * 9, [-inf] * 9, [1, nan, 2, -inf, inf, 0, nan, 3, 4]):
        score = torch.tensor([values])
        picks = [ops.greedy_select(x, score, 9, kind, step=step) for kind in ("mmr", "sads") for step in (1, 2)]
        picks += [ops.dpp_select(x, score, 9), ops.coverage_select(x, score, 9), ops.top_select(score, 9)]
        for order in picks:
            assert sorted(order[0].tolist()) == list(range(9))
    assert ops.top_select(torch.tensor([[1, nan, 2, -inf, inf]]), 5)[0].tolist() == [4, 2, 0, 1, 3]
    holes = x.clone()
    holes[0, 4] = nan
    for kind in ops.selection.SELECTIONS:
        assert sorted(ops.greedy_select(holes, torch.ones(1, 9), 9, kind)[0].tolist()) == list(range(9))


def test_more_than_there_is():
    x = ops.normalize(torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2)))
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    order = ops.greedy_select(x, None, 99, "max_min", mask=mask)
    assert order.shape == (2, 5) and sorted(order[1, :2].tolist()) == [0, 2] and (order[1, 2:] == -1).all()
    assert ops.greedy_select(x, None, 99, "max_min").shape == (2, 5)
    with pytest.raises(ValueError, match="unknown selection"):
        ops.greedy_select(x, None, 2, "best")


def test_lazy_gains_are_all_gains(monkeypatch):
    g = torch.Generator().manual_seed(11)
    x, s = ops.normalize(torch.randn(2, 150, 8, generator=g)), torch.rand(2, 150, generator=g)
    everything = torch.tensor([60, 90])
    expected = {}
    for panel in (150, 1, 7, 32):
        monkeypatch.setattr(ops.selection, "_PANEL", panel)
        expected[panel] = ops.coverage_select(x, s, everything)
    assert all(torch.equal(order, expected[150]) for order in expected.values())


def test_balance_one_is_the_importance():
    g = torch.Generator().manual_seed(3)
    x, s = torch.randn(2, 50, 8, generator=g), torch.randn(2, 50, generator=g)
    for options in ({}, {"normalize": "rank"}, {"normalize": "none"}, {"step": 7}):
        made = functional.mmr(x, s, keep=20, balance=1.0, **options)
        assert torch.equal(made.order, s.argsort(dim=1, descending=True)[:, :20])


def test_ranks_resist_an_outlier():
    g = torch.Generator().manual_seed(4)
    x, s = torch.randn(1, 144, 16, generator=g), torch.randn(1, 144, generator=g)
    spoilt = s.clone()
    spoilt[0, s.argmax()] = 50.0
    for how, same in (("rank", True), ("minmax", False)):
        before, after = (functional.mmr(x, w, keep=36, normalize=how).order for w in (s, spoilt))
        assert torch.equal(before, after) == same
    mask = torch.tensor([[True, False, True, True, True]])
    shares = rank(torch.tensor([[5.0, 9.0, 1.0, 5.0, 7.0]]), mask)
    assert shares[0][mask[0]].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1])


def test_flat_sensitivity_leaves_diversity():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(1, 40, 8, generator=g)
    noise = 3 + 1e-5 * torch.rand(1, 40, generator=g)
    made = functional.sads(x, noise, keep=10)
    assert torch.equal(made.order, functional.sads(x, torch.ones(1, 40), keep=10).order)
    assert made.order[0, 0] == 0
    scaled = torch.rand(1, 40, generator=g)
    assert torch.equal(functional.sads(x, scaled, keep=10).order, functional.sads(x, 7 * scaled, keep=10).order)


def test_cdpruner_goes_by_the_prompt():
    tokens = evidence(40)
    base = vtc.CDPruner(keep=8).decide(tokens, 32)
    near = Tokens(**{**vars(tokens), "text": tokens.features[:, 7:8], "text_mask": None})
    assert (vtc.CDPruner(keep=8).decide(near, 32).order[:, 0] == 7).all()  # the token the prompt speaks of
    assert not torch.equal(vtc.CDPruner(keep=8).decide(near, 32).order, base.order)
    silent = Tokens(**{**vars(tokens), "text": torch.zeros(2, 1, 16), "text_mask": None})
    plain = functional.dpp(tokens.features, torch.ones(2, 40), keep=8)
    assert torch.equal(vtc.CDPruner(keep=8).decide(silent, 32).order, plain.order)


def test_idpruner_takes_what_there_is(tmp_path):
    tokens = evidence(24)
    chosen = vtc.IDPruner(keep=6)
    assert chosen.needs == {"attention"} and chosen.notes(tokens) == "importance: attention"

    def same(tokens, importance):
        assert torch.equal(chosen.decide(tokens, 18).order, functional.mmr(tokens.features, importance, keep=6).order)

    same(tokens, tokens.attention)
    without = Tokens(**{**vars(tokens), "attention": None})
    assert chosen.notes(without) == "importance: sensitivity"
    same(without, scores.sensitivity(without.projector, without.inputs))
    bare = Tokens(tokens.features)
    assert chosen.notes(bare) == "importance: norm"
    same(bare, tokens.features.norm(dim=-1))
    for kind, needs in [("norm", set()), ("sensitivity", {"inputs", "projector"}), ("relevance", {"text"})]:
        fixed = vtc.IDPruner(keep=6, importance=kind)
        assert fixed.needs == needs and fixed.notes(tokens) == ""

    scorer = scores.Scorer(16, 4)
    scores.save_scorer(scorer, tmp_path / "scorer.safetensors")
    for options in ({}, {"importance": "scorer"}):
        trained = vtc.IDPruner(keep=6, scorer=str(tmp_path / "scorer.safetensors"), **options)
        assert trained.needs == set()
        expected = functional.mmr(tokens.features, scorer.score(tokens.features).detach(), keep=6)
        assert torch.equal(trained.decide(tokens, 18).order, expected.order)


NEEDED = [(name, field) for name in NEW for field in sorted(METHODS[name](keep=0.5).needs) if name != "idpruner"]
NEEDED += [("idpruner", "attention"), ("idpruner", "text"), ("idpruner", "projector"), ("idpruner", "inputs")]


@pytest.mark.parametrize(("name", "field"), NEEDED)
def test_missing_evidence_is_named(name, field):
    options = {"attention": "attention", "text": "relevance"}.get(field, "sensitivity")
    chosen = vtc.methods.make(name, keep=0.5, **({"importance": options} if name == "idpruner" else {}))
    with pytest.raises(vtc.OptionError, match=rf"{name}.* needs .*Tokens\.{field}.*choose"):
        chosen.decide(Tokens(**{**vars(evidence(24)), field: None}), 12)


@pytest.mark.parametrize("name", [n for n in NEW if n not in ("divprune", "dpc_knn", "evs", "vidcom2")])
def test_broken_evidence_raises(name):
    tokens = evidence(24)
    spoilt = dict(vars(tokens))
    for field in ("features", "keys", "attention", "middle", "inputs", "text"):
        spoilt[field] = getattr(tokens, field).clone()
        spoilt[field][1, 2] = float("nan")
    with pytest.raises(vtc.InputError, match="NaN|finite"):
        vtc.methods.make(name, keep=0.5).decide(everywhere(Tokens(**spoilt)), 12)


def test_hiprune_wants_the_whole_grid():
    with pytest.raises(vtc.OptionError, match="all tokens of each image"):
        vtc.HiPrune(keep=0.5).decide(Tokens(**{**vars(evidence(24)), "grid": ((5, 5), (5, 5))}), 12)


BAD = [
    ("idpruner", {"balance": 1.5}, r"balance=1.5: it takes a number in \[0, 1\]"),
    ("idpruner", {"balance": float("nan")}, "balance=nan"),
    ("idpruner", {"step": 0}, "step=0: it takes a whole number >= 1"),
    ("idpruner", {"importance": "gut"}, "importance='gut' is unknown"),
    ("idpruner", {"normalize": "softmax"}, "normalize='softmax' is unknown"),
    ("idpruner", {"importance": "scorer"}, "needs scorer="),
    ("idpruner", {"importance": "norm", "scorer": "x"}, "contradict"),
    ("fastv", {"scorer": "x"}, "inside it"),
    ("zoo_prune", {"importance": "norm", "probes": 8}, "probes= belongs to the sensitivity"),
    ("zoo_prune", {"probes": 0}, "probes=0"),
    ("zoo_prune", {"probes": 1.5}, "probes=1.5"),
    ("zoo_prune", {"step": 0}, "step=0"),
    ("zoo_prune", {"exact": "yes"}, "exact='yes' is unknown"),
    ("scope", {"alpha": -1}, "alpha=-1"),
    ("vispruner", {"fraction": 1.1}, "fraction=1.1"),
    ("hiprune", {"alpha": 2}, "alpha=2"),
    ("holov", {"crops": 0}, "crops=0: it takes a whole number >= 1"),
    ("holov", {"cells": "circles"}, "cells='circles' is unknown; choose one of runs, grid"),
    ("holov", {"inside": "luck"}, "inside='luck' is unknown"),
    ("mmtok", {"t_text": 0}, "t_text=0, t_vision=0.2: a temperature is a number > 0"),
    ("mmtok", {"t_vision": -1}, "t_vision=-1: it takes a number >= 0"),
    ("mmtok", {"alpha": -0.5}, "alpha=-0.5"),
    ("dpc_knn", {"neighbors": 0}, "neighbors=0"),
    ("fastv", {"layer": -1}, "layer=-1"),
    ("dart", {"pivots": True}, "pivots=True"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_options_say_what_was_wrong(name, options, message):
    with pytest.raises(vtc.OptionError, match=message):
        vtc.methods.make(name, keep=0.5, **options)


def test_what_they_say_of_themselves(tmp_path):
    for name in NEW:
        chosen = METHODS[name](keep=0.5)
        assert chosen.name == name and chosen.summary and not chosen.halves and chosen.one_shot
        assert not chosen.encoder and chosen.merges == (name in ("visionzip", "dpc_knn", "flashvid"))
        assert isinstance(chosen, Selector) != chosen.merges
        assert getattr(chosen, "in_decoder", False) == (name in ("fastv", "dart"))
        assert getattr(vtc, type(chosen).__name__) is type(chosen)
        vtc.save_config(chosen, tmp_path / f"{name}.json")
        assert vtc.load_config(tmp_path / f"{name}.json") == chosen


# -- where a score can be had ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "importance", "what"),
    [
        ("idpruner", "prompt_attention", "the input of a multimodal LLM's decoder does not give"),
        ("fastv", "sensitivity", "a layer of a multimodal LLM's decoder does not give"),
        ("fastv", "relevance", "a layer of a multimodal LLM's decoder does not give"),
        ("visionzip", "middle_attention", ""),
        ("scope", "relevance", ""),
        ("fastv", "norm", ""),
    ],
)
def test_scores_are_had_or_refused(name, importance, what):
    import mllm_zoo

    model = mllm_zoo.build("llava")
    method = vtc.methods.make(name, keep=0.5, importance=importance)
    if what:
        with pytest.raises(vtc.UnsupportedModelError, match=what):
            vtc.compress(model, method)
        return
    with vtc.compress(model, method) as handle, torch.no_grad():
        model(**mllm_zoo.inputs("llava", "ragged"))
        assert list(handle.report.after) == [round(count / 2) for count in handle.report.before]


def test_a_method_that_reads_what_nobody_gives_is_refused():
    class Curious(vtc.DivPrune):
        needs = frozenset({"mood"})

    import mllm_zoo

    with pytest.raises(vtc.UnsupportedModelError, match="reads mood, which the input of"):
        vtc.compress(mllm_zoo.build("llava"), Curious(keep=0.5))


def test_old_names_still_work_for_one_version(tmp_path):
    path = tmp_path / "scorer.safetensors"
    with pytest.warns(DeprecationWarning, match="Scorer"):
        scorer = scores.Selector(16, 4)
    with pytest.warns(DeprecationWarning, match="save_scorer"):
        scores.save_selector(scorer, path)
    with pytest.warns(DeprecationWarning, match="load_scorer"):
        assert torch.equal(scores.load_selector(path).query.weight, scorer.query.weight)
    with pytest.warns(DeprecationWarning, match='importance="scorer"'):
        method = vtc.IDPruner(keep=6, importance="selector", scorer=str(path))
    assert method == vtc.IDPruner(keep=6, importance="scorer", scorer=str(path))
    with pytest.warns(DeprecationWarning, match="train_scorer"):
        from vtc.train import train_selector
    assert train_selector is vtc.train.train_scorer
    with pytest.raises(AttributeError, match="nothing"):
        _ = scores.nothing
