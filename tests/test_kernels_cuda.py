"""The CUDA kernels without a GPU: run on the CPU by a shim against the definitions in torch, and under the sanitizers.
What only a GPU can show is in test_kernels_gpu.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import cuda_shim
import pytest
import sanitizers
import torch
from torch import Tensor

from vtc.ops import definitions, selection
from vtc.scores.attention import attention_received

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the CUDA kernels for the CPU")
SHAPES = [(1, 1, 1), (2, 3, 5), (1, 65, 111), (3, 97, 59), (2, 130, 64)]
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> cuda_shim.Kernels:
    return cuda_shim.Kernels(cuda_shim.build(tmp_path_factory.mktemp("shim") / "kernels.so", "-fopenmp"))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return definitions.normalize(draw(*shape, seed=seed))


def masks(batch: int, tokens: int) -> list[Tensor | None]:
    """None; ragged, the last image all padding where there are several."""
    real = torch.arange(tokens) < torch.tensor([max(1, tokens - 3 - 3 * b) for b in range(batch)])[:, None]
    if batch > 1:
        real[-1] = False
    return [None, real]


def near(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """At most twice torch's own largest error against float64, or a few roundings of a result of this size."""
    finite = exact.isfinite()
    assert torch.equal(finite, ours.isfinite())
    error, own = (ours.double() - exact)[finite].abs(), (torchs.double() - exact)[finite].abs()
    if error.numel():
        rounding = torch.finfo(ours.dtype).eps * max(1e-30, float(exact[finite].abs().max()))
        assert float(error.max()) <= max(2 * float(own.max()), 4 * rounding)


@pytest.mark.parametrize("form", definitions.ENERGIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_energy(kernels: cuda_shim.Kernels, form: str, shape: tuple[int, int, int]) -> None:
    x = unit(*shape)
    x[0, shape[1] // 2] = 0
    for mask in masks(*shape[:2]):
        args = (form, 0.4, 0.7, mask)
        near(kernels.energy(x, *args), definitions.energy(x, *args), definitions.energy(x.double(), *args))


def test_a_token_is_exactly_itself(kernels: cuda_shim.Kernels) -> None:
    for width in (3, 37, 200):
        assert bool((kernels.energy(unit(60, 1, width), "elu", 0.5) == 0.5).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_half_tokens(kernels: cuda_shim.Kernels, dtype: torch.dtype) -> None:
    x = unit(2, 67, 48).to(dtype)
    near(
        kernels.energy(x, "elu"), definitions.energy(x.float(), "elu", 0.5), definitions.energy(x.double(), "elu", 0.5)
    )
    a, b = torch.arange(0, 66, 2).expand(2, -1), torch.arange(1, 67, 2).expand(2, -1)
    for ours, theirs in zip(kernels.match(x, a, b), kernels.match(x.float(), a, b), strict=True):
        assert torch.equal(ours, theirs)
    each = torch.tensor([9, 5])
    for kind in selection.SELECTIONS:
        ours = kernels.greedy_select(x, draw(2, 67), each, 9, kind)
        assert torch.equal(ours, selection.greedy_select(x.float(), draw(2, 67), each, kind))
    ours, theirs = kernels.dpc_knn(x, each, 9), selection.dpc_knn(x.float(), each)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_pairs_of_tokens_tie(kernels: cuda_shim.Kernels) -> None:
    """Two mutual nearest neighbours have the same energy to the last bit, wherever they lie in the tiles."""
    energy = kernels.energy(unit(1, 150, 40), "nearest")[0]
    assert len(energy.unique()) < len(energy)
    similarity = unit(1, 150, 40)[0] @ unit(1, 150, 40)[0].T
    nearest = similarity.fill_diagonal_(-2).argmax(1)
    mutual = nearest[nearest] == torch.arange(150)
    assert torch.equal(energy[mutual], energy[nearest][mutual])


@pytest.mark.parametrize("shape", SHAPES)
def test_match(kernels: cuda_shim.Kernels, shape: tuple[int, int, int]) -> None:
    batch, tokens, _ = shape
    x = unit(*shape)
    order = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1)).argsort(1)
    a, b = order[:, : tokens // 2].sort(1).values, order[:, tokens // 2 :].sort(1).values
    for b_valid in (None, torch.arange(b.shape[1]) % 3 != 1, torch.zeros(b.shape[1], dtype=torch.bool)):
        valid = None if b_valid is None else b_valid.expand(b.shape)
        best, at = kernels.match(x, a, b, valid)
        scores = (
            x.gather(1, a[..., None].expand(-1, -1, shape[2])) @ x.gather(1, b[..., None].expand(-1, -1, shape[2])).mT
        )
        scores = scores if valid is None else scores.masked_fill(~valid[:, None], float("-inf"))
        expected = scores.max(2)
        torch.testing.assert_close(best, expected.values, atol=1e-6, rtol=1e-6)
        assert shape[2] == 1 or torch.equal(at, expected.indices)  # in one dimension all similarities tie


def test_matches_tie_to_the_lowest(kernels: cuda_shim.Kernels) -> None:
    x = torch.zeros(1, 200, 8)
    x[..., 0] = 1
    best, at = kernels.match(x, torch.arange(50)[None], torch.arange(50, 200)[None])
    assert bool((best == 1).all()) and bool((at == 0).all())
    valid = (torch.arange(150) > 70)[None]
    assert bool((kernels.match(x, torch.arange(50)[None], torch.arange(50, 200)[None], valid)[1] == 71).all())


@pytest.mark.parametrize("sources", [1, 5, 300])
def test_top_pairs(kernels: cuda_shim.Kernels, sources: int) -> None:
    best = (4 * draw(3, sources)).round() / 4  # with ties
    best[0, 0], best[1, sources // 2], best[2] = float("nan"), float("-inf"), float("inf")
    at, a, b = (torch.arange(3 * sources).view(3, -1) * step % sources for step in (7, 3, 5))
    for most in (0, 1, sources // 2, sources):
        for each in (None, torch.tensor([most, 2, 0])):
            for valid in masks(3, sources):
                args = (best, at, a, b, each, most, valid)
                for ours, theirs in zip(kernels.top_pairs(*args), definitions.top_pairs(*args), strict=True):
                    torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [None, *((form, 0.5, 0.7) for form in definitions.ENERGIES)], ids=str)
def test_pair_round(kernels: cuda_shim.Kernels, form: tuple | None, shape: tuple[int, int, int]) -> None:
    x = draw(*shape[:2], max(3, shape[2]))  # in one dimension all similarities tie
    for prefix, half, protect in ((0, False, False), (1, False, True), (1, True, False)):
        if prefix > shape[1] or (form is None and (half or protect)):
            continue
        for weight in (None, draw(*shape[:2]).abs().ceil()):
            for r in {0, (shape[1] - prefix) // 5, (shape[1] - prefix) // 2}:
                args = (x, weight, r, prefix, form, half, protect)
                made, expected = kernels.pair_round(*args), definitions.pair_round(*args)
                for ours, theirs in zip(made, expected, strict=True):
                    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rows(kernels: cuda_shim.Kernels, dtype: torch.dtype) -> None:
    x, at = draw(2, 19, 70).to(dtype), torch.arange(2 * 41).view(2, -1) % 20 - 1
    assert torch.equal(kernels.rows(x, at), definitions.rows(x, at))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("sizes", [(2, 1, 1, 1), (3, 50, 7, 19), (1, 97, 130, 40), (1, 1500, 33, 3)])
def test_merge(kernels: cuda_shim.Kernels, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> None:
    batch, tokens, width, slots = sizes  # the last: more members in a block than its list holds
    x = draw(batch, tokens, width).to(dtype)
    group = torch.randint(-1, max(1, slots - 1), (batch, tokens), generator=torch.Generator().manual_seed(2))
    for weight in (None, draw(batch, tokens).abs()):
        exact = x.double().requires_grad_()
        definition, double = x.clone().requires_grad_(), None if weight is None else weight.double()
        theirs, truth = definitions.merge(definition, group, slots, weight), _merge64(exact, group, slots, double)
        ours = kernels.merge(x, group, slots, weight)
        near(ours, theirs.detach(), truth.detach())
        assert torch.equal(ours, kernels.merge(x, group, slots, weight))
        grad = draw(batch, slots, width, seed=5).to(dtype)
        theirs.backward(grad)
        truth.backward(grad.double())
        assert definition.grad is not None and exact.grad is not None
        near(kernels.merge_backward(grad, group, weight, slots), definition.grad, exact.grad)


def _merge64(x: Tensor, group: Tensor, slots: int, weight: Tensor | None) -> Tensor:
    share = torch.nn.functional.one_hot(group + 1, slots + 1)[..., 1:].double()
    share = share if weight is None else share * weight[..., None]
    return (share / share.sum(1, keepdim=True).clamp(min=1e-12)).mT @ x


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("kind", selection.SELECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_select(kernels: cuda_shim.Kernels, kind: str, step: int, shape: tuple[int, int, int]) -> None:
    batch, tokens, _ = shape
    x, importance = unit(*shape), draw(batch, tokens).abs()
    wanted = torch.tensor([max(1, tokens // 4), 2, 11][:batch])
    for mask in masks(batch, tokens):
        most, maybe = selection.budget(x, wanted, mask)
        each = torch.full((batch,), most) if maybe is None else maybe
        args = (x, importance, each, most, kind, 0.3, step, mask)
        expected = selection.greedy_select(x, importance, wanted, kind, 0.3, step, mask)
        assert torch.equal(kernels.greedy_select(*args), expected)
        assert torch.equal(kernels.greedy_select(*args, table=x @ x.mT), expected)


@pytest.mark.parametrize("kind", selection.SELECTIONS)
def test_greedy_ties_and_what_is_not_a_number(kernels: cuda_shim.Kernels, kind: str) -> None:
    x = unit(1, 70, 16)[:, torch.arange(140) % 70]  # every token twice
    importance = torch.full((1, 140), 0.5)
    importance[0, 3], importance[0, 5], importance[0, 7] = float("nan"), float("-inf"), float("inf")
    expected = selection.greedy_select(x, importance, 140, kind)
    assert torch.equal(kernels.greedy_select(x, importance, torch.tensor([140]), 140, kind), expected)
    assert sorted(expected[0].tolist()) == list(range(140))


def test_greedy_above_shared_memory(kernels: cuda_shim.Kernels) -> None:
    x, importance = unit(1, 9700, 2), draw(1, 9700)
    ours = kernels.greedy_select(x, importance, torch.tensor([3]), 3, "mmr")
    assert torch.equal(ours, selection.greedy_select(x, importance, 3, "mmr"))


@pytest.mark.parametrize("shape", SHAPES)
def test_dpp_select(kernels: cuda_shim.Kernels, shape: tuple[int, int, int]) -> None:
    batch, tokens, _ = shape
    x, relevance = unit(*shape), draw(batch, tokens).abs() + 0.1
    wanted = torch.tensor([max(1, tokens // 4), 2, 11][:batch])
    for mask in masks(batch, tokens):
        most, maybe = selection.budget(x, wanted, mask)
        each = torch.full((batch,), most) if maybe is None else maybe
        expected = selection.dpp_select(x, relevance, wanted, mask)
        assert torch.equal(kernels.dpp_select(x, relevance, each, most, mask), expected)
        assert torch.equal(kernels.dpp_select(x, relevance, each, most, mask, x @ x.mT), expected)


def test_dpp_select_when_all_is_spanned(kernels: cuda_shim.Kernels) -> None:
    x = unit(1, 40, 4)
    ours = kernels.dpp_select(x, torch.ones(1, 40), torch.tensor([12]), 12)
    expected = selection.dpp_select(x, torch.ones(1, 40), 12)
    assert torch.equal(ours, expected)
    rest = expected[0, 4:].tolist()
    assert rest == sorted(rest)


@pytest.mark.parametrize("shape", SHAPES)
def test_dpc_knn(kernels: cuda_shim.Kernels, shape: tuple[int, int, int]) -> None:
    batch, tokens, _ = shape
    x = draw(*shape)
    wanted = torch.tensor([max(1, tokens // 4), 2, 11][:batch])
    for mask in masks(batch, tokens):
        for neighbors in (1, 5, tokens + 9):
            most, maybe = selection.budget(x, wanted, mask)
            each = torch.full((batch,), most) if maybe is None else maybe
            order, target, distance = kernels.dpc_knn(x, each, most, neighbors, mask)
            expected = selection.dpc_knn(x, wanted, neighbors, mask)
            assert torch.equal(order, expected[0])
            assert torch.equal(target, expected[1].masked_fill(expected[1] >= tokens, -1))
            torch.testing.assert_close(distance, expected[2], atol=1e-6, rtol=1e-5)


def test_dpc_knn_with_copies(kernels: cuda_shim.Kernels) -> None:
    x = draw(1, 30, 12)[:, torch.arange(90) % 30]
    x[:, 60:] *= 1 + 1e-7  # one rounding away from a copy
    for count in (20, 90):
        order, target, distance = kernels.dpc_knn(x, torch.tensor([count]), count)
        expected = selection.dpc_knn(x, count)
        assert torch.equal(order, expected[0]) and torch.equal(target, expected[1])
        assert torch.equal(distance == 0, expected[2] == 0)
        torch.testing.assert_close(distance, expected[2], atol=1e-6, rtol=1e-5)
    assert torch.equal(target[0], torch.arange(90))  # a centre that lies on another one is its own


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 4, 2, 67, 33), (2, 2, 2, 130, 16)])
def test_received(kernels: cuda_shim.Kernels, dtype: torch.dtype, sizes: tuple[int, int, int, int, int]) -> None:
    batch, heads, key_heads, tokens, width = sizes
    query, key = 3 * draw(batch, heads, tokens, width), draw(batch, key_heads, tokens, width, seed=1)
    query, key, scale = query.to(dtype), key.to(dtype), width**-0.5
    for mask in masks(batch, tokens):
        ours, theirs = kernels.received(query, key, scale, mask), attention_received(query, key, mask=mask)
        near(ours, theirs, _received64(query, key, mask))
    some = kernels.received(query[:, :, ::3], key, scale)
    torch.testing.assert_close(some, _received64(query[:, :, ::3], key, None).float(), atol=1e-5, rtol=1e-5)


def _received64(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ keys.mT * query.shape[3] ** -0.5
    if mask is None:
        return logits.softmax(3).sum(2).mean(1)
    share = logits.masked_fill(~mask[:, None, None], float("-inf")).softmax(3).nan_to_num(0.0)
    return (share * mask[:, None, :, None]).sum(2).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_probe_norms(kernels: cuda_shim.Kernels, dtype: torch.dtype) -> None:
    difference = draw(5, 2, 19, 111).to(dtype)
    exact = difference.double().norm(dim=-1).sum(0) / (2 * 0.01 * 5)
    near(kernels.probe_norms(difference, 0.01), difference.float().norm(dim=-1).sum(0) / (2 * 0.01 * 5), exact)


@pytest.mark.parametrize("tokens", [1, 19, 200])
def test_minmax(kernels: cuda_shim.Kernels, tokens: int) -> None:
    scores, mask = draw(3, tokens), draw(3, tokens, seed=1) > -0.5
    mask[:, 0] = True
    for real in (None, mask):
        expected = definitions.minmax(scores, real, eps=1e-6, floor=1e-6)
        assert torch.equal(kernels.minmax(scores, real, 1e-6, 1e-6), expected)


def test_a_batch_gives_what_its_images_give(kernels: cuda_shim.Kernels) -> None:
    """Though a batch gets tiles of 64 rows and an image alone tiles of 16."""
    x, each = unit(4, 40, 30), torch.full((4,), 3)
    energy, (order, target, _) = kernels.energy(x, "elu"), kernels.dpc_knn(x, each, 3)
    a, b = torch.arange(0, 40, 2).expand(4, -1), torch.arange(1, 40, 2).expand(4, -1)
    best, at = kernels.match(x, a, b)
    for i in range(4):
        alone, here = x[i : i + 1], slice(i, i + 1)
        torch.testing.assert_close(energy[here], kernels.energy(alone, "elu"), atol=0, rtol=1e-6)
        parts = kernels.dpc_knn(alone, each[:1], 3)
        assert torch.equal(order[here], parts[0]) and torch.equal(target[here], parts[1])
        pairs = kernels.match(alone, a[:1], b[:1])
        assert torch.equal(best[here], pairs[0]) and torch.equal(at[here], pairs[1])


def test_nothing_in_nothing_out(kernels: cuda_shim.Kernels) -> None:
    none = torch.zeros(2, 0, dtype=torch.long)
    assert kernels.energy(torch.zeros(2, 0, 4), "elu").shape == (2, 0)
    assert kernels.energy(torch.zeros(0, 3, 4), "elu").shape == (0, 3)
    assert torch.equal(kernels.merge(torch.zeros(2, 0, 4), none, 3), torch.zeros(2, 3, 4))
    assert bool((kernels.match(unit(2, 4, 4), torch.zeros(2, 1).long(), none)[0] == float("-inf")).all())
    assert bool((kernels.dpc_knn(draw(1, 4, 4), torch.tensor([0]), 0)[1] == -1).all())


@pytest.mark.slow
@pytest.mark.skipif(not sanitizers.there(), reason="g++ has no sanitizers here")
def test_sanitizers(tmp_path: Path) -> None:
    """10,000 random calls, with buffers of exactly the size they may touch; first, planted overflows must be seen."""
    library = cuda_shim.build(tmp_path / "sanitized.so", "-DVTC_SHIM_SERIAL", *sanitizers.FLAGS)

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, cuda_shim.__file__, str(library), *arguments]
        return subprocess.run(command, env=sanitizers.environment(), capture_output=True, text=True, timeout=600)

    for planted, what in (("overflow", "heap-buffer-overflow"), ("shared", "overflow|out of bounds")):
        ran = call(planted)
        assert ran.returncode and any(w in ran.stderr for w in what.split("|")) and "overflow_kernel" in ran.stderr
    ran = call("10000", "1")
    assert ran.returncode == 0 and "clean" in ran.stdout, ran.stderr[-4000:]


def test_the_shim_refuses_barriers_that_part_of_a_block_skips(kernels: cuda_shim.Kernels) -> None:
    code = f"import ctypes; ctypes.CDLL({kernels.library._name!r}).shim_divergent((ctypes.c_float * 1)())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode and "different barriers" in ran.stderr
