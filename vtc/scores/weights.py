"""Access to a module's weights: present, offloaded by accelerate, or quantized and therefore not read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def unreadable(module: Any) -> str:
    """Why a module's weights cannot be computed with, or "" if they can (after `loaded`)."""
    if not isinstance(module, nn.Module):
        return ""
    for tensor in _tensors(module):
        stored = tensor.dtype.itemsize == 1 or not tensor.is_floating_point()
        if type(tensor) not in (Tensor, nn.Parameter) or (isinstance(tensor, nn.Parameter) and stored):
            what = tensor.dtype if type(tensor) is nn.Parameter else type(tensor).__name__
            return f"the projector's weights are quantized or otherwise packed ({what}), and vtc does not read those"
    if any(tensor.is_meta for tensor in _tensors(module)):
        return "the projector's weights are on the meta device"
    return ""


def put_away(module: Any) -> bool:
    """Whether accelerate keeps a module's weights elsewhere until it runs."""
    if not isinstance(module, nn.Module):
        return False
    hooks: list[Any] = [part.__dict__.get("_hf_hook") for part in module.modules()]
    return any(getattr(one, "offload", False) for hook in hooks for one in getattr(hook, "hooks", (hook,)))


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """In this context the weights that accelerate has offloaded are loaded, as while the module runs."""
    with ExitStack() as stack:
        for part in module.modules():
            hook: Any = part.__dict__.get("_hf_hook")
            if hook is not None and any(tensor.is_meta for tensor in _tensors(part)):
                hook.pre_forward(part)
                stack.callback(hook.post_forward, part, None)
        yield


def bare(module: nn.Module, dtype: torch.dtype | None = None) -> Any:
    """A module with the same parts, without accelerate's hooks; floating tensors converted to `dtype`, the rest shared.
    Attributes set on it are not set on `module`."""
    new = object.__new__(type(module))
    new.__dict__ = {name: value for name, value in module.__dict__.items() if name != "_hf_hook"}
    if "_old_forward" in new.__dict__:  # a method of `module`, or a replacement by other code
        old = new.__dict__.pop("_old_forward")
        new.__dict__.pop("forward", None)
        if getattr(old, "__func__", None) is not type(module).forward:
            new.__dict__["forward"] = old
    for name in ("_parameters", "_buffers"):
        tensors = dict(module.__dict__[name])
        for key, tensor in tensors.items():
            if dtype is not None and tensor is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                tensors[key] = type(tensor)(tensor.detach().to(dtype)) if name == "_parameters" else tensor.to(dtype)
        new.__dict__[name] = tensors
    new.__dict__["_modules"] = {
        name: None if part is None else bare(part, dtype) for name, part in module._modules.items()
    }
    return new


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
