"""The CUDA kernels on the CPU: csrc/cuda/host_test.cpp built with g++ under the shim, called through ctypes.

`python tests/cuda_shim.py LIBRARY CALLS SEED` makes random calls, without torch, for a library built with sanitizers;
`python tests/cuda_shim.py LIBRARY overflow|shared` makes one that a sanitizer must catch.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
FORMS = {"elu": 0, "paper": 1, "gaussian": 2, "nearest": 3}
_NAMES = "energy match top_pairs pair_round rows merge merge_backward greedy dpp dpc_knn received probes minmax"
OPERATORS = _NAMES.split()
KINDS = {"mmr": 0, "sads": 1, "max_min": 2}


def build(to: Path, *flags: str) -> Path:
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-Wall", "-Werror", *flags]
    subprocess.run([*command, "-o", str(to), str(SOURCES / "host_test.cpp")], check=True)
    return to


class Kernels:
    """The operators with the arguments of their schemas in vtc/ops/backend.py, torch tensors in and out."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def call(self, name: str, *values: Any) -> None:
        import torch

        kept = [v.contiguous() if isinstance(v, torch.Tensor) else v for v in values]
        self.library["shim_" + name](*[_argument(v) for v in kept])

    def energy(self, unit, form, margin=0.5, alpha=1.0, mask=None):
        import torch

        out = torch.empty(unit.shape[:2])
        self.call("energy", _type(unit), unit, mask, out, *unit.shape, FORMS[form], margin, alpha)
        return out

    def match(self, unit, a, b, b_valid=None):
        import torch

        best, at = torch.empty(a.shape), torch.empty_like(a)
        self.call("match", _type(unit), unit, a, b, b_valid, best, at, *unit.shape, a.shape[1], b.shape[1])
        return best, at

    def top_pairs(self, best, at, a, b, each, most, a_valid=None):
        import torch

        pairs, score = torch.empty(2, len(at), most, dtype=torch.long), torch.empty(len(at), most)
        sizes = (*at.shape, b.shape[1], most)
        self.call("top_pairs", best, at, a, b, a_valid, each, *pairs, score, *sizes)
        return *pairs, score

    def pair_round(self, metric, weight, r, prefix=0, form=None, half=False, protect=False):
        import torch

        batch, tokens, width = metric.shape
        group, source = torch.empty(batch, tokens, dtype=torch.long), torch.empty(batch, r, dtype=torch.long)
        size, score = torch.empty(batch, tokens - r), torch.empty(batch, r)
        name, margin, alpha = form or (None, 0.0, 1.0)
        numbers = (batch, tokens, width, r, prefix, FORMS.get(name, -1), margin, alpha, half, protect)
        self.call("pair_round", _type(metric), metric, weight, group, size, source, score, *numbers)
        return group, size, source, score

    def rows(self, x, at):
        out = x.new_empty(x.shape[0], at.shape[1], x.shape[2])
        self.call("rows", _type(x), x, at, out, *x.shape, at.shape[1])
        return out

    def merge(self, x, group, slots, weight=None):
        out = x.new_empty(x.shape[0], slots, x.shape[2])
        self.call("merge", _type(x), x, group, weight, out, *x.shape, slots)
        return out

    def merge_backward(self, grad, group, weight, slots):
        batch, tokens = group.shape
        out = grad.new_empty(batch, tokens, grad.shape[2])
        self.call("merge_backward", _type(grad), grad, group, weight, out, batch, tokens, grad.shape[2], slots)
        return out

    def greedy_select(self, unit, importance, each, most, kind, balance=0.5, step=1, mask=None, table=None):
        import torch

        if kind == "max_min":
            importance = self.energy(unit, "nearest", 0.0, 1.0, mask)
        order = torch.empty(unit.shape[0], most, dtype=torch.long)
        shape = (*unit.shape, most, KINDS[kind])
        self.call("greedy", _type(unit), unit, table, importance, each, mask, order, *shape, balance, step)
        return order

    def dpp_select(self, unit, relevance, each, most, mask=None, table=None):
        import torch

        order = torch.empty(unit.shape[0], most, dtype=torch.long)
        self.call("dpp", _type(unit), unit, table, relevance, each, mask, order, *unit.shape, most)
        return order

    def dpc_knn(self, x, each, most, neighbors=5, mask=None):
        import torch

        order = torch.empty(x.shape[0], most, dtype=torch.long)
        target, distance = torch.empty(x.shape[:2], dtype=torch.long), torch.empty(x.shape[:2])
        self.call("dpc_knn", _type(x), x, each, mask, order, target, distance, *x.shape, most, neighbors)
        return order, target, distance

    def received(self, query, key, scale, mask=None):
        import torch

        batch, heads, queries, width = query.shape
        out = torch.empty(batch, key.shape[2])
        sizes = (batch, heads, key.shape[1], queries, key.shape[2], width)
        self.call("received", _type(query), query, key, mask, out, *sizes, scale)
        return out

    def probe_norms(self, difference, step):
        import torch

        probes, batch, tokens, width = difference.shape
        out = torch.empty(batch, tokens)
        self.call("probes", _type(difference), difference, out, probes, _Long(batch * tokens), width, step)
        return out

    def minmax(self, scores, mask, eps, floor=0.0):
        import torch

        out = torch.empty(scores.shape)
        self.call("minmax", scores, mask, out, *scores.shape, eps, floor)
        return out


class _Long(int):
    """An argument that is a 64-bit integer in C."""


def _type(x: Any) -> int:
    return {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2}[str(x.dtype)]


def _argument(value: Any) -> Any:
    if value is None or isinstance(value, ctypes.Array):
        return value
    if hasattr(value, "data_ptr"):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, _Long):
        return ctypes.c_longlong(value)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int(value)


def _random_calls(library: ctypes.CDLL, calls: int, draw: random.Random) -> None:
    """Every operator at random sizes, with buffers of exactly the size it may touch."""
    some = [draw.gauss(0, 1) for _ in range(1 << 15)]
    for odd in (0.0, -1.0, 1e30, float("nan"), float("inf"), float("-inf")):
        for _ in range(8):
            some[draw.randrange(len(some))] = odd
    pool, bits = (ctypes.c_float * len(some))(*some), draw.randbytes(1 << 17)  # any half: not a number, subnormal

    def floats(n: int) -> Any:
        return (ctypes.c_float * n).from_buffer_copy(pool, 4 * draw.randrange(len(pool) - n))

    def halves(n: int) -> Any:
        return (ctypes.c_uint16 * n).from_buffer_copy(bits, 2 * draw.randrange(len(bits) // 2 - n))

    def longs(n: int, low: int, high: int) -> Any:
        return (ctypes.c_longlong * n)(*[draw.randint(low, high) for _ in range(n)])

    def mask(n: int) -> Any:
        share = draw.choice([0, 0.5, 1])
        return draw.choice([None, (ctypes.c_bool * n)(*[draw.random() < share for _ in range(n)])])  # also nobody

    def tokens(n: int) -> Any:  # of any of the three types
        kind = draw.randrange(3)
        return kind, floats(n) if kind == 0 else halves(n)

    def run(name: str, *values: Any) -> None:
        library["shim_" + name](*map(_argument, values))

    for _ in range(calls):
        b, n, d = draw.randint(0, 2), draw.choice([0, 1, 2, 3, 17, 64, 65, draw.randint(1, 99)]), draw.randint(0, 37)
        most, size = draw.randint(0, min(n, 9)), b * n
        kind, x = tokens(size * d)
        name = draw.choice(OPERATORS)
        each, table = longs(b, -1, n + 1), floats(b * n * n) if draw.random() < 0.5 else None
        order, out = longs(b * most, 0, 0), floats(size)
        if name == "energy":
            run(name, kind, x, mask(size), out, b, n, d, draw.randrange(4), 0.5, 1.0)
        elif name == "match":
            na, nb = draw.randint(0, n), draw.randint(0, n)
            a, c, at = longs(b * na, 0, max(0, n - 1)), longs(b * nb, -1, n), longs(b * na, 0, 0)
            run(name, kind, x, a, c, mask(b * nb), floats(b * na), at, b, n, d, na, nb)
        elif name == "top_pairs":
            nb, pairs = draw.randint(0, n), (longs(b * most, 0, 0), longs(b * most, 0, 0), floats(b * most))
            a, at, c = longs(size, 0, n), longs(size, -1, nb), longs(b * nb, 0, n)
            run(name, out, at, a, c, mask(size), draw.choice([None, each]), *pairs, b, n, nb, most)
        elif name == "pair_round":
            prefix = draw.randint(0, min(n, 2))
            r = draw.randint(0, (n - prefix) // 2)
            made = (longs(size, 0, 0), floats(b * (n - r)), longs(b * r, 0, 0), floats(b * r))
            how = (draw.randint(-1, 3), 0.5, 1.0, draw.randrange(2), draw.randrange(2))
            run(name, kind, x, draw.choice([None, floats(size)]), *made, b, n, d, r, prefix, *how)
        elif name == "rows":
            m = draw.randint(0, 40)
            to = ((ctypes.c_float if kind == 0 else ctypes.c_uint16) * (b * m * d))()
            run(name, kind, x, longs(b * m, -1, n), to, b, n, d, m)
        elif name == "merge":
            slots = draw.randint(0, n + 1)
            to = ((ctypes.c_float if kind == 0 else ctypes.c_uint16) * (b * slots * d))()
            run(name, kind, x, longs(size, -1, slots), draw.choice([None, floats(size)]), to, b, n, d, slots)
        elif name == "merge_backward":
            many = draw.randint(0, 40)
            to = ((ctypes.c_float if kind == 0 else ctypes.c_uint16) * (b * many * d))()
            run(name, kind, x, longs(b * many, -1, n), draw.choice([None, floats(b * many)]), to, b, many, d, n)
        elif name == "greedy":
            step = draw.randint(1, 3)
            run(name, kind, x, table, out, each, mask(size), order, b, n, d, most, draw.randrange(3), 0.5, step)
        elif name == "dpp":
            run(name, kind, x, table, out, each, mask(size), order, b, n, d, most)
        elif name == "dpc_knn":
            run(name, kind, x, each, mask(size), order, longs(size, 0, 0), out, b, n, d, most, draw.randint(1, 7))
        elif name == "received":
            groups, m = draw.randint(1, 2), draw.choice([n, draw.randint(0, 20)])
            kind, query = tokens(b * 2 * m * d)
            key = ((ctypes.c_float if kind == 0 else ctypes.c_uint16) * (b * (2 // groups) * n * d))()
            run(name, kind, query, key, mask(size), out, b, 2, 2 // groups, m, n, d, 0.3)
        elif name == "minmax":
            run(name, floats(size), mask(size), out, b, n, 1e-6, 0.0)
        else:
            kind, difference = tokens(3 * size * d)
            run(name, kind, difference, out, 3, _Long(size), d, 0.01)


if __name__ == "__main__":
    host = ctypes.CDLL(sys.argv[1])
    if sys.argv[2] in ("overflow", "shared"):
        host.shim_overflow((ctypes.c_float * 32)(), 32, ctypes.c_bool(sys.argv[2] == "shared"))
    else:
        _random_calls(host, int(sys.argv[2]), random.Random(int(sys.argv[3])))
    print("clean")
