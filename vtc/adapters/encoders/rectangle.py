"""Encoders whose blocks run on a rectangle of tokens, in windows or by relative positions of the grid (SAM, ViTDet):
found by their parts in any library, tried on a copy, and reduced by methods that leave them a rectangle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.encoders.block_patch import patch_on
from vtc.adapters.encoders.copies import floats, kind_of, stand_in
from vtc.adapters.encoders.site import Block, EncoderSite, Refusal
from vtc.adapters.encoders.trial import check_passage, evaluating
from vtc.errors import first_line
from vtc.macs import WindowMACs, linear_weights
from vtc.methods import Method

_LISTS = ("blocks", "layers", "layer", "encoder.layer", "encoder.layers")
_LIBRARIES = {"transformers": "huggingface"}
_ROWS = "its blocks take their tokens in rows and columns, which fewer tokens would not fill"
_TOLERANCE, _LOOSE = 1e-3, 0.05  # the second for a block that is not copied: quantized weights


def of_rectangles(
    model: nn.Module, items: Sequence[tuple[str, EncoderSite | Refusal]], method: Method | None
) -> Iterator[tuple[str, EncoderSite | Refusal]]:
    """`items`, what the libraries' adapters found in `model`, put right for encoders on rectangles: these are to be
    reduced if the method leaves a rectangle; if not, what the adapters refuse is told the way out."""
    sites = list(find(model))
    if method is not None and method.rectangle:
        yield from ((_library(model.get_submodule(site.path)), site) for site in sites)
    for name, item in items:
        inside = [site for site in sites if _within(site.path, item.path) or _within(item.path, site.path)]
        if not inside:
            yield name, item
        elif method is None or not method.rectangle:
            if isinstance(item, Refusal) and not all(map(refusal, inside)):
                why = item.reason if "windows" in item.reason else _ROWS
                item = replace(item, reason=f"{why}: use cubist_merge, which leaves a rectangle of them")
            yield name, item


def _within(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}." if other else "")


def _library(model: nn.Module) -> str:
    name = type(model).__module__.partition(".")[0]
    return _LIBRARIES.get(name, name)


# -- what there is ----------------------------------------------------------------------------------------------------


def find(model: nn.Module) -> Iterator[EncoderSite]:
    """Every encoder in `model` that cuts images with one convolution, and whose blocks hold a window's size (0 = none)
    and one attention with a fused projection. Whether they take rectangles is for the trial to say."""
    found: dict[int, tuple] = {}
    for path, module in model.named_modules():
        blocks = _blocks(module)
        if blocks:
            inside = {id(part) for block in blocks for part in block.modules()}
            cuts = [part for part in module.modules() if isinstance(part, nn.Conv2d) and id(part) not in inside]
            if cuts:  # of modules around the same blocks the inner one
                found[id(blocks[0])] = path, module, blocks, cuts[0]
    for each in found.values():
        yield _site(*each)


def _blocks(module: nn.Module) -> tuple[Any, ...]:
    for place in _LISTS:
        found: Any = module
        for step in place.split("."):
            found = getattr(found, step, None)
        if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found) and all(map(_attends_in_windows, found)):
            return tuple(found)
    return ()


def _attends_in_windows(block: Any) -> bool:
    attention = _attention(block)
    return (
        type(getattr(block, "window_size", None)) is int
        and isinstance(getattr(block, "mlp", None), nn.Module)
        and isinstance(getattr(attention, "qkv", None), nn.Module)
        and isinstance(getattr(attention, "proj", None), nn.Module)
    )


def _attention(block: Any) -> Any:
    return getattr(block, "attn", None) or getattr(block, "attention", None)


def _parts(block: Any) -> tuple[nn.Module, nn.Module]:
    return _attention(block), block.mlp


def _width(block: Any) -> int:
    return _attention(block).qkv.out_features // 3


def _whole(block: Any, *args: Any) -> Any:
    raise NotImplementedError("a block on a rectangle runs whole")


def _site(path: str, model: Any, blocks: tuple[Any, ...], cuts: nn.Conv2d) -> EncoderSite:
    channels, wrapped = _form(blocks[0], cuts.out_channels)
    behind = getattr(model, "neck", None)
    tail = 0 if behind is None else sum(m.weight.numel() for m in behind.modules() if isinstance(m, nn.Conv2d))
    return EncoderSite(
        path,
        type(model).__name__,
        blocks,
        Block(_whole, _whole, _parts, _width, _width, relative=True, wrapped=wrapped),
        0,
        cuts,
        WindowMACs(
            attention=tuple(linear_weights(_attention(block)) for block in blocks),
            width=tuple(_width(block) for block in blocks),
            mlp=tuple(linear_weights(block.mlp) for block in blocks),
            patch=cuts.weight.numel(),
            prefix=0,
            tail=(tail, 0),
            windows=tuple(block.window_size for block in blocks),
        ),
        between=True,  # a neck, a pyramid or a decoder of masks may read any block's tokens
        watched=(model,) if hasattr(model, "forward_intermediates") else (),
        rectangle=channels,
        encoder=model,
        probe=_probe(model, cuts),
    )


def _form(block: Any, channels: int) -> tuple[str, bool]:
    """Where a block has its channels, and whether it gives a tuple. If it does not run, the trial says why."""
    copied = stand_in(block)
    for rectangle in ("first", "last"):  # with channels last, the norm of a block refuses another number of them
        try:
            with torch.no_grad(), evaluating(copied):
                return rectangle, isinstance(copied(_example(copied, channels, rectangle, (5, 7), 1)), tuple)
        except Exception:  # whatever a foreign block may raise
            continue
    return "last", False


def _probe(model: Any, cuts: nn.Conv2d) -> Any:
    """A function that calls the encoder with one image of the size it was made for."""
    config, table = getattr(model, "config", None), getattr(model, "pos_embed", None)
    size = getattr(config, "image_size", None) or getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(table, Tensor) and table.ndim == 4:
        size = [side * step for side, step in zip(table.shape[1:3], cuts.stride, strict=True)]
    size = size or [4 * step for step in cuts.stride]
    sides = (size, size) if isinstance(size, int) else tuple(size)

    def call(net: Any) -> Any:
        like = next(net.parameters())
        return net.forward(torch.zeros(1, cuts.in_channels, *sides, dtype=like.dtype, device=like.device))

    return call


# -- the trial --------------------------------------------------------------------------------------------------------


def refusal(site: EncoderSite, method: Method | None = None) -> str:
    """Why the method, which leaves a rectangle, cannot reduce it; without one, why no such method can."""
    layer = getattr(method, "layer", 0)
    if layer >= len(site.blocks):
        return f"layer={layer}: its {len(site.blocks)} layers are numbered 0 to {len(site.blocks) - 1}"
    if any(map(patch_on, site.blocks)):
        return ""  # it was tried before
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return _try_blocks(site) or check_passage(site)


def _try_blocks(site: EncoderSite) -> str:
    """Every kind of block, on copies with random weights: does it take rectangles of any size, and give them back, each
    image as if it were alone?"""
    tried = set()
    for index, block in enumerate(site.blocks):
        kind = kind_of(block)
        if kind in tried:
            continue
        tried.add(kind)
        where = f"block {index} ({type(block).__name__})"
        copied = stand_in(block)
        tolerance = _TOLERANCE if copied is not block else _LOOSE
        try:
            with evaluating(copied):
                reason = _try_block(copied, site, tolerance)
        except Exception as error:  # whatever a foreign block may raise
            reason = f"does not run on a smaller rectangle: {first_line(error)}"
        if reason:
            return f"{where} {reason}"
    return ""


def _try_block(block: Any, site: EncoderSite, tolerance: float) -> str:
    for grid in ((5, 7), (6, 3)):
        x = _example(block, site.patchify.out_channels, site.rectangle, grid, 2)
        out = _tokens_of(block(x))
        if out.shape != x.shape:
            return f"makes {list(out.shape)} of tokens {list(x.shape)}: there is no rectangle to keep"
        alone = _tokens_of(block(x[1:]))
        if not bool((out[1:] - alone).abs().max() <= tolerance * alone.abs().max()):  # NaN too
            return "makes other tokens of an image in a batch than of that image alone"
    return ""


def _example(block: nn.Module, channels: Any, rectangle: str, grid: tuple[int, int], batch: int) -> Tensor:
    shape = (batch, *grid, channels) if rectangle == "last" else (batch, channels, *grid)
    like = next(floats(block))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like.device, like.dtype)


def _tokens_of(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
