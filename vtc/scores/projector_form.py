"""Finds projectors with a formula for their sensitivity, by inspecting the module and checking the formula against
it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vtc.errors import InputError
from vtc.scores.projector import LinearActLinear
from vtc.scores.weights import bare, loaded, put_away, unreadable

_logger = logging.getLogger(__name__)
# Per module: the checked state of its weights, and what was computed from them.
_known: WeakKeyDictionary[nn.Module, tuple[Any, dict[str, Tensor]]] = WeakKeyDictionary()


def recognize(projector: Any, patches: int | None = None, dtype: torch.dtype = torch.float32) -> LinearActLinear | None:
    """The projector's weights if it is [norm] - Linear - activation - Linear, else None.

    The leaf modules, in the order of registration, must have this form, and the formula must give the projector's own
    output on a few random tokens, when the projector is first seen and whenever its weights have changed: with a hook,
    or a forward that does more, it is not recognised. This finds LLaVA's and LLaVA-NeXT's projector, InternVL's, the
    mergers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and any such nn.Sequential.

    Args:
        projector: a module, or a callable that has one as `module`.
        patches: P if it takes [B, N, P, V], None if it takes [B, N, V].
    """
    module = getattr(projector, "module", projector)
    if not isinstance(module, nn.Module):
        return None
    with loaded(module):
        return None if unreadable(module) else _recognize(module, projector, patches, dtype)


def _recognize(module: nn.Module, projector: Any, patches: int | None, dtype: torch.dtype) -> LinearActLinear | None:
    state, known = _state(module, projector, patches, dtype), _known.get(module)
    if known is not None and known[0] == state:
        return _read(module, patches or 1, dtype, known[1])
    form = _read(module, patches or 1, dtype, {})
    if form is None or not _agrees(form, projector, patches):
        return None
    if state is not None:
        _known[module] = (state, form.memo)
    return form


def entrance(module: nn.Module) -> nn.Linear | None:
    """The first of the two linear maps of a module with this form; its output is a, before the activation."""
    leaves = _leaves(module)
    first = leaves[-3] if len(leaves) in (3, 4) else None
    return first if isinstance(first, nn.Linear) and isinstance(leaves[-1], nn.Linear) else None


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if not any(m.children()) and not isinstance(m, (nn.Identity, nn.Dropout))]


def in_type(projector: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The projector with its weights in `dtype`: [B, N, P, V] or [B, N, V] -> [B, N, C]. The module is not changed.
    Quantized weights stay as they are, and so does the projector's input dtype."""
    module, call = getattr(projector, "module", projector), projector
    if isinstance(module, nn.Module) and put_away(module):
        with loaded(module):
            there = bare(module, dtype)
        if isinstance(projector, nn.Module):
            call = there
        else:
            call = copy.copy(projector)
            object.__setattr__(call, "module", there)
    elif isinstance(module, nn.Module) and unreadable(module):
        own = own_dtype(module)

        def call(x: Tensor) -> Tensor:
            return projector(x.to(own)).to(dtype)

    elif isinstance(module, nn.Module) and any(t.is_floating_point() and t.dtype != dtype for t in _tensors(module)):
        if isinstance(projector, nn.Module):
            names = {**dict(projector.named_parameters()), **dict(projector.named_buffers())}
            weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in names.items()}

            def call(x: Tensor) -> Tensor:
                return torch.func.functional_call(projector, weights, (x,))
        else:
            call = copy.copy(projector)
            object.__setattr__(call, "module", copy.deepcopy(module).to(dtype))  # works also if it is frozen

    def run(x: Tensor) -> Tensor:
        out = call(x)
        if out.shape[:-1].numel() != x.shape[0] * x.shape[1]:
            raise InputError(
                f"the projector made {tuple(out.shape)} of {tuple(x.shape)}: it has to return one row per token, "
                "[B, N, C]"
            )
        return out.reshape(*x.shape[:2], -1)

    return run


def own_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which a module with quantized weights computes."""
    tensors = (t.dtype for t in _tensors(module) if t.is_floating_point() and t.dtype.itemsize > 1)
    return next(tensors, torch.get_default_dtype())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _state(module: nn.Module, projector: Any, patches: int | None, dtype: torch.dtype) -> Any:
    """A value that changes when the weights do (except for writes through `.data`); None if changes cannot be detected.

    Wrappers of one type are assumed to do the same thing to a module.
    """
    tensors = list(_tensors(module))
    if any(t.is_inference() for t in tensors) or put_away(module):
        return None
    return type(projector), patches, dtype, tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in tensors)


def _read(module: nn.Module, patches: int, dtype: torch.dtype, memo: dict[str, Tensor]) -> LinearActLinear | None:
    leaves = _leaves(module)
    if len(leaves) not in (3, 4):
        return None
    *before, one, act, two = leaves
    linears = [m for m in (one, two) if isinstance(m, nn.Linear) and m.weight.is_floating_point()]
    if len(linears) != 2 or isinstance(act, nn.Linear):
        return None
    (first, bias), (second, shift) = (_affine(m, dtype) for m in linears)
    if first.shape[1] % patches or second.shape[1] != first.shape[0]:
        return None
    if not before:
        return LinearActLinear(first[:, None], bias, act, second, shift, patches, memo=memo)
    norm: Any = before[0]
    gain, eps = getattr(norm, "weight", None), getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if not isinstance(gain, Tensor) or not isinstance(eps, float):
        return None
    width = len(gain) if gain.ndim == 1 else 0
    if width not in (first.shape[1], first.shape[1] // patches):
        return None
    blocks = first.unflatten(1, (-1, width))
    if getattr(norm, "bias", None) is not None:
        bias = bias + blocks.sum(1) @ norm.bias.detach().to(dtype)
    blocks = blocks * gain.detach().to(dtype)
    centred = isinstance(norm, nn.LayerNorm)
    if centred:  # y has mean 0, so W y does not change, and W u becomes W (u - mean)
        blocks = blocks - blocks.mean(-1, keepdim=True)
    return LinearActLinear(blocks, bias, act, second, shift, patches, eps, centred, memo)


def _affine(linear: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = linear.weight.detach().to(dtype)
    return weight, weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().to(dtype)


def _agrees(form: LinearActLinear, projector: Any, patches: int | None) -> bool:
    """Whether the formula gives the projector's output, and the activation is elementwise."""
    weight, generator = form.first, torch.Generator().manual_seed(0)
    inputs = torch.randn(4, form.patches, weight[0].numel() // form.patches, generator=generator)
    inputs = (inputs * torch.tensor([0.01, 0.1, 1.0, 10.0])[:, None, None]).to(weight)
    try:
        want = in_type(projector, weight.dtype)(inputs[None] if patches else inputs[None, :, 0])[0]
        gap = ((form(inputs) - want).abs().amax(1) / want.abs().amax(1)).amax()
        a = form.hidden(inputs)[0]
        together, alone = form.act(a.clone()), form.act(a.reshape(-1, 1).clone()).view_as(a)
        elementwise = torch.allclose(together, alone, rtol=1e-4, atol=1e-6)
        return bool(gap < 1e-4 and form.slope(a).isfinite().all()) and elementwise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        _logger.debug("the projector could not be checked: %s", error)
        return False
