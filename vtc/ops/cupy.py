"""The CUDA kernels through CuPy: csrc/cuda/*.cuh compiled by NVRTC when first used and kept in CuPy's cache on disk.

For machines with a GPU but no compiler. `install()` registers the operators for CUDA tensors; importing this module
does not import CuPy. Launches go to torch's current stream.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtc.ops.build import PLACES
from vtc.ops.definitions import ENERGIES
from vtc.ops.selection import SELECTIONS

_SOURCES = [place / "cuda" for place in PLACES]
_TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
_NEAREST, _MAX_MIN = ENERGIES.index("nearest"), SELECTIONS.index("max_min")
_TABLE = 1 << 24  # up to this many values, all cosines are stored at once, as in definitions.py
_SHARED_TOKENS = 9600  # select.cuh
# Every kernel: its file, and its template parameters besides the type of the tokens.
_KERNELS = {
    "energy_kernel": ("energy", "1", "4"),
    "match_kernel": ("match", "1", "4"),
    "merge_kernel": ("merge",),
    "merge_backward_kernel": ("merge",),
    "rows_kernel": ("merge",),
    "units_kernel": ("round",),
    "greedy_kernel": ("select",),
    "dpp_kernel": ("select",),
    "squares_kernel": ("dpc_knn",),
    "dpc_density_kernel": ("dpc_knn", "1", "4"),
    "dpc_score_kernel": ("dpc_knn", "1", "4"),
    "dpc_assign_kernel": ("dpc_knn", "1", "4"),
    "received_sum_kernel": ("received", "1", "4"),
    "received_columns_kernel": ("received", "1", "4"),
    "probes_kernel": ("probes",),
}
_PLAIN = {
    "top_pairs_kernel": "match",
    "sides_kernel": "round",
    "lists_kernel": "round",
    "slots_kernel": "round",
    "top_kernel": "dpc_knn",
    "received_mean_kernel": "received",
    "minmax_kernel": "minmax",
}
FILES = ("energy", "match", "round", "merge", "select", "dpc_knn", "received", "probes", "minmax")


def folder() -> Path:
    """Where the headers are."""
    found = next((folder for folder in _SOURCES if (folder / "common.cuh").exists()), None)
    if found is None:
        places = " nor ".join(map(str, _SOURCES))
        raise RuntimeError(
            f"CuPy has nothing to compile: the CUDA sources are neither in {places}; install vtc-torch anew"
        )
    return found


def source(file: str) -> str:
    """A header with its includes expanded: CuPy's cache identifies a kernel by its text."""
    place = folder()
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (place / name).read_text().replace("#pragma once", "")
        return re.sub(r'#include "(\w+\.cuh)"', lambda found: expand(found[1]), text)

    return expand(f"{file}.cuh").replace('#include "shim.h"', "")


def _includes() -> list[str]:
    """Where cuda_fp16.h is: in the toolkit, or in the packages installed with torch for CUDA."""
    places = [Path("/usr/local").glob("cuda*/include"), *(Path(p).glob("nvidia/*/include") for p in sys.path)]
    return [str(path) for found in places for path in sorted(found) if (path / "cuda_fp16.h").exists()][:1]


def _options() -> tuple[str, ...]:
    return ("-std=c++17", *(f"-I{path}" for path in _includes()))


def _names(file: str) -> list[str]:
    names = [f"vtc_cuda::{name}" for name, of in _PLAIN.items() if of == file]
    for name, (of, *variants) in _KERNELS.items():
        if of == file:
            ends = [f", {variant}>" for variant in variants] or [">"]
            names += [f"vtc_cuda::{name}<{type_}{end}" for type_ in _TYPES.values() for end in ends]
    return names


def ptx(file: str, arch: str = "compute_80") -> str:
    """All kernels of a file as PTX, to check that they compile; needs NVRTC but no GPU."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source(file), f"{file}.cu", (), ())
    try:
        for name in _names(file):
            nvrtc.addNameExpression(program, name)
        nvrtc.compileProgram(program, (*_options(), f"-arch={arch}"))
        text = nvrtc.getPTX(program)
        return text.decode() if isinstance(text, bytes) else text
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{file}.cuh does not compile:\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


@cache
def _kernel(file: str, name: str, device: int) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=source(file), options=_options(), name_expressions=[name])
        return module.get_function(name)


def _launch(name: str, like: Tensor, grid: tuple[int, ...], threads: int, *arguments: Any, **more: Any) -> None:
    """`more`: variant, the template parameter; shared, bytes of shared memory. int: a C int; float: a C float."""
    import cupy
    import numpy

    if 0 in grid:
        return
    file, *_ = _KERNELS.get(name) or (_PLAIN[name],)
    end = f", {more['variant']}>" if "variant" in more else ">"
    full = f"vtc_cuda::{name}" + (f"<{_TYPES[like.dtype]}{end}" if name in _KERNELS else "")

    def convert(value: Any) -> Any:
        if value is None or isinstance(value, Tensor):
            return numpy.uintp(0 if value is None else value.data_ptr())
        return numpy.float32(value) if isinstance(value, float) else numpy.int32(value)

    values = tuple(v if isinstance(v, numpy.generic) else convert(v) for v in arguments)
    index = like.device.index
    with cupy.cuda.Device(index):
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(like.device).cuda_stream)
        _kernel(file, full, index)(
            (*grid, 1, 1)[:3], (threads,), values, shared_mem=more.get("shared", 0), stream=stream
        )


def _tiles(rows: int, images: int) -> tuple[int, int]:
    """How many tiles a launch has, and the rows of a tile divided by 16, as `many_tiles` in tile.cuh."""
    variant = 4 if -(-rows // 64) * images >= 264 else 1
    return -(-rows // (16 * variant)), variant


def _check(x: Tensor, *tables: Tensor | None) -> None:
    """Check x [B, ...] float, and tables of B rows on its device. The kernels read only within these shapes."""
    if x.dtype not in _TYPES:
        raise RuntimeError(f"the tokens must be float32, float16 or bfloat16, not {x.dtype}")
    for table in tables:
        if table is not None and (table.device != x.device or table.shape[0] != x.shape[0]):
            raise RuntimeError(
                f"{tuple(table.shape)} on {table.device} does not go with {tuple(x.shape)} on {x.device}"
            )


def _table(x: Tensor | None, dtype: torch.dtype, width: int, name: str) -> Tensor | None:
    if x is None:
        return None
    if x.dtype != dtype or x.ndim != 2 or x.shape[1] != width:
        raise RuntimeError(f"{name} must be {dtype} [B, {width}], not {x.dtype} {tuple(x.shape)}")
    return x.contiguous()


def _each(each: Tensor, most: int, tokens: int) -> Tensor:
    if each.dtype != torch.long or each.ndim != 1 or not 0 <= most <= tokens:
        raise RuntimeError(
            f"each must be [B] long, not {each.dtype} {tuple(each.shape)}, and most={most} at most {tokens}"
        )
    return each.contiguous()


def energy(unit: Tensor, form: int, margin: float, alpha: float, mask: Tensor | None) -> Tensor:
    _check(unit, mask)
    if not 0 <= form < len(ENERGIES):
        raise RuntimeError(f"unknown energy {form}; choose {dict(enumerate(ENERGIES))}")
    unit, (batch, tokens, width) = unit.contiguous(), unit.shape
    mask = _table(mask, torch.bool, tokens, "mask")
    out = unit.new_empty(batch, tokens, dtype=torch.float32)
    tiles, variant = _tiles(tokens, batch)
    numbers = (tokens, width, form, float(margin), float(alpha), float(1.0 - margin))
    _launch("energy_kernel", unit, (tiles, batch), 256, unit, mask, out, *numbers, variant=variant)
    return out


def match(unit: Tensor, a: Tensor, b: Tensor, b_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(unit, a, b, b_valid)
    unit, (batch, tokens, width) = unit.contiguous(), unit.shape
    sources, targets = _table(a, torch.long, a.shape[1], "a"), _table(b, torch.long, b.shape[1], "b")
    b_valid = _table(b_valid, torch.bool, b.shape[1], "b_valid")
    best, at = unit.new_empty(a.shape, dtype=torch.float32), unit.new_empty(a.shape, dtype=torch.long)
    tiles, variant = _tiles(a.shape[1], batch)
    values = (unit, sources, targets, b_valid, best, at, tokens, width, a.shape[1], b.shape[1])
    _launch("match_kernel", unit, (tiles, batch), 256, *values, variant=variant)
    return best, at


def top_pairs(
    best: Tensor, at: Tensor, a: Tensor, b: Tensor, each: Tensor | None, most: int, a_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(best, at, a, b, each, a_valid)
    batch, sources = at.shape
    score, valid = _table(best, torch.float32, sources, "best"), _table(a_valid, torch.bool, sources, "a_valid")
    places, of = _table(at, torch.long, sources, "at"), _table(a, torch.long, sources, "a")
    targets = _table(b, torch.long, b.shape[1], "b")
    each = None if each is None else _each(each, most, sources)
    pairs = at.new_empty(2, batch, most), best.new_empty(batch, most)
    out = (*pairs[0], pairs[1])
    if most:
        values = (score, places, of, targets, valid, each, *out, sources, b.shape[1], most, 0)
        _launch("top_pairs_kernel", best, (-(-sources // 256), batch), 256, *values)
    return out


def pair_round(
    metric: Tensor,
    weight: Tensor | None,
    r: int,
    prefix: int,
    form: int,
    margin: float,
    alpha: float,
    half: bool,
    protect: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(metric, weight)
    metric, (batch, tokens, width) = metric.contiguous(), metric.shape
    weight, inside = _table(weight, torch.float32, tokens, "weight"), tokens - prefix
    if not 0 <= prefix <= tokens or not 0 <= r <= inside // 2:
        raise RuntimeError(f"prefix={prefix}, r={r}: at most half of the tokens behind the prefix, of {tokens}")
    (group, source, target), (size, score) = (
        (metric.new_empty(batch, count, dtype=torch.long) for count in (tokens, r, r)),
        (metric.new_empty(batch, count, dtype=torch.float32) for count in (tokens - r, r)),
    )
    if r:
        unit = metric.new_empty(batch, inside, width, dtype=torch.float32)
        _launch("units_kernel", metric, (-(-inside // 8), batch), 256, metric, unit, tokens, width, prefix)
        high, some = None, form >= 0 and (half or protect)
        first = (inside + 1 - prefix % 2) // 2 if form < 0 else r if some else (inside + 1) // 2
        if form >= 0:
            high = energy(unit, form, margin, alpha, None)
        side, grid = source.new_empty(batch, inside), (-(-inside // 256), batch)
        _launch("sides_kernel", unit, grid, 256, high, side, inside, r, prefix, int(form >= 0 and half), int(some))
        a, b = side.new_empty(batch, first), side.new_empty(batch, r if some else inside - first)
        _launch("lists_kernel", unit, grid, 256, side, a, b, inside, first, b.shape[1])
        best, at = match(unit, a, b, None)
        values = (best, at, a, b, None, None, source, target, score, first, b.shape[1], r, 1)
        _launch("top_pairs_kernel", unit, (-(-first // 256), batch), 256, *values)
    _launch("slots_kernel", metric, (batch,), 256, source, target, weight, group, size, tokens, r, prefix)
    return group, size, source, score


def rows(x: Tensor, at: Tensor) -> Tensor:
    _check(x, at)
    x, (batch, tokens, width) = x.contiguous(), x.shape
    places = _table(at, torch.long, at.shape[1], "at")
    out = x.new_empty(batch, at.shape[1], width)
    _launch("rows_kernel", x, (-(-at.shape[1] // 8), batch), 256, x, places, out, tokens, width, at.shape[1])
    return out


def merge(x: Tensor, group: Tensor, slots: int, weight: Tensor | None) -> Tensor:
    _check(x, group, weight)
    x, (batch, tokens, width) = x.contiguous(), x.shape
    groups, weight = _table(group, torch.long, tokens, "group"), _table(weight, torch.float32, tokens, "weight")
    out = x.new_empty(batch, slots, width)
    _launch("merge_kernel", x, (-(-slots // 8), batch), 256, x, groups, weight, out, tokens, width, slots)
    return out


def merge_backward(grad: Tensor, group: Tensor, weight: Tensor | None, slots: int) -> Tensor:
    _check(grad, group, weight)
    grad, (batch, tokens) = grad.contiguous(), group.shape
    groups, weight = _table(group, torch.long, tokens, "group"), _table(weight, torch.float32, tokens, "weight")
    out = grad.new_empty(batch, tokens, grad.shape[2])
    numbers = (tokens, grad.shape[2], slots)
    _launch("merge_backward_kernel", grad, (-(-tokens // 8), batch), 256, grad, groups, weight, out, *numbers)
    return out


def _products(unit: Tensor) -> Tensor | None:
    if unit.shape[0] * unit.shape[1] ** 2 > _TABLE:
        return None
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        return torch.bmm(unit.float(), unit.float().mT)


def greedy_select(
    unit: Tensor,
    importance: Tensor | None,
    each: Tensor,
    most: int,
    kind: int,
    balance: float,
    step: int,
    mask: Tensor | None,
) -> Tensor:
    _check(unit, importance, each, mask)
    if not 0 <= kind < len(SELECTIONS) or (kind != _MAX_MIN and importance is None) or step < 1:
        raise RuntimeError(
            f"kind={kind}, step={step}: choose {dict(enumerate(SELECTIONS))}, with importance, step >= 1"
        )
    unit, (batch, tokens, width) = unit.contiguous(), unit.shape
    each, mask = _each(each, most, tokens), _table(mask, torch.bool, tokens, "mask")
    own = energy(unit, _NEAREST, 0.0, 1.0, mask) if kind == _MAX_MIN else importance
    own, table = _table(own, torch.float32, tokens, "importance"), _products(unit)
    inside = tokens <= _SHARED_TOKENS
    state = None if inside else unit.new_empty(batch, tokens + (tokens + 3) // 4, dtype=torch.float32)
    order = unit.new_empty(batch, most, dtype=torch.long)
    numbers = (tokens, width, most, kind, float(balance), float(1.0 - balance), step)
    values = (unit, table, own, each, mask, state, order, *numbers)
    if most:
        _launch("greedy_kernel", unit, (batch,), 1024, *values, shared=5 * tokens if inside else 0)
    return order


def dpp_select(unit: Tensor, relevance: Tensor, each: Tensor, most: int, mask: Tensor | None) -> Tensor:
    _check(unit, relevance, each, mask)
    unit, (batch, tokens, width) = unit.contiguous(), unit.shape
    each, mask = _each(each, most, tokens), _table(mask, torch.bool, tokens, "mask")
    weight, table = _table(relevance, torch.float32, tokens, "relevance"), _products(unit)
    factor = unit.new_empty(batch, most, tokens, dtype=torch.float32)
    left = unit.new_empty(batch, (9 * tokens + 3) // 4, dtype=torch.float32)
    order = unit.new_empty(batch, most, dtype=torch.long)
    if most:
        values = (unit, table, weight, each, mask, factor, left, order, tokens, width, most)
        _launch("dpp_kernel", unit, (batch,), 1024, *values)
    return order


def dpc_knn(x: Tensor, each: Tensor, most: int, neighbors: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    import numpy

    _check(x, each, mask)
    x, (batch, tokens, width) = x.contiguous(), x.shape
    each, mask, near = _each(each, most, tokens), _table(mask, torch.bool, tokens, "mask"), min(neighbors, tokens + 1)
    if near < 1:
        raise RuntimeError(f"neighbors={neighbors}: at least 1")
    squares, density, widest, score = x.new_empty(4, batch, tokens, dtype=torch.float32)
    nearest = x.new_empty(batch, tokens, near, dtype=torch.float32)
    order, target = x.new_empty(batch, most, dtype=torch.long), x.new_empty(batch, tokens, dtype=torch.long)
    distance = x.new_empty(batch, tokens, dtype=torch.float32)
    tiles, variant = _tiles(tokens, batch)
    grid, size = (tiles, batch), (tokens, width)
    _launch("squares_kernel", x, (-(-batch * tokens // 8),), 256, x, squares, numpy.int64(batch * tokens), width)
    values: tuple[Any, ...] = (x, squares, each, mask, nearest, density, widest, *size, near)
    _launch("dpc_density_kernel", x, grid, 256, *values, variant=variant)
    _launch("dpc_score_kernel", x, grid, 256, x, squares, mask, density, widest, score, *size, variant=variant)
    _launch("top_kernel", x, (-(-tokens // 256), batch), 256, score, each, mask, order, tokens, most)
    values = (x, squares, mask, order, target, distance, *size, most)
    _launch("dpc_assign_kernel", x, grid, 256, *values, variant=variant)
    return order, target, distance


def received(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    _check(query, key, mask)
    (batch, heads, queries, width), (_, key_heads, tokens, _) = query.shape, key.shape
    if key.shape[3] != width or heads % key_heads or key.dtype != query.dtype:
        raise RuntimeError(f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit together")
    query, key, mask = query.contiguous(), key.contiguous(), _table(mask, torch.bool, tokens, "mask")
    peak, total = query.new_empty(2, batch, heads, queries, dtype=torch.float32)
    part, out = (
        query.new_empty(batch, heads, tokens, dtype=torch.float32),
        query.new_empty(batch, tokens, dtype=torch.float32),
    )
    _, variant = _tiles(min(queries, tokens), batch * heads)
    numbers = (queries, tokens, width, heads // key_heads, float(scale))
    side = 16 * variant
    values = (query, key, mask, peak, total)
    _launch("received_sum_kernel", query, (-(-queries // side), heads, batch), 256, *values, *numbers, variant=variant)
    grid = (-(-tokens // side), heads, batch)
    _launch("received_columns_kernel", query, grid, 256, *values, part, *numbers, variant=variant)
    _launch("received_mean_kernel", query, (-(-tokens // 256), batch), 256, part, out, tokens, heads)
    return out


def probe_norms(difference: Tensor, step: float) -> Tensor:
    import numpy

    _check(difference)
    difference, (probes, batch, tokens, width) = difference.contiguous(), difference.shape
    out = difference.new_empty(batch, tokens, dtype=torch.float32)
    numbers = (probes, numpy.int64(batch * tokens), width, float(2.0 * step * max(1, probes)))
    _launch("probes_kernel", difference, (-(-batch * tokens // 8),), 256, difference, out, *numbers)
    return out


def minmax(scores: Tensor, mask: Tensor | None, eps: float, floor: float) -> Tensor:
    _check(scores, mask)
    batch, tokens = scores.shape
    table, real = _table(scores, torch.float32, tokens, "scores"), _table(mask, torch.bool, tokens, "mask")
    out = scores.new_empty(batch, tokens)
    if tokens:
        _launch("minmax_kernel", scores, (batch,), 1024, table, real, out, tokens, float(eps), float(floor))
    return out


OPERATORS: tuple[Callable[..., Any], ...] = (
    energy,
    match,
    top_pairs,
    pair_round,
    rows,
    merge,
    merge_backward,
    greedy_select,
    dpp_select,
    dpc_knn,
    received,
    probe_norms,
    minmax,
)
_library: torch.library.Library | None = None


def install() -> None:
    """Register these kernels as `torch.ops.vtc` for CUDA tensors; vtc.ops.kernels defines the schemas."""
    global _library
    if _library is None:
        _library = torch.library.Library("vtc", "IMPL", "CUDA")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # if compiled kernels are loaded too, these replace them
            for operator in OPERATORS:
                if hasattr(torch.ops.vtc, operator.__name__):
                    _library.impl(operator.__name__, operator)


def remove() -> None:
    """Return the operators to the compiled kernels, if there are any."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
