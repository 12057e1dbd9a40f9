"""Why an encoder that vtc does not know cannot be reduced, derived from its modules.

Module names are used for one thing only: to find the attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FEEDS = ("mlp", "ffn", "feed_forward", "feedforward", "intermediate", "fc1")


def why_not(model: nn.Module, blocks: Sequence[nn.Module], masks: Sequence[str]) -> str:
    """Why `model` cannot be reduced. `blocks`: its list of layers, where it has one; `masks`: what their library calls
    the mask of an attention."""
    attentions = [module for name, module in model.named_modules() if attends(name, module)]
    if not attentions:
        return f"it holds no attention: its patches are mixed by {_mixers(model)}, which need every one in its place"
    if _windowed(model):
        pooled = " that is pooled from stage to stage" if _pyramid(model) else ""
        return f"its attention works in windows of a fixed grid{pooled}, which fewer tokens would not fill"
    if _pyramid(model):
        return "it works on grids of several sizes (pooled, or cut anew), which fewer tokens would not fill"
    if blocks:
        return _of_blocks(blocks, masks)
    for module in attentions:
        if any(isinstance(part, _CONVOLUTIONS) and _wide(part) for part in module.modules()):
            return (
                f"its attention ({type(module).__name__}) holds convolutions over the grid of patches, which fewer "
                "tokens would not fill"
            )
    return (
        "vtc finds no single list of layers in it, each with attention and MLP over the image's tokens (it attends in "
        f"{type(attentions[0]).__name__})"
    )


def _of_blocks(blocks: Sequence[nn.Module], masks: Sequence[str]) -> str:
    block = next((other for other in blocks if type(other) is not type(blocks[0])), blocks[0])
    named = f"its blocks ({', '.join(dict.fromkeys(type(other).__name__ for other in blocks))})"
    if any(isinstance(module, _CONVOLUTIONS) and _wide(module) for module in block.modules()):
        return f"{named} hold convolutions over the grid of patches, which fewer tokens would not fill"
    attentions = [(name, child) for name, child in block.named_children() if attends(name, child)]
    if len(attentions) > 1:
        found = " and ".join(f"{name} ({type(child).__name__})" for name, child in attentions)
        return f"{named} attend more than once: {found}"
    if not attentions or not any(feed in child for child, _ in block.named_children() for feed in _FEEDS):
        return f"{named} are not one attention and one MLP behind it: {patches(block)}"
    attention = attentions[0][1]
    relative = next((name for name, _ in attention.named_modules() if "rel" in name), "")
    if relative:
        return f"{named} compute relative positions of the whole grid inside their attention ({relative})"
    inner = [part for name, part in attention.named_modules() if part is attention or attends(name, part)]
    blind = next((part for part in inner if not _takes(part, masks)), None)
    if blind is not None:
        return (
            f"the attention of its blocks ({type(blind).__name__} in {type(block).__name__}) takes no mask, and the "
            "sizes of merged tokens have no other way in"
        )
    return f"{named} are put together in a way vtc has no account of: {patches(block)}"


def attends(name: str, module: nn.Module) -> bool:
    """By the name of its class, its own, or its heads; dropouts and norms of an attention project nothing."""
    called = f"{type(module).__name__} {name.rpartition('.')[2]}".lower()
    named = any(word in called for word in ("attention", "attn")) and not isinstance(module, nn.ModuleList)
    headed = isinstance(getattr(module, "num_heads", None), int)  # a block that computes attention itself
    weights = any(p.ndim > 1 for p in module.parameters()) or any(hasattr(m, "in_features") for m in module.modules())
    return (named or headed) and weights


def _mixers(model: nn.Module) -> str:
    """What the model has in place of attention."""
    kinds = {
        "convolutions": any(isinstance(m, _CONVOLUTIONS) and _wide(m) for m in _behind_stem(model)),
        "recurrent layers": any(isinstance(m, nn.RNNBase) for m in model.modules()),
    }
    return " and ".join(name for name, there in kinds.items() if there) or "layers over the whole grid"


def _windowed(model: nn.Module) -> bool:
    """Whether attention works in windows. A relative position bias may use the whole grid as its window."""
    for part in model.modules():
        if not any(word in type(part).__name__.lower() for word in ("relpos", "relative")):
            if any(_sized(vars(part).get(name)) for name in ("window_size", "window_area")):
                return True
    return False


def _sized(value: Any) -> bool:
    return any(map(_sized, value)) if isinstance(value, (tuple, list)) else isinstance(value, int) and value > 0


def _pyramid(model: Any) -> bool:
    """Whether its features come in several sizes."""
    info = getattr(model, "feature_info", None)
    scales = {entry.get("reduction") for entry in info if isinstance(entry, dict)} if isinstance(info, list) else set()
    lists = (getattr(getattr(model, "config", None), name, None) for name in ("depths", "num_heads", "sr_ratios"))
    return len(scales) > 1 or any(isinstance(value, (list, tuple)) for value in lists)


def _wide(module: Any) -> bool:
    return any(size > 1 for size in module.kernel_size)


def _behind_stem(model: nn.Module) -> Iterator[nn.Module]:
    """All modules except the first convolution, which cuts images into patches even in a ViT."""
    seen = False
    for module in model.modules():
        if isinstance(module, _CONVOLUTIONS) and not seen:
            seen = True
            continue
        yield module


def _takes(attention: nn.Module, names: Sequence[str]) -> bool:
    parameters = inspect.signature(type(attention).forward).parameters
    return any(name in parameters for name in names)


def patches(block: nn.Module) -> str:
    return ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children()) or "no parts"
