"""Pooling of multi-vector embeddings: counts, means, forms, and that a page gives the same alone and in a batch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtc
from vtc.errors import InputError, OptionError
from vtc.retrieval import pages as forms
from vtc.retrieval import pool, pooling, ward

NAMES = pooling._names()
MERGING = [name for name in NAMES if pooling.ready(name).merges]
LENGTHS = st.lists(st.sampled_from([0, 1, 2, 3, 7, 24, 31, 32, 64]), min_size=1, max_size=7)


@pytest.fixture(autouse=True, scope="module")
def some_linkage():
    pytest.importorskip("scipy.cluster.hierarchy")


def page(tokens, width=16, seed=0):
    """Unit vectors, neighbours similar, and a third of them nearly equal, like a page's blank patches."""
    generator = torch.Generator().manual_seed(seed * 1000 + tokens)
    x = torch.randn(tokens // 3 + 1, width, generator=generator).repeat_interleave(3, 0)[:tokens]
    x = x + 0.3 * torch.randn(tokens, width, generator=generator)
    x[::3] = x[:1] + 0.05 * torch.randn(len(x[::3]), width, generator=generator)
    return torch.nn.functional.normalize(x, dim=-1)


def expected(x, token_map, normalize=True, merges=True):
    """The rows that a map stands for, in float64."""
    x, group, rows = x.double().numpy(), token_map.group[0].numpy(), []
    for slot, anchor in enumerate(token_map.anchor[0].tolist()):
        row = x[group == slot].mean(0) if merges else x[anchor]
        rows.append(row / np.linalg.norm(row) if normalize else row)
    return np.array(rows).reshape(-1, x.shape[1])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(
    LENGTHS,
    st.sampled_from([1.5, 2, 3, 5, 10.0, 25]),
    st.sampled_from([0, 0, 1, 5]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_counts_means_maps_and_alone(name, lengths, factor, protect, normalize, seed):
    pages = [page(n, seed=seed + i) for i, n in enumerate(lengths)]
    options = {"method": name, "protect": protect, "normalize": normalize, "maps": True}
    pooled, maps = pool(pages, factor, **options)
    merges = name in MERGING
    for x, y, token_map in zip(pages, pooled, maps, strict=True):
        rest = max(0, len(x) - protect)
        assert len(y) == min(len(x), protect) + (max(int(rest // factor), 1) if rest else 0)
        np.testing.assert_allclose(y.double().numpy(), expected(x, token_map, normalize, merges), atol=1e-6)
        if normalize:
            torch.testing.assert_close(y.norm(dim=-1), torch.ones(len(y)), atol=1e-6, rtol=0)
        head = min(protect, len(x))
        torch.testing.assert_close(y[:head], x[:head], atol=1e-6, rtol=0)
        check_map(token_map, len(x), len(y), merges)
        (alone,), (its_map,) = pool([x], factor, **options)
        assert torch.equal(alone, y)
        assert torch.equal(its_map.group, token_map.group)


def check_map(token_map, tokens, slots, merges):
    assert token_map.group.shape == token_map.rank.shape == (1, tokens)
    anchor = token_map.anchor[0]
    assert anchor.shape == (slots,) and (anchor.diff() > 0).all()  # reading order
    assert torch.equal(token_map.group[0, anchor], torch.arange(slots))
    assert (token_map.rank[0, anchor] == 0).all()
    members = torch.stack([(token_map.group[0] == s).sum() for s in range(slots)]) if slots else torch.zeros(0)
    assert torch.equal(token_map.size[0], members.float())
    assert not merges or (token_map.group >= 0).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(LENGTHS, st.sampled_from([2, 3, 10]), st.integers(0, 10**6))
def test_pages_that_share_a_padded_bucket_give_the_same(name, lengths, factor, seed):
    """As on a GPU, but here, where sums have one order. Where two choices are as good, rounding may make the other one:
    then the page alone makes it, too, when its values are moved by a few roundings."""
    pages = [page(n, seed=seed + i) for i, n in enumerate(lengths)]
    noise = torch.Generator().manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "buckets", lambda lengths, which, on_cpu: [which] if which else [])
        together = pool(pages, factor, method=name)
    for x, ours in zip(pages, together, strict=True):
        moved = (x * (1 + scale * torch.randn(x.shape, generator=noise)) for scale in (0, *[1e-6] * 60))
        alone = (pool([y], factor, method=name)[0] for y in moved)
        assert any(
            torch.allclose(y, ours, atol=1e-6 if number == 0 else 1e-5, rtol=0) for number, y in enumerate(alone)
        )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 2000), max_size=40), st.booleans())
def test_buckets(lengths, on_cpu):
    made = forms.buckets(lengths, range(len(lengths)), on_cpu)
    assert sorted(i for bucket in made for i in bucket) == list(range(len(lengths)))
    for bucket in made:
        mine = [lengths[i] for i in bucket]
        assert len(mine) == 1 or 4 * len(mine) * max(mine) ** 2 <= forms.LARGEST
        assert min(mine) >= (max(mine) if on_cpu else max(mine) * 7 / 8)


def test_a_bucket_is_bounded():
    assert {len(bucket) for bucket in forms.buckets([1030] * 200, range(200), True)} == {63, 11}


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.sampled_from(["left", "right", "both"]), st.booleans(), st.sampled_from([1, 3]), st.integers(0, 2))
def test_padded_is_the_list(lengths, side, masked, factor, protect):
    pages, columns = [page(n, seed=i) for i, n in enumerate(lengths)], max(lengths) + 3
    padded = torch.full((len(pages), columns, 16), 7.0 if masked else 0.0)
    mask = torch.zeros(len(pages), columns, dtype=torch.bool)
    for b, x in enumerate(pages):
        start = {"left": columns - len(x), "right": 0, "both": min(2, columns - len(x))}[side]
        padded[b, start : start + len(x)], mask[b, start : start + len(x)] = x, True
    options = {"factor": factor, "protect": protect, "maps": True}
    pooled, maps = pool(padded, mask=mask if masked else None, **options)
    listed, their_maps = pool(pages, **options)
    assert pooled.shape == (len(pages), max(len(y) for y in listed), 16)
    for b, (y, mine, theirs) in enumerate(zip(listed, maps, their_maps, strict=True)):
        assert torch.equal(pooled[b, : len(y)], y) and not pooled[b, len(y) :].any()
        at = mask[b].nonzero()[:, 0]
        assert torch.equal(mine.group[0, at], theirs.group[0]) and (mine.group[0][~mask[b]] == -1).all()
        assert torch.equal(mine.anchor[0], at[theirs.anchor[0]]) and torch.equal(mine.size, theirs.size)
        assert torch.equal(mine.rank[0, at], theirs.rank[0])


def test_an_order_of_picks_goes_along():
    padded = torch.zeros(1, 40, 16)
    padded[0, 10:] = page(30)
    _, (token_map,) = pool(padded, 3, method="divprune", protect=2, maps=True)
    order = token_map.order[0].tolist()
    assert order[:2] == [10, 11] and sorted(order) == token_map.anchor[0].tolist()


def test_nothing_comes_through():
    assert pool([]) == [] and pool([], maps=True) == ([], [])
    assert pool(torch.zeros(0, 5, 8)).shape == (0, 0, 8)
    assert pool(torch.zeros(2, 5, 8)).shape == (2, 0, 8)
    assert pool([torch.zeros(0, 8)])[0].shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name, dtype):
    x = page(50).to(dtype)
    (y,) = pool([x], 3, method=name, protect=1)
    assert y.dtype == dtype and y.shape == (17, 16)
    if name in MERGING:  # the mean and its length are made in float32, and rounded once
        (wide,) = pool([x.float()], 3, method=name, protect=1)
        torch.testing.assert_close(
            y, wide.to(dtype), atol=1e-6 if dtype in (torch.float32, torch.float64) else 0, rtol=0
        )


@pytest.mark.parametrize("name", NAMES)
def test_factor_one_changes_nothing(name):
    x = [3 * page(n) for n in (0, 1, 9)]  # not of length 1, and still not normalised
    for y, same in zip(pool(x, 1, method=name), x, strict=True):
        assert torch.equal(y, same)


@pytest.mark.parametrize("name", NAMES)
def test_identical_vectors(name):
    x = page(1).expand(20, -1)
    (y,) = pool([x], 4, method=name)
    assert y.shape == (5, 16)
    torch.testing.assert_close(y, x[:5])


def test_tokens():
    pages = [page(n) for n in (0, 3, 10, 50)]
    assert [len(y) for y in pool(pages, tokens=10)] == [0, 3, 10, 10]
    assert [len(y) for y in pool(pages, tokens=10, protect=2)] == [0, 3, 10, 12]
    assert [len(y) for y in pool(pages)] == [0, 1, 3, 16]


def test_a_ready_method():
    x = [torch.randn(60, 16, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(pool(x, method=vtc.DPCKNN(keep=1.0))[0], pool(x)[0])
    assert not torch.equal(pool(x, method=vtc.DPCKNN(keep=1.0, neighbors=15))[0], pool(x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_embeddings(name):
    x = page(40).requires_grad_()
    pooled, maps = pool([x], 3, method=name, normalize=False, maps=True)
    weight = torch.randn(pooled[0].shape, generator=torch.Generator().manual_seed(1))
    (pooled[0] * weight).sum().backward()
    rows = weight / maps[0].size[0][:, None]
    group = maps[0].group[0]
    torch.testing.assert_close(x.grad, rows[group].masked_fill((group < 0)[:, None], 0))


@pytest.mark.parametrize("protect", [0, 3])
@pytest.mark.parametrize("factor", [2, 3, 10])
@pytest.mark.parametrize("tokens", [5, 64, 200])
def test_ward_is_scipys(tokens, factor, protect):
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    x = torch.nn.functional.normalize(torch.randn(tokens, 16, generator=torch.Generator().manual_seed(tokens)), dim=-1)
    _, (token_map,) = pool([x], factor, method="ward", protect=protect, maps=True)
    rest = x[protect:]
    apart = squareform((1 - rest @ rest.T).clamp(0, 2).numpy(), checks=False).astype(np.float64)
    labels = fcluster(linkage(apart, "ward"), max(len(rest) // factor, 1), "maxclust")
    assert partition(token_map.group[0, protect:].tolist()) == partition(labels)
    for slot, anchor in enumerate(token_map.anchor[0].tolist()):
        members = (token_map.group[0] == slot).nonzero()[:, 0]
        near = x[members].double() @ x[members].double().mean(0)
        assert near[members == anchor] >= near.max() - 1e-6


def partition(labels):
    return {frozenset(i for i, mine in enumerate(labels) if mine == label) for label in set(labels)}


def test_ward_of_half_is_ward_after_tome():
    x = page(60)
    first = vtc.functional.tome(x[None], r=30)
    assert torch.equal(pool([x], 2, method="tome+ward", maps=True)[1][0].group, first.group)
    half = first.merge(x[None])[0]
    (then,) = pool([half], tokens=6, method="ward", maps=True)[1]
    (both,) = pool([x], 10, method="tome+ward", maps=True)[1]
    assert torch.equal(both.group[0], then.group[0, first.group[0]])


def test_clusters_are_as_many_as_asked_for_where_joins_tie():
    x = torch.eye(6).repeat(2, 1)
    (y,), (token_map,) = pool([x], tokens=4, method="ward", maps=True)
    assert y.shape == (4, 6) and token_map.size.sum() == 12
    _, (pairs,) = pool([x], tokens=6, method="ward", maps=True)  # each token with its copy, the first of which is kept
    assert pairs.anchor[0].tolist() == list(range(6)) and pairs.group[0].tolist() == [*range(6)] * 2


def test_without_a_library_for_ward(monkeypatch):
    for name in ("fastcluster", "scipy.cluster.hierarchy"):
        monkeypatch.setitem(sys.modules, name, None)
    for method in ("ward", "tome+ward"):
        with pytest.raises(OptionError, match="pip install fastcluster"):
            pool([page(9)], method=method)


def test_fastcluster_is_preferred(monkeypatch):
    calls = []

    class Fake:
        @staticmethod
        def linkage(apart, how):
            from scipy.cluster.hierarchy import linkage

            calls.append(how)
            return linkage(apart, how)

    monkeypatch.setitem(sys.modules, "fastcluster", Fake)
    plain = ward.linkage_of()
    assert plain is Fake.linkage
    pool([page(9)], method="ward")
    assert calls == ["ward"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0.5}, "factor=0.5"),
        ({"factor": True}, "factor=True"),
        ({"factor": float("nan")}, "factor=nan"),
        ({"factor": "3"}, "factor='3'"),
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": 2.0}, "tokens=2.0"),
        ({"tokens": 2, "factor": 3}, "give one"),
        ({"protect": -1}, "protect=-1"),
        ({"protect": True}, "protect=True"),
        ({"normalize": 1}, "normalize=1"),
        ({"maps": None}, "maps=None"),
        ({"method": "wart"}, "did you mean 'ward'.*dpc_knn.*tome\\+ward"),
        ({"method": "kmeans"}, "choose one of"),
        ({"method": "visionzip"}, "visionzip reads the attention.*choose one of"),
        ({"method": "cdpruner"}, "text.*choose one of"),
        ({"method": "downsample"}, "rows and columns"),
        ({"method": "fastv"}, "prompt's last word"),
        ({"method": "tome+ppe"}, "positions"),
        ({"method": vtc.DPCKNN(keep=0.5)}, "keep=0.5.*factor="),
        ({"method": vtc.DPCKNN(keep=0.5, events=0.5)}, "DPCKNN\\(keep=1.0\\)"),
        ({"method": vtc.ToMe(keep=1.0, proportional=True)}, "proportional"),
        ({"method": vtc.DivPrune(keep=1.0, frame="rotary")}, "choose one of"),
        ({"method": 3}, "method=3"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        pool([page(9)], **options)


@pytest.mark.parametrize(
    ("embeddings", "mask", "message"),
    [
        (page(9), None, "list of one"),
        ([page(9)[None]], None, r"page 0.*\(1, 9, 16\)"),
        ([page(9), page(9, 8)], None, "page 1 has vectors of width 8"),
        ([page(9), page(9).half()], None, "page 1 has dtype"),
        ([page(9).numpy()], None, "torch.as_tensor"),
        ([page(9), page(9) * torch.nan], None, "page 1 hold NaN"),
        ([page(9).int()], None, "int32"),
        (page(9).int()[None], None, "int32"),
        ([page(9)], torch.ones(1, 9, dtype=torch.bool), "mask="),
        (page(9)[None], torch.ones(1, 8, dtype=torch.bool), "mask must be bool"),
        (page(9)[None], torch.ones(1, 9), "mask must be bool"),
        (None, None, "NoneType"),
    ],
)
def test_input_is_checked(embeddings, mask, message):
    with pytest.raises(InputError, match=message):
        pool(embeddings, mask=mask)


def test_nan_in_padding_is_nobodys():
    x = torch.full((1, 12, 16), torch.nan)
    x[0, :9] = page(9)
    assert torch.equal(pool(x, mask=torch.arange(12)[None] < 9)[0], pool([page(9)])[0])


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="Pooling2"):
        _ = vtc.retrieval.Pooling2


@pytest.mark.parametrize(
    "name, library", [("TokenPooling", "sentence_transformers"), ("TokenPooler", "colpali_engine")]
)
def test_a_missing_library_is_named(name, library, monkeypatch):
    for module in [m for m in sys.modules if m.startswith(("vtc.retrieval.sentence", "vtc.retrieval.colpali"))]:
        monkeypatch.delitem(sys.modules, module)
    for module in [m for m in sys.modules if m.split(".")[0] == library] + [library]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f'pip install "{library.replace("_", "-")}>='):
        getattr(vtc.retrieval, name)


def test_the_import_is_lean():
    code = (
        "import sys, vtc, vtc.retrieval; heavy = {'sentence_transformers', 'colpali_engine', 'scipy', 'fastcluster'}; "
        "assert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
