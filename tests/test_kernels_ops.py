"""The C++ kernels as torch operators: opcheck, graphs, and a sentence for every wrong argument."""

from __future__ import annotations

import ctypes
import gc
import platform
import subprocess
import sys
from typing import ClassVar

import pytest
import torch

import vtc
from vtc import ops
from vtc.ops import kernels

pytestmark = pytest.mark.skipif(not kernels._load("cpp"), reason="the C++ kernels are not built here (no compiler)")


def samples():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 12, 8, generator=generator)
    unit, mask = ops.normalize(x), torch.rand(2, 12, generator=generator) > 0.3
    each, group = torch.tensor([4, 3]), torch.randint(-1, 5, (2, 12), generator=generator)
    a, b = torch.arange(0, 12, 2).expand(2, -1).contiguous(), torch.arange(1, 12, 2).expand(2, -1).contiguous()
    score = torch.rand(2, 12, generator=generator)
    return {
        "energy": (unit, 0, 0.4, 1.0, mask),
        "match": (unit, a, b, None),
        "merge": (x.clone().requires_grad_(), group, 5, score),
        "top_pairs": (score, torch.arange(24).view(2, 12) % 6, group.clamp(min=0), b, torch.tensor([7, 2]), 8, mask),
        "pair_round": (x, score, 3, 1, 0, 0.5, 1.0, False, True),
        "rows": (x.clone().requires_grad_(), group),
        "greedy_select": (unit, score, each, 4, 0, 0.5, 1, mask),
        "dpp_select": (unit, score, each, 4, mask),
        "cosines": (unit, mask),
        "cover_select": (x, score, each, 4, mask, mask[:, :8]),
        "distinct_select": (unit, mask, each),
        "dpc_knn": (x, each, 4, 5, mask),
        "received": (x.view(2, 2, 6, 8), x.view(2, 2, 6, 8), 0.3, mask[:, :6]),
        "probe_norms": (x[:, None], 0.01),
        "minmax": (score, mask, 1e-6, 0.0),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.vtc, name).default, samples()[name])


class Heap(ctypes.Structure):
    """glibc's mallinfo2."""

    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in "arena a b c hblkhd d e uordblks f g".split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("name", samples())
def test_a_call_leaves_no_memory(name):
    """What C++ allocates; Python's own objects are counted in test_robustness.py."""
    read = ctypes.CDLL(None).mallinfo2
    read.restype = Heap
    call, arguments, calls = getattr(torch.ops.vtc, name), samples()[name], 2000

    def used():
        gc.collect()
        heap = read()
        return heap.uordblks + heap.hblkhd

    with torch.no_grad():
        for _ in range(100):
            call(*arguments)
        before = used()
        for _ in range(calls):
            call(*arguments)
        assert used() - before < 4 * calls  # bytes; a string that is left takes 48 a call


def test_compiles_into_one_graph():
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(8))

    def fewer(x):
        token_map = vtc.functional.tome(x, keep=0.75)
        return token_map.merge(x)

    assert ops.backend() == "cpp"
    out = torch.compile(fewer, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(out, fewer(x))


FRESH = """
import torch, vtc

def fewer(x):
    return vtc.functional.tome(x, keep=0.75).merge(x)

x = torch.randn(2, 64, 16)
assert torch.allclose(torch.compile(fewer, fullgraph=True, backend="aot_eager")(x), fewer(x))
assert vtc.ops.backend() == "cpp"
"""


@pytest.mark.slow
def test_compiles_as_the_first_thing_in_a_process():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# -- saying no --------------------------------------------------------------------------------------------------------

BAD = {
    "energy": [
        (0, torch.randn(2, 12), "3 dimensions"),
        (0, torch.randn(2, 12, 8).double(), "wrong type"),
        (1, 4, "unknown energy 4; choose 0 = elu"),
        (4, torch.ones(2, 11, dtype=torch.bool), r"mask is \[2, 11\]"),
        (4, torch.ones(2, 12), "mask has the wrong type"),
    ],
    "match": [
        (1, torch.full((2, 6), 12), "holds 12, but there are 12 tokens"),
        (2, torch.zeros(3, 6).long(), r"b is \[3"),
    ],
    "top_pairs": [
        (0, torch.rand(2, 11), r"at is \[2, 12\]"),
        (1, torch.full((2, 12), 6), "holds 6, but there are 6 tokens"),
        (4, torch.tensor([1, 2, 3]), r"each is \[3\]"),
        (5, 13, "most is 13, but there are 12 pairs"),
        (6, torch.ones(2, 12), "a_valid has the wrong type"),
    ],
    "pair_round": [
        (0, torch.randn(2, 12, 8).double(), "wrong type"),
        (0, torch.randn(2, 12, 2, 8).double(), "wrong type"),
        (0, torch.randn(2, 12, 0, 8), "has no heads"),
        (1, torch.rand(2, 11), r"weight is \[2, 11\]"),
        (2, 6, "r is 6: at most half of the 11 tokens behind the prefix"),
        (3, 13, "prefix is 13, but there are 12 tokens"),
        (4, 4, "unknown energy 4"),
    ],
    "merge": [
        (0, torch.randn(2, 12, 8).double(), "wrong type"),
        (1, torch.full((2, 12), 5), "holds 5, but there are 5 slots"),
        (1, torch.zeros(2, 11).long(), r"weight is \[2, 12\], but should be \[2, 11\]"),
        (2, -1, "slots is -1"),
        (3, torch.rand(2, 11), r"weight is \[2, 11\]"),
    ],
    "rows": [
        (1, torch.full((2, 6), 12), "holds 12, but there are 12 tokens"),
        (1, torch.zeros(3, 6).long(), r"at is \[3"),
        (1, torch.zeros(2, 6), "at has the wrong type"),
    ],
    "greedy_select": [
        (1, None, "need importance"),
        (1, torch.rand(2, 11), r"importance is \[2, 11\]"),
        (2, torch.tensor([1, 2, 3]), r"each is \[3\]"),
        (3, 13, "most is 13, but there are 12 tokens"),
        (4, 3, "unknown selection 3; choose 0 = mmr"),
        (6, 0, "step is 0"),
    ],
    "dpp_select": [(1, torch.rand(2, 11), r"relevance is \[2, 11\]"), (3, -1, "most is -1")],
    "cosines": [(0, torch.randn(12, 8), "3 dimensions"), (1, torch.ones(2, 11).bool(), r"mask is \[2, 11\]")],
    "cover_select": [
        (1, torch.rand(2, 11), r"weight is \[2, 11\]"),
        (3, 13, "most is 13"),
        (4, torch.ones(2, 8).bool(), r"mask is \[2, 8\]"),
        (5, torch.ones(2, 12).bool(), r"items is \[2, 12\], but should be \[2, 8\]"),
    ],
    "distinct_select": [
        (1, torch.ones(2, 11).bool(), r"chosen is \[2, 11\]"),
        (2, torch.tensor([1]), r"each is \[1\]"),
    ],
    "dpc_knn": [(3, 0, "neighbors is 0"), (1, torch.tensor([1.0, 2.0]), "wrong type")],
    "received": [
        (0, torch.randn(2, 3, 6, 8), "3 query heads cannot share 2 key heads evenly"),
        (1, torch.randn(2, 2, 6, 7), "do not fit together"),
        (3, torch.ones(2, 5, dtype=torch.bool), r"mask is \[2, 5\]"),
    ],
    "minmax": [(0, torch.randn(2, 12, 8), "2 dimensions"), (1, torch.ones(2, 11).bool(), r"mask is \[2, 11\]")],
    "probe_norms": [(0, torch.randn(2, 12, 8), "4 dimensions"), (1, 0.0, "step is 0")],
}


@pytest.mark.parametrize(("name", "place", "value", "why"), [(n, *row) for n, rows in BAD.items() for row in rows])
def test_bad_arguments_get_a_sentence(name, place, value, why):
    args = list(samples()[name])
    args[place] = value
    with pytest.raises(RuntimeError, match=why):
        getattr(torch.ops.vtc, name)(*args)


def test_set_backend():
    try:
        ops.set_backend("torch")
        assert ops.backend() == "torch"
        ops.set_backend("cpp")
        assert ops.backend() == "cpp" and ops.backend("cuda") == "torch" and ops.backend("meta") == "torch"
        with pytest.raises(vtc.OptionError, match="choose one of torch, cpp, cuda, cupy"):
            ops.set_backend("triton")
        assert ops.backend() == "cpp"
    finally:
        ops.set_backend(None)
    assert ops.backend() == "cpp"
