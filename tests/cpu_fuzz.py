"""Random calls of the C++ operators through their front door: odd sizes, ties, NaN and infinity, nobody real, counts
beyond the tokens; and one in eight with an argument that does not fit, for which only a sentence will do.

`python tests/cpu_fuzz.py CALLS SEED` makes them with a library that was built with sanitizers from
csrc/cpu/fuzz_test.cpp, after these have seen the faults planted in it.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtc.ops import kernels

SIZES = (0, 1, 2, 3, 4, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97, 127, 128, 129)
ODD = (0.0, -0.0, 1e30, -1e30, 1e-40, float("nan"), float("inf"), float("-inf"))


class Draw(random.Random):
    """Sizes, tensors and how many tokens: everything from one seed."""

    def size(self) -> int:
        return self.choice(SIZES) if self.random() < 0.5 else self.randint(0, 300 if self.random() < 0.05 else 20)

    def floats(self, *shape: int) -> Tensor:
        kind = self.randrange(6)
        if kind == 0:  # many ties
            x = torch.randint(-1, 2, shape).float()
        else:
            x = torch.randn(shape) * (0 if kind == 1 else max(1, shape[-1]) ** -0.5)
        if kind == 2 and x.numel():
            at = torch.randint(x.numel(), (1 + x.numel() // 16,))
            x.view(-1)[at] = torch.tensor(ODD)[torch.randint(len(ODD), at.shape)]
        return self.strided(x)

    def halves(self, *shape: int) -> Tensor:
        return self.floats(*shape).to(self.choice([torch.float32, torch.float16, torch.bfloat16]))

    def strided(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 and self.random() < 0.1 else x

    def numbers(self, low: int, high: int, *shape: int) -> Tensor:
        """Those of [low, high]; none, where there are none."""
        return torch.randint(low, high + 1, shape) if high >= low else torch.zeros((*shape[:-1], 0)).long()

    def mask(self, *shape: int) -> Tensor | None:
        return self.choice([None, torch.rand(shape) < self.choice([0.0, 0.5, 0.9, 1.1])])

    def budget(self, batch: int, tokens: int) -> tuple[Tensor, int]:
        most = self.randint(0, tokens if self.random() < 0.5 else min(tokens, 9))
        return self.numbers(-2, tokens + 3, batch), most


def energy(d: Draw, b: int, n: int, w: int) -> tuple:
    return d.floats(b, n, w), d.randint(0, 3), d.uniform(-0.5, 1.2), d.uniform(0, 2), d.mask(b, n)


def match(d: Draw, b: int, n: int, w: int) -> tuple:
    a, to = (d.numbers(0, n - 1, b, d.randint(0, n)) for _ in range(2))
    return d.floats(b, n, w), a, to, d.mask(*to.shape)


def top_pairs(d: Draw, b: int, n: int, w: int) -> tuple:
    targets, (each, most) = d.randint(1, 20), d.budget(b, n)
    at, a, to = d.numbers(0, targets - 1, b, n), d.numbers(-9, 9, b, n), d.numbers(-9, 9, b, targets)
    return d.floats(b, n), at, a, to, d.choice([None, each]), most, d.mask(b, n)


def pair_round(d: Draw, b: int, n: int, w: int) -> tuple:
    prefix = d.randint(0, min(n, 2))
    how = (d.randint(-1, 3), d.uniform(-0.5, 0.9), d.uniform(0, 2), d.random() < 0.5, d.random() < 0.5)
    metric = d.choice([d.floats(b, n, w), d.floats(b, d.randint(1, 3), n, w).transpose(1, 2)])
    return metric, d.choice([None, d.floats(b, n)]), d.randint(0, (n - prefix) // 2), prefix, *how


def merge(d: Draw, b: int, n: int, w: int) -> tuple:
    slots = d.randint(0, n + 1)
    return d.halves(b, n, w), d.numbers(-1, slots - 1, b, n), slots, d.choice([None, d.floats(b, n)])


def merge_backward(d: Draw, b: int, n: int, w: int) -> tuple:
    slots = d.randint(0, n + 1)
    return d.halves(b, slots, w), d.numbers(-1, slots - 1, b, n), d.choice([None, d.floats(b, n)]), slots


def rows(d: Draw, b: int, n: int, w: int) -> tuple:
    return d.halves(b, n, w), d.numbers(-1, n - 1, b, d.size())


def greedy_select(d: Draw, b: int, n: int, w: int) -> tuple:
    kind = d.randint(0, 2)  # mmr, sads, max_min
    importance = None if kind == 2 else d.floats(b, n)
    each, most = d.budget(b, n)
    return d.floats(b, n, w), importance, each, most, kind, d.uniform(-0.1, 1.1), d.randint(1, 4), d.mask(b, n)


def dpp_select(d: Draw, b: int, n: int, w: int) -> tuple:
    each, most = d.budget(b, n)
    return d.floats(b, n, w), d.floats(b, n), each, most, d.mask(b, n)


def cosines(d: Draw, b: int, n: int, w: int) -> tuple:
    return d.floats(b, n, w), d.mask(b, n)


def cover_select(d: Draw, b: int, n: int, w: int) -> tuple:
    each, most = d.budget(b, n)
    return d.floats(b, n, w), d.choice([None, d.floats(b, n)]), each, most, d.mask(b, n), d.mask(b, w)


def distinct_select(d: Draw, b: int, n: int, w: int) -> tuple:
    return d.floats(b, n, w), torch.rand(b, n) < d.choice([0.0, 0.5, 1.1]), d.numbers(-2, n + 3, b)


def dpc_knn(d: Draw, b: int, n: int, w: int) -> tuple:
    each, most = d.budget(b, n)
    return d.floats(b, n, w), each, most, d.randint(1, d.choice([7, n + 3])), d.mask(b, n)


def received(d: Draw, b: int, n: int, w: int) -> tuple:
    heads, shared, queries = d.randint(1, 2), d.randint(1, 2), d.choice([n, d.size()])
    return d.floats(b, heads * shared, queries, w), d.floats(b, heads, n, w), d.uniform(0, 1), d.mask(b, n)


def probe_norms(d: Draw, b: int, n: int, w: int) -> tuple:
    return d.floats(d.randint(0, 3), b, n, w), d.uniform(0.001, 1)


def minmax(d: Draw, b: int, n: int, w: int) -> tuple:
    return d.floats(b, n), d.mask(b, n), d.choice([0.0, 1e-6]), d.choice([0.0, 1e-6])


CALLS: tuple[Callable[..., tuple], ...] = (
    energy,
    match,
    top_pairs,
    pair_round,
    merge,
    merge_backward,
    rows,
    greedy_select,
    dpp_select,
    cosines,
    cover_select,
    distinct_select,
    dpc_knn,
    received,
    probe_norms,
    minmax,
)
WRONG = {
    "most": (-1, 10**6),
    "slots": (-1,),
    "step": (0, -1, -0.5),
    "neighbors": (0, -3),
    "form": (-2, 4),
    "r": (-1, 10**6),
    "prefix": (-1, 10**6),
    "kind": (-1, 3),
}


ANY = {("top_pairs", "a"), ("top_pairs", "b")}  # numbers that are only handed on


def spoil(d: Draw, operator: str, names: list[str], values: list[Any]) -> None:
    """Make one argument wrong: of another type, a dimension short, an index too large, a number out of its range."""
    at = d.choice([i for i, v in enumerate(values) if isinstance(v, Tensor) or names[i] in WRONG])
    value = values[at]
    if not isinstance(value, Tensor):
        values[at] = d.choice([w for w in WRONG[names[at]] if isinstance(w, type(value))])
    elif value.dtype == torch.long and value.ndim > 1 and value.numel() and d.random() < 0.5:
        if (operator, names[at]) in ANY:
            return spoil(d, operator, names, values)
        value.view(-1)[d.randrange(value.numel())] = d.choice([-2, 10**6, 2**62, -(2**62)])
    elif d.random() < 0.5:
        values[at] = value.sum((0, 1) if value.ndim == 4 else 0)  # a round takes three dimensions or four
    else:
        values[at] = value.to(torch.float64 if value.dtype != torch.float64 else torch.bool)


def picked(name: str, order: Tensor, each: Tensor, mask: Tensor | None, tokens: int) -> None:
    """As many as asked and there, real and all different; -1 behind."""
    for b, row in enumerate(order.tolist()):
        real = set(range(tokens)) if mask is None else set(mask[b].nonzero()[:, 0].tolist())
        count = max(0, min(int(each[b]), len(real), len(row)))
        assert set(row[:count]) <= real and len(set(row[:count])) == count, (name, row, count)
        assert row[count:] == [-1] * (len(row) - count), (name, row, count)


def run(calls: int, seed: int) -> None:
    ops, d = torch.ops.vtc, Draw(seed)
    torch.manual_seed(seed)
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    every = {name[5:] for name in registered if name.startswith("vtc::")}
    assert every == {call.__name__ for call in CALLS}, every  # no operator is forgotten
    order, target, _ = ops.dpc_knn(torch.randn(1, 4099, 2), torch.tensor([9]), 9, 5, None)  # all pairs never at once
    assert order.min() >= 0 and target.min() >= 0
    for _ in range(calls - 1):
        call, n = d.choice(CALLS), d.size()
        name, values = call.__name__, list(call(d, d.randint(0, 3), n, d.size()))
        operator = getattr(ops, name).default
        if d.random() < 1 / 8:
            spoil(d, name, [argument.name for argument in operator._schema.arguments], values)
            try:
                operator(*values)
            except RuntimeError:
                continue
            raise AssertionError(f"{name} took {values}")
        out = operator(*values)
        if name in ("greedy_select", "dpp_select", "cover_select"):
            picked(name, out, values[2], values[4 if name == "cover_select" else -1], n)
        elif name == "dpc_knn":
            picked(name, out[0], values[1], values[-1], n)


def plant() -> None:
    """Every planted fault, each in a process of its own, must end it."""
    (library,) = Path(kernels.__file__).parents[1].glob("_cpp.*so")
    for fault in range(3):
        child = os.fork()
        if child == 0:
            ctypes.CDLL(str(library)).plant(fault)
            os._exit(0)
        assert os.waitpid(child, 0)[1] != 0, f"no sanitizer saw fault {fault}"


if __name__ == "__main__":
    assert kernels.backend() == "cpp"
    plant()
    run(int(sys.argv[1]), int(sys.argv[2]))
    print("clean")
