"""TokenMap: definitions by loops, and the laws between its operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtc import TokenMap, functional


def features(batch, tokens, width=8, seed=0):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


@st.composite
def maps(draw):
    """A map of any kind, padded or not, composed or not, with the features it was made from."""
    batch, prefix = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    tokens = draw(st.integers(prefix + 1, 24))
    x = features(batch, tokens, seed=draw(st.integers(0, 10**6)))
    mask = None
    if draw(st.booleans()):
        lengths = [draw(st.integers(prefix, tokens)) for _ in range(batch)]
        left = draw(st.booleans())
        index = torch.arange(tokens).flip(0) if left else torch.arange(tokens)
        mask = index < torch.tensor(lengths)[:, None]
    size = torch.randint(1, 5, (batch, tokens)).float() if draw(st.booleans()) else None
    options = {"keep": draw(st.floats(0.05, 1.0)), "prefix": prefix, "mask": mask, "size": size}
    kind = draw(st.sampled_from(["tome", "paper", "elu", "text", "open", "random"]))
    if kind == "tome":
        made = functional.tome(x, **options)
    elif kind == "random":
        made = functional.random(x, **options)
    else:
        form = {"paper": "paper", "elu": "elu", "text": "gaussian", "open": "elu"}[kind]
        split = "half" if kind == "text" else "alternate"
        made = functional.pitome(x, margin=0.3, energy=form, split=split, protect=kind != "open", **options)
    return x, mask, size, prefix, kind, made


@settings(max_examples=150, deadline=None)
@given(maps())
def test_laws(case):
    x, mask, size, prefix, kind, made = case
    batch, tokens = x.shape[:2]
    real = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else mask
    weight = torch.ones(batch, tokens) if size is None else size
    slots = made.anchor.shape[1]
    merged, gathered = made.merge(x), made.gather(x)
    assert merged.shape == gathered.shape == (batch, slots, x.shape[2])
    for b in range(batch):
        group, anchor = made.group[b].tolist(), made.anchor[b].tolist()
        present = [a for a in anchor if a >= 0]
        assert present == sorted(present) and anchor == present + [-1] * (slots - len(present))
        assert made.mask()[b].tolist() == [a >= 0 for a in anchor]
        for token in range(tokens):
            if not real[b, token]:
                assert group[token] == -1 and token not in present
            elif kind != "random":
                assert 0 <= group[token] < len(present)
        first = [t for t in range(tokens) if real[b, t]][:prefix]  # the prefix is alone
        for place, token in enumerate(first):
            assert [t for t in range(tokens) if group[t] == place] == [token]
        for slot, a in enumerate(anchor):
            members = [t for t in range(tokens) if group[t] == slot]
            if a < 0:
                assert not members and made.size[b, slot] == 0 and not merged[b, slot].any()
                continue
            assert a in members
            total = weight[b, members].sum()
            assert made.size[b, slot] == total
            mean = (x[b, members] * weight[b, members, None]).sum(0) / total
            torch.testing.assert_close(merged[b, slot], mean, rtol=1e-4, atol=1e-5)
            assert torch.equal(gathered[b, slot], x[b, a])
            assert sorted(made.rank[b, members].tolist()) == list(range(len(members)))
            assert made.rank[b, a] == 0
        if kind != "random":  # merges conserve the total
            assert made.size[b].sum() == weight[b][real[b]].sum()
    back = made.unmerge(merged)
    for b in range(batch):
        for token in range(tokens):
            slot = made.group[b, token]
            assert torch.equal(back[b, token], merged[b, slot] if slot >= 0 else torch.zeros(x.shape[2]))
    torch.testing.assert_close(made.merge(made.unmerge(merged)), merged, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_compose_is_one_map_after_the_other(seed, padded):
    x = features(2, 21, seed=seed)
    mask = torch.arange(21) < torch.tensor([[21], [13]]) if padded else None
    first = functional.pitome(x, keep=0.7, margin=0.2, mask=mask)
    later = functional.tome(first.merge(x), keep=0.6, mask=first.mask() if padded else None, size=first.size)
    both = first.compose(later)
    torch.testing.assert_close(both.merge(x), later.merge(first.merge(x)), rtol=1e-4, atol=1e-5)
    assert torch.equal(both.gather(x), later.gather(first.gather(x)))
    assert torch.equal(both.size, later.size)
    y = later.merge(first.merge(x))
    assert torch.equal(both.unmerge(y), first.unmerge(later.unmerge(y)))
    # round-robin: all children's first members come before any child's second
    for b in range(2):
        for slot in range(both.anchor.shape[1]):
            members = sorted((t for t in range(21) if both.group[b, t] == slot), key=lambda t: both.rank[b, t])
            turns = [first.rank[b, t].item() for t in members]
            assert turns == sorted(turns)
            starters = [t for t in members if first.rank[b, t] == 0]
            assert [later.rank[b, first.group[b, t]].item() for t in starters] == list(range(len(starters)))


def test_rank_is_nearest_first():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.05], [1.0, 0.4], [1.0, 0.02], [-1.0, 0.0], [1.0, 0.2]]])
    made = functional.tome(x[:, :6], r=2)
    for slot in range(made.anchor.shape[1]):
        members = [t for t in range(6) if made.group[0, t] == slot]
        anchor = made.anchor[0, slot].item()
        near = sorted(
            (t for t in members if t != anchor),
            key=lambda t: -torch.nn.functional.cosine_similarity(x[0, t], x[0, anchor], dim=0),
        )
        assert [t for _, t in sorted((made.rank[0, t].item(), t) for t in members)] == [anchor, *near]


def test_unmerge_nearest_fills_from_the_nearest_kept_token():
    kept = torch.tensor([[False, True, False, False, True, False, False]])
    made = TokenMap.from_anchors(kept)
    y = torch.tensor([[[1.0], [4.0]]])
    assert made.unmerge(y, fill="nearest")[0, :, 0].tolist() == [1, 1, 1, 4, 4, 4, 4]
    assert made.unmerge(y)[0, :, 0].tolist() == [0, 1, 0, 0, 4, 0, 0]
    with pytest.raises(ValueError, match="fill"):
        made.unmerge(y, fill="mean")


def test_gradient_reaches_every_merged_token_and_no_dropped_one():
    x = features(1, 12).requires_grad_()
    merged = functional.tome(x.detach(), keep=0.5)
    (gradient,) = torch.autograd.grad(merged.merge(x).square().sum(), x)
    assert (gradient.abs().sum(-1) > 0).all()
    dropped = functional.random(x.detach(), keep=0.5)
    (gradient,) = torch.autograd.grad(dropped.gather(x).square().sum(), x)
    assert ((gradient.abs().sum(-1) > 0) == (dropped.group >= 0)).all()


def test_gradient_is_right():
    x = features(1, 7, 3).double().requires_grad_()
    token_map = functional.tome(x.detach(), r=3, size=torch.tensor([[1.0, 2, 3, 4, 5, 6, 7]]))
    assert torch.autograd.gradcheck(token_map.merge, x)
    assert torch.autograd.gradcheck(lambda v: token_map.unmerge(token_map.gather(v)), x)


def test_bf16_features_are_accumulated_in_float32():
    x = torch.full((1, 600, 4), 1.001, dtype=torch.bfloat16)
    target = torch.zeros(1, 599, dtype=torch.long)
    pairs = (torch.arange(1, 600)[None], target, torch.ones(1, 599))
    token_map = TokenMap.from_pairs(600, pairs)
    assert token_map.size.item() == 600  # bf16 counts to 256
    assert torch.equal(token_map.merge(x)[0, 0], x[0, 0])


def test_reprs_tell():
    x = features(2, 10)
    assert repr(functional.tome(x, r=3)).startswith("TokenMap(merge: 10 -> 7 tokens, 2 images")
    assert "selection: 10 -> 4 tokens" in repr(functional.random(x, keep=4))
    assert "dropped" in repr(functional.random(x, keep=4))
