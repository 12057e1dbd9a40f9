"""How many operators a call takes: on a GPU each is about one launch. Counted as the leaf operators that do work, by
torch's profiler; views and allocations are free."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import vtc
from vtc import functional, ops
from vtc.ops import kernels

timm = pytest.importorskip("timm")

FREE = set(
    "view reshape expand slice select as_strided unsqueeze squeeze transpose permute detach detach_ alias empty "
    "empty_strided empty_like resize_ _reshape_alias narrow t lift_fresh unbind expand_as view_as contiguous to "
    "_to_copy new_empty set_ result_type unflatten flatten".split()
)
BACKENDS = ["torch", *(["cpp"] if kernels._load("cpp") else [])]


@pytest.fixture(params=BACKENDS)
def backend(request):
    ops.set_backend(request.param)
    yield request.param
    ops.set_backend(None)


def works(name):
    return (name.startswith("aten::") and name.removeprefix("aten::") not in FREE) or name.startswith("vtc")


def count(run):
    run()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return sum(works(e.name) and not any(works(c.name) for c in e.cpu_children) for e in seen.events())


@pytest.mark.parametrize(("name", "options", "most"), [
    ("tome", {}, {"cpp": 4, "torch": 26}),
    ("pitome", {"margin": 0.5}, {"cpp": 4, "torch": 43}),
])  # fmt: skip
def test_a_round(backend, name, options, most):
    metric, tokens = torch.randn(1, 577, 64), torch.randn(1, 577, 1024)

    def run():
        token_map = getattr(functional, name)(metric, r=64, prefix=1, **options)
        return token_map.merge(tokens), token_map.size

    assert 3 <= count(run) <= most[backend]


@pytest.mark.skipif("cpp" not in BACKENDS, reason="no kernels here")
def test_a_selection():
    """The picks, and with them the tokens; the definition takes a few operators for every pick."""
    tokens, importance = torch.randn(1, 577, 1024), torch.rand(1, 577)
    ops.set_backend("cpp")
    try:
        assert 3 <= count(lambda: functional.mmr(tokens, importance, keep=64)) <= 11
        assert count(lambda: functional.mmr(tokens, importance, keep=64).gather(tokens)) <= 20
    finally:
        ops.set_backend(None)


@pytest.mark.parametrize(
    ("name", "most"), [("tome", {"cpp": 1.2, "torch": 2.4}), ("pitome", {"cpp": 1.2, "torch": 2.8})]
)
def test_an_encoder(backend, name, most):
    model, image = timm.create_model("vit_small_patch16_224").eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        dense = count(lambda: model(image))
        with vtc.compress(model, name, flops=0.5):
            assert dense < count(lambda: model(image)) <= most[backend] * dense


@pytest.mark.parametrize("name", ["tome", "pitome"])
def test_memory(backend, name):
    """The peak of what torch allocates in one call of a batch: below dense."""
    model, images = timm.create_model("vit_tiny_patch16_224", depth=6).eval(), torch.randn(16, 3, 224, 224)

    def peak():
        model(images)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            model(images)
        events = seen.profiler.kineto_results.events()
        now = most = 0
        for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
            now += size
            most = max(most, now)
        return most

    with torch.no_grad():
        dense = peak()
        with vtc.compress(model, name, flops=0.5):
            assert 0 < peak() < dense
