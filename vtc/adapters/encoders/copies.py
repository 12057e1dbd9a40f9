"""Copies of an encoder's parts to try things on: on the meta device, with zeros, or with random weights."""

from __future__ import annotations

import copy
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtc.errors import UnsupportedModelError

# What others, and vtc, put on an instance.
_INSTANCE = ("forward", "_old_forward", "_hf_hook", "forward_intermediates", "get_image_features", "get_video_features")


def bare_copy(module: nn.Module, tensor: Callable[[str, Tensor], Tensor], known: dict[int, Any] | None = None) -> Any:
    """A deep copy of `module` whose parameters and buffers come from `tensor(name, old)`, without hooks and without
    what others set on its parts. `known`: id of an object -> its replacement; afterwards also every copy."""
    memo = {} if known is None else known
    for part in module.modules():
        for store in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            memo[id(getattr(part, store))] = OrderedDict()
        for name in _INSTANCE:
            if name in vars(part):
                memo[id(vars(part)[name])] = None
        if "config" in vars(part):
            memo.setdefault(id(part.config), part.config)
    for name, parameter in module.named_parameters():
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(tensor(name, parameter), requires_grad=False)
    for name, buffer in module.named_buffers():
        if id(buffer) not in memo:
            memo[id(buffer)] = tensor(name, buffer)
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        for name in _INSTANCE:
            part.__dict__.pop(name, None)
    return copied.eval()


@contextmanager
def altered(module: nn.Module, name: str, value: Any) -> Iterator[Any]:
    """The same module, with its parts, parameters and hooks, but with another `value` of one attribute. The module
    itself stays as it is, since another thread may be running it; unless its forward was put on it by others
    (accelerate), and runs it."""
    made, stores = module, ("_modules", "_parameters")
    store = next((each for each in stores if name in vars(module)[each]), "__dict__")
    if "forward" not in vars(module):
        made = type(module).__new__(type(module))
        made.__dict__.update(vars(module), **{each: dict(vars(module)[each]) for each in stores})
    held = getattr(made, store)
    before, held[name] = held[name], value
    try:
        yield made
    finally:
        held[name] = before


def on_meta(name: str, old: Tensor) -> Tensor:
    return torch.empty(old.shape, dtype=old.dtype, device="meta")


def zeros(name: str, old: Tensor) -> Tensor:
    return torch.zeros(old.shape, dtype=old.dtype, device="cpu")


def stand_in(block: nn.Module) -> nn.Module:
    """A copy of `block` in float32 on the CPU with random weights; the block itself where its weights are packed."""
    if not all(type(p) is nn.Parameter and p.is_floating_point() and p.itemsize > 1 for p in block.parameters()):
        return block
    if any(map(_packed, block.modules())):
        return block
    made = bare_copy(block, _noise)
    for part in made.modules():  # tables that a class computes itself
        if any(buffer.is_meta for buffer in part._buffers.values() if buffer is not None):
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else torch.zeros_like(buffer, device="cpu")
            if hasattr(part, "init_non_persistent_buffers"):
                part.init_non_persistent_buffers()
    return made


def _packed(module: nn.Module) -> bool:
    """Whether weights are not parameters (quantize_dynamic keeps them in a separate object)."""
    return hasattr(module, "in_features") and not any(True for _ in module.parameters())


def _noise(name: str, old: Tensor) -> Tensor:
    """Random values with which every part has an effect: matrices keep the scale of their inputs, norms are near 1."""
    if not isinstance(old, nn.Parameter):
        if old.is_meta:
            return old.detach()
        return old.detach().to("cpu", torch.float32 if old.is_floating_point() else old.dtype, copy=True)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    count = min(old.numel(), 1_000_003)  # prime, so that no two rows are alike; huge matrices repeat it
    flat = torch.randn(count, generator=generator, device="cpu")
    flat = flat.repeat(-(-old.numel() // count))[: old.numel()] if count else flat
    if old.ndim > 1:
        return flat.reshape(old.shape) / max(1, old.shape[-1]) ** 0.5
    return (flat * 0.2).clamp(-0.6, 0.6).reshape(old.shape) + (1.0 if name.endswith("weight") else 0.0)


def kind_of(block: nn.Module) -> tuple:
    """Blocks that are alike: the same modules, shapes and switches."""
    parts = []
    for name, module in block.named_modules():
        switches = [
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, (int, str)) and key != "training" and "idx" not in key and "index" not in key
        ]
        parts.append((name, type(module), tuple(switches)))
    shapes = tuple((name, tuple(p.shape)) for name, p in [*block.named_parameters(), *block.named_buffers()])
    return (tuple(parts), shapes)


def floats(block: nn.Module) -> Iterator[Tensor]:
    """Parameters in the dtype of the tokens: floating, not packed into bytes; at least one."""
    found = False
    for parameter in block.parameters():
        if parameter.is_floating_point() and parameter.itemsize > 1:
            found = True
            yield parameter
    if not found:
        yield torch.empty(0)


def width_of(block: nn.Module, attention: nn.Module) -> int:
    """Channels of a block's tokens, read off its attention's first projection (shapes, not weights: these may be
    quantized)."""
    for module in attention.modules():
        for name in ("in_features", "embed_dim"):
            if isinstance(getattr(module, name, None), int):
                return getattr(module, name)
    raise UnsupportedModelError(f"{type(block).__name__}: no layer of its attention says how many features it takes")
