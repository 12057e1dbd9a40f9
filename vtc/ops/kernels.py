"""Which backend runs an operator: the torch definitions, or kernels in C++, CUDA or CuPy.

Kernels come with the package (a wheel of `make wheel`, or `make setup`), otherwise from the user's cache, into which
the first operator that needs them builds them (`build.py`). Importing vtc builds nothing.

The schemas of all kernels are defined here, each with the shapes it returns, for `torch.compile` and `opcheck`. A
backend registers itself for its device when its library is loaded.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtc.errors import OptionError
from vtc.ops import build

_logger = logging.getLogger(__name__)
BACKENDS = ("torch", "cpp", "cuda", "cupy")
_ON = {"cpu": ("cpp",), "cuda": ("cuda", "cupy")}  # the fastest first
_chosen: str | None = None  # None: the fastest available
_loaded: dict[str, bool] = {}
_missing: dict[str, str] = {}  # why a backend is not loaded
_cupy = False  # whether CuPy's kernels are registered

_library = torch.library.Library("vtc", "FRAGMENT")
# `form` and `kind` are indices into ENERGIES and SELECTIONS: with a str, torch's stable ABI (2.11 to 2.13 at least)
# leaks 48 bytes per call.
for _schema in (
    "energy(Tensor unit, int form, float margin, float alpha, Tensor? mask) -> Tensor",
    "match(Tensor unit, Tensor a, Tensor b, Tensor? b_valid) -> (Tensor, Tensor)",
    "top_pairs(Tensor best, Tensor at, Tensor a, Tensor b, Tensor? each, int most, Tensor? a_valid) "
    "-> (Tensor, Tensor, Tensor)",
    "pair_round(Tensor metric, Tensor? weight, int r, int prefix, int form, float margin, float alpha, bool half, "
    "bool protect) -> (Tensor, Tensor, Tensor, Tensor)",
    "merge(Tensor x, Tensor group, int slots, Tensor? weight) -> Tensor",
    "merge_backward(Tensor grad, Tensor group, Tensor? weight, int slots) -> Tensor",
    "rows(Tensor x, Tensor at) -> Tensor",
    "greedy_select(Tensor unit, Tensor? importance, Tensor each, int most, int kind, float balance, int step, "
    "Tensor? mask) -> Tensor",
    "dpp_select(Tensor unit, Tensor relevance, Tensor each, int most, Tensor? mask) -> Tensor",
    "cosines(Tensor unit, Tensor? mask) -> Tensor",
    "cover_select(Tensor gains, Tensor? weight, Tensor each, int most, Tensor? mask, Tensor? items) -> Tensor",
    "distinct_select(Tensor unit, Tensor chosen, Tensor each) -> Tensor",
    "dpc_knn(Tensor x, Tensor each, int most, int neighbors, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    "received(Tensor query, Tensor key, float scale, Tensor? mask) -> Tensor",
    "probe_norms(Tensor difference, float step) -> Tensor",
    "minmax(Tensor scores, Tensor? mask, float eps, float floor) -> Tensor",
):
    _library.define(_schema)


def _fake(name: str) -> Callable[[Any], Any]:
    return torch.library.register_fake(f"vtc::{name}", lib=_library)


@_fake("energy")
def _(unit: Tensor, form: int, margin: float, alpha: float, mask: Tensor | None) -> Tensor:
    return unit.new_empty(unit.shape[:2])


@_fake("match")
def _(unit: Tensor, a: Tensor, b: Tensor, b_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    return unit.new_empty(a.shape), torch.empty_like(a, memory_format=torch.contiguous_format)


@_fake("top_pairs")
def _(best: Tensor, at: Tensor, a: Tensor, b: Tensor, each: Any, most: int, a_valid: Any) -> Any:
    pairs = at.new_empty(len(at), most)
    return pairs, torch.empty_like(pairs), best.new_empty(len(at), most)


@_fake("pair_round")
def _(
    metric: Tensor, weight: Any, r: int, prefix: int, form: int, margin: float, alpha: float, half: bool, protect: bool
) -> Any:
    batch, tokens = metric.shape[:2]
    return (
        metric.new_empty(batch, tokens, dtype=torch.long),
        metric.new_empty(batch, tokens - r),
        metric.new_empty(batch, r, dtype=torch.long),
        metric.new_empty(batch, r),
    )


@_fake("merge")
def _(x: Tensor, group: Tensor, slots: int, weight: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], slots, x.shape[2])


@_fake("merge_backward")
def _(grad: Tensor, group: Tensor, weight: Tensor | None, slots: int) -> Tensor:
    return grad.new_empty(grad.shape[0], group.shape[1], grad.shape[2])


@_fake("rows")
def _(x: Tensor, at: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], at.shape[1], x.shape[2])


@_fake("greedy_select")
def _(
    unit: Tensor, importance: Any, each: Tensor, most: int, kind: int, balance: float, step: int, mask: Any
) -> Tensor:
    return each.new_empty(unit.shape[0], most)


@_fake("dpp_select")
def _(unit: Tensor, relevance: Tensor, each: Tensor, most: int, mask: Tensor | None) -> Tensor:
    return each.new_empty(unit.shape[0], most)


@_fake("cosines")
def _(unit: Tensor, mask: Tensor | None) -> Tensor:
    return unit.new_empty(unit.shape[0], unit.shape[1], unit.shape[1])


@_fake("cover_select")
def _(gains: Tensor, weight: Any, each: Tensor, most: int, mask: Tensor | None, items: Any) -> Tensor:
    return each.new_empty(gains.shape[0], most)


@_fake("distinct_select")
def _(unit: Tensor, chosen: Tensor, each: Tensor) -> Tensor:
    return torch.empty_like(chosen, memory_format=torch.contiguous_format)


@_fake("dpc_knn")
def _(x: Tensor, each: Tensor, most: int, neighbors: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return each.new_empty(x.shape[0], most), each.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])


@_fake("received")
def _(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return query.new_empty(key.shape[0], key.shape[2], dtype=torch.float32)


@_fake("probe_norms")
def _(difference: Tensor, step: float) -> Tensor:
    return difference.new_empty(difference.shape[1:3], dtype=torch.float32)


@_fake("minmax")
def _(scores: Tensor, mask: Tensor | None, eps: float, floor: float) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, group, ctx.slots, weight = inputs
    ctx.save_for_backward(group, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    group, weight = ctx.saved_tensors
    return torch.ops.vtc.merge_backward(grad, group, weight, ctx.slots), None, None, None


torch.library.register_autograd("vtc::merge", _backward, setup_context=_remember, lib=_library)


def _remember_rows(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, at = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(at)


def _back_to_rows(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (at,) = ctx.saved_tensors  # a row's gradient is the sum over its copies: their mean times their number
    column = torch.where(at < 0, ctx.tokens, at)
    copies = torch.zeros(len(at), ctx.tokens + 1, device=at.device)
    copies = copies.scatter_add(1, column, torch.ones_like(at, dtype=torch.float32))[:, :-1, None]
    return (torch.ops.vtc.merge(grad.float(), at, ctx.tokens, None) * copies).to(grad.dtype), None


torch.library.register_autograd("vtc::rows", _back_to_rows, setup_context=_remember_rows, lib=_library)


_lock = threading.RLock()


def _unlock() -> None:
    """Replace the lock in a forked process: no other thread exists there that would release it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


def _load(name: str) -> bool:
    """Load a backend, once: from an existing build, else build it now. If that fails, _missing says why."""
    with _lock:
        if name not in _loaded:
            _loaded[name] = _find(name) or _first_use(name)
        return _loaded[name]


def packed(name: str) -> Path | None:
    """The library inside the package, from `make wheel` or `make setup`."""
    return min(Path(__file__).parent.parent.glob(f"_{name}.*so"), default=None)


def _find(name: str) -> bool:
    """Load an existing build, from the package or from the user's cache."""
    if name not in build.KINDS or os.environ.get("VTC_NO_EXT"):
        return False
    if there := packed(name):
        try:
            torch.ops.load_library(there)
            return True
        except OSError as error:
            _logger.warning("vtc: %s does not load (%s)", there, error)
    try:
        kept = build.cached(name)
        return kept is not None and _opens(kept)
    except (build.BuildError, OSError) as error:
        _logger.debug("nothing from the cache: %s", error)
        return False


def _first_use(name: str) -> bool:
    try:
        if name == "cupy":
            if find_spec("cupy") is None or torch.version.cuda is None:
                raise build.BuildError("it needs a GPU, and pip install cupy-cuda13x")
            return True
        if os.environ.get("VTC_NO_EXT"):
            raise build.BuildError("VTC_NO_EXT is set")
        if name == "cuda" and torch.version.cuda is None:
            raise build.BuildError(f"torch {torch.__version__} is one without CUDA")
        return _opens(build.library(name))
    except build.BuildError as error:
        _missing[name] = str(error)
        return False


def _opens(path: Path) -> bool:
    """Load a library from the cache."""
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise build.discard(path, error) from error
    return True


def set_backend(name: str | None) -> None:
    """Choose the backend of the operators: "torch" (the definitions), "cpp", "cuda" or "cupy"; None = the fastest
    available. Tensors on other devices than the backend's use the definitions.

    Raises:
        OptionError: an unknown backend, or one that is not available; the message says how to get it.
    """
    global _chosen
    if name is not None and name not in BACKENDS:
        raise OptionError(f"backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}, or None")
    if name not in (None, "torch") and not _load(str(name)):
        raise OptionError(f"backend {name!r} is not there: {_missing.get(str(name), 'it does not load')}")
    if name == "cupy" and not torch.cuda.is_available():
        raise OptionError("backend 'cupy' is not there: it needs a GPU, and torch sees none")
    _chosen = name
    _use_cupy(name == "cupy")


def backend(device: str | torch.device = "cpu") -> str:
    """Which backend runs operators on tensors of `device`."""
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    if _chosen is not None:
        return _chosen if _chosen in _ON.get(kind, ()) else "torch"
    return "torch" if torch.compiler.is_exporting() else _fastest(kind)  # who runs a saved graph need not have vtc


@torch.compiler.assume_constant_result  # graphs cannot contain building, loading or registering: runs when compiling
def _fastest(kind: str) -> str:
    names = _ON.get(kind, ())
    if names and _loaded.get(names[0]) and not _cupy:  # every operator of every layer asks
        return names[0]
    with _lock:
        new = bool(names) and names[0] not in _loaded
        found = next((name for name in names if _load(name)), "torch")
        if kind == "cuda":
            _use_cupy(found == "cupy")
    if new and found == "torch":
        _logger.log(
            logging.INFO if os.environ.get("VTC_NO_EXT") else logging.WARNING,
            "vtc: the torch definitions run, slower than %s kernels: %s (try again: %s; say no more: VTC_NO_EXT=1)",
            *(build.KINDS[names[0]], _missing[names[0]], build.AHEAD),
        )
    return found


def _use_cupy(yes: bool) -> None:
    """Switch between CuPy's kernels and the compiled ones, which are registered under the same names."""
    global _cupy
    if yes != _cupy:
        from vtc.ops import cupy

        (cupy.install if yes else cupy.remove)()
        _cupy = yes


def compiled(x: Tensor, *, differentiable: bool = False) -> bool:
    """Whether kernels accept `x`: float32 (merges: also half types), and no gradient needed for a decision."""
    types = (torch.float32, torch.bfloat16, torch.float16) if differentiable else (torch.float32,)
    if x.dtype not in types or (not differentiable and x.requires_grad and torch.is_grad_enabled()):
        return False
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False  # torch.func differentiates the definitions
    return backend(x.device) != "torch"


# Existing builds are loaded now, so that a saved graph finds its operators. This does not touch a GPU.
for _name in build.KINDS:
    if (_name == "cpp" or torch.version.cuda is not None) and _find(_name):
        _loaded[_name] = True
