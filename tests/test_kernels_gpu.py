"""The operators on a GPU, compiled and through CuPy, against the definitions on the same device. `make gpu-check`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vtc.ops import cupy, definitions, selection
from vtc.scores.attention import attention_received

pytestmark = pytest.mark.gpu
SHAPES = [(1, 1, 1), (2, 3, 5), (3, 97, 59), (1, 577, 64), (2, 1025, 111), (70, 257, 64)]
ops: Any = torch.ops.vtc
BUILT = sorted(Path(definitions.__file__).parents[1].glob("_cuda.*so"))


@pytest.fixture(params=["cuda", "cupy"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "cupy":
        if importlib.util.find_spec("cupy") is None:
            pytest.skip("no cupy")
        cupy.install()
        yield
        cupy.remove()
        return
    if not BUILT:
        pytest.skip("vtc/_cuda.abi3.so is not built: python setup.py build_ext --inplace")
    torch.ops.load_library(BUILT[0])
    yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).cuda()


def unit(*shape: int) -> Tensor:
    return definitions.normalize(draw(*shape))


def real(batch: int, tokens: int) -> list[Tensor | None]:
    mask = torch.arange(tokens) < torch.tensor([max(1, tokens - 3 * b) for b in range(batch)])[:, None]
    return [None, mask.cuda()]


def near(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    finite = exact.isfinite()
    assert torch.equal(finite, ours.isfinite())
    error, own = (ours.double() - exact)[finite].abs(), (torchs.double() - exact)[finite].abs()
    if error.numel():
        rounding = torch.finfo(ours.dtype).eps * max(1e-30, exact[finite].abs().max().item())
        assert float(error.max()) <= max(2 * float(own.max()), 4 * rounding)


def same(order: Tensor, expected: Tensor) -> Tensor:
    """The images whose picks are equal: all but one in 20; among many images two scores may differ by rounding."""
    equal = (order == expected).all(1)
    assert float(equal.float().mean()) >= 0.95
    return equal


@pytest.mark.parametrize("shape", SHAPES)
def test_energy(shape: tuple[int, int, int]) -> None:
    x = unit(*shape)
    for place, form in enumerate(definitions.ENERGIES):
        for mask in real(*shape[:2]):
            args = (form, 0.4, 0.7, mask)
            near(ops.energy(x, place, *args[1:]), definitions.energy(x, *args), definitions.energy(x.double(), *args))


@pytest.mark.parametrize("shape", SHAPES[2:])
def test_match(shape: tuple[int, int, int]) -> None:
    x, index = unit(*shape), torch.arange(shape[1], device="cuda").expand(shape[0], -1)
    a, b = index[:, ::2], index[:, 1::2]
    for valid in (None, b % 3 != 1):
        best, at = ops.match(x, a, b, valid)
        expected = definitions.best_partner(x, a, b, valid)
        torch.testing.assert_close(best, expected[0], atol=1e-6, rtol=1e-6)
        assert torch.equal(at, expected[1])


@pytest.mark.parametrize("sources", [1, 300, 2000])
def test_top_pairs(sources: int) -> None:
    best, index = (4 * draw(3, sources)).round() / 4, torch.arange(3 * sources, device="cuda").view(3, -1) % sources
    best[1, sources // 2] = float("nan")
    each = torch.tensor([sources, 2, 0], device="cuda")
    for valid in real(3, sources):
        for args in ((None, sources // 2, valid), (each, sources, valid)):
            expected = definitions.top_pairs(best, index, index, index, *args)
            for ours, theirs in zip(ops.top_pairs(best, index, index, index, *args), expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows(dtype: torch.dtype) -> None:
    x, at = draw(2, 97, 70).to(dtype), torch.arange(2 * 141, device="cuda").view(2, -1) % 98 - 1
    assert torch.equal(ops.rows(x, at), definitions.rows(x, at))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_merge(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, tokens, _ = shape
    slots = tokens // 2 + 1
    group = torch.randint(-1, slots, (batch, tokens), generator=torch.Generator().manual_seed(1)).cuda()
    for weight in (None, draw(batch, tokens).abs() + 0.1):
        x, y, z = (draw(*shape).to(dtype).to(t).requires_grad_() for t in (dtype, dtype, torch.float64))
        ours, theirs = ops.merge(x, group, slots, weight), definitions.merge(y, group, slots, weight)
        share = torch.nn.functional.one_hot(group + 1, slots + 1)[..., 1:].double()
        share = share if weight is None else share * weight[..., None]
        exact = (share / share.sum(1, keepdim=True).clamp(min=1e-12)).mT @ z
        near(ours, theirs, exact)
        assert torch.equal(ours, ops.merge(x, group, slots, weight))
        grad = draw(batch, slots, shape[2], seed=9).to(dtype)
        for out in (ours, theirs, exact):
            out.backward(grad.to(out.dtype))
        assert x.grad is not None and y.grad is not None and z.grad is not None
        near(x.grad, y.grad, z.grad)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 4200, 48), (1, 9700, 8)])  # the last two: no table; no shared memory
def test_selections(shape: tuple[int, int, int]) -> None:
    batch, tokens, _ = shape
    x, importance = unit(*shape), draw(batch, tokens).abs() + 0.1
    for mask in real(batch, tokens):
        most, each = selection.budget(x, max(1, min(tokens // 4, 64)), mask)
        each = torch.full((batch,), most, device="cuda") if each is None else each
        for place, kind in enumerate(selection.SELECTIONS):
            for step in (1, 3):
                expected = selection.greedy_select(x, importance, each, kind, 0.3, step, mask)
                same(ops.greedy_select(x, importance, each, most, place, 0.3, step, mask), expected)
        if shape[2] > most:  # else the picks span everything, and rounding decides
            expected = selection.dpp_select(x, importance, each, mask)
            same(ops.dpp_select(x, importance, each, most, mask), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_dpc_knn(shape: tuple[int, int, int]) -> None:
    x = draw(*shape)
    for mask in real(*shape[:2]):
        most, each = selection.budget(x, max(1, shape[1] // 4), mask)
        each = torch.full((shape[0],), most, device="cuda") if each is None else each
        order, target, distance = ops.dpc_knn(x, each, most, 5, mask)
        expected = selection.dpc_knn(x, each, 5, mask)
        equal = same(order, expected[0])
        assert torch.equal(target[equal], expected[1][equal])
        torch.testing.assert_close(distance[equal], expected[2][equal], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 4, 2, 67, 33), (1, 16, 16, 577, 64)])
def test_received(sizes: tuple[int, int, int, int, int]) -> None:
    if not hasattr(ops, "received"):
        pytest.skip("vtc::received has no schema")
    batch, heads, key_heads, tokens, width = sizes
    query, key = 3 * draw(batch, heads, tokens, width), draw(batch, key_heads, tokens, width, seed=1)
    for mask in real(batch, tokens):
        expected = attention_received(query, key, mask=mask)
        torch.testing.assert_close(ops.received(query, key, width**-0.5, mask), expected, atol=1e-5, rtol=1e-5)


def test_probe_norms() -> None:
    if not hasattr(ops, "probe_norms"):
        pytest.skip("vtc::probe_norms has no schema")
    difference = draw(5, 2, 97, 111)
    expected = difference.norm(dim=-1).mean(0) / 0.02
    torch.testing.assert_close(ops.probe_norms(difference, 0.01), expected, atol=1e-5, rtol=1e-5)


def test_minmax() -> None:
    scores = draw(3, 577)
    for mask in real(3, 577):
        expected = definitions.minmax(scores, mask, eps=1e-6)
        torch.testing.assert_close(ops.minmax(scores, mask, 1e-6, 0.0), expected, atol=0, rtol=0)


def test_opcheck() -> None:
    x, index = unit(2, 40, 16), torch.arange(40, device="cuda").expand(2, -1)
    each, group = torch.tensor([7, 5], device="cuda"), index // 2
    check = torch.library.opcheck
    check(ops.energy.default, (x, 0, 0.5, 1.0, None))
    check(ops.match.default, (x, index[:, ::2].contiguous(), index[:, 1::2].contiguous(), None))
    check(ops.top_pairs.default, (x[..., 0].contiguous(), index, index, index, each, 7, None))
    check(ops.rows.default, (x.clone().requires_grad_(), group))
    check(ops.merge.default, (x.clone().requires_grad_(), group, 20, None))
    check(ops.greedy_select.default, (x, draw(2, 40).abs(), each, 7, 0, 0.5, 1, None))
    check(ops.dpp_select.default, (x, draw(2, 40).abs(), each, 7, None))
    check(ops.dpc_knn.default, (x, each, 7, 5, None))


def test_a_greedy_selection_in_a_cuda_graph() -> None:
    x, importance, each = unit(2, 577, 64), draw(2, 577).abs(), torch.tensor([64, 64], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm: cuBLAS takes its workspace, CuPy compiles
        ops.greedy_select(x, importance, each, 64, 0, 0.5, 1, None)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        order = ops.greedy_select(x, importance, each, 64, 0, 0.5, 1, None)
    for seed in (1, 2):
        importance.copy_(draw(2, 577, seed=seed).abs())
        graph.replay()
        assert torch.equal(order, selection.greedy_select(x, importance, 64, "mmr"))


@pytest.mark.parametrize("form", [-1, *range(len(definitions.ENERGIES))])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_pair_round(form: int, shape: tuple[int, int, int]) -> None:
    x, weight = draw(*shape), draw(*shape[:2]).abs().ceil()
    asked = None if form < 0 else (definitions.ENERGIES[form], 0.5, 1.0)
    for prefix, half, protect in ((0, False, False), (1, False, form >= 0), (1, form >= 0, False)):
        r = (shape[1] - prefix) // 4
        made = ops.pair_round(x, weight, r, prefix, form, 0.5, 1.0, half, protect)
        for ours, theirs in zip(made, definitions.pair_round(x, weight, r, prefix, asked, half, protect), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_nothing_as_large_as_all_pairs() -> None:
    x = unit(1, 16384, 64)
    index = torch.arange(16384, device="cuda")[None]
    each, importance = torch.tensor([8], device="cuda"), draw(1, 16384).abs()
    for call in (
        lambda: ops.energy(x, 0, 0.5, 1.0, None),
        lambda: ops.match(x, index[:, ::2].contiguous(), index[:, 1::2].contiguous(), None),
        lambda: ops.merge(x, index // 2, 8192, None),
        lambda: ops.greedy_select(x, importance, each, 8, 2, 0.5, 1, None),
        lambda: ops.dpp_select(x, importance, each, 8, None),
        lambda: ops.dpc_knn(x, each, 8, 5, None),
    ):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 16384**2 // 4


def test_what_does_not_fit_is_said() -> None:
    x = unit(1, 8, 4)
    each = torch.tensor([3], device="cuda")
    for call in (
        lambda: ops.energy(x, 4, 0.5, 1.0, None),
        lambda: ops.energy(x, 0, 0.5, 1.0, torch.ones(1, 7, dtype=torch.bool, device="cuda")),
        lambda: ops.energy(x.double(), 0, 0.5, 1.0, None),
        lambda: ops.merge(x, torch.zeros(1, 8, dtype=torch.int32, device="cuda"), 3, None),
        lambda: ops.greedy_select(x, None, each, 3, 0, 0.5, 1, None),
        lambda: ops.dpc_knn(x, each, 9, 5, None),
    ):
        with pytest.raises(RuntimeError):
            call()
