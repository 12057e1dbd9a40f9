"""What a family file says about the encoders it finds: how their blocks work (`Block`), where they are (`Site`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.masks import given_mask
from vtc.errors import UnsupportedModelError
from vtc.macs import EncoderMACs

NOT_ROTARY = "its positions are not rotary, so a merged token has none to carry"


def plain_example(block: nn.Module) -> tuple[int, tuple, dict]:
    return 8, (), {}


@dataclass(frozen=True)
class Block:
    """How one kind of block works: x + attend(x), then x + feed(x), bit for bit what its own forward computes.

    Attributes:
        attend: (block, x, stage, args, kwargs) -> the attention branch. `args` and `kwargs` are the block's own; with a
            stage, masks and positions must be taken at `stage.total.anchor`, and `stage.bias` added to the logits.
        feed: (block, x) -> the MLP branch.
        keys: (block) -> the module whose output holds the keys, or None where `project` computes them.
        project: (block, x) -> [B, N, D] keys averaged over heads, from the block's input.
        heads: (block) -> number of key heads.
        width: (block) -> heads x head width.
        parts: (block) -> (attention module, MLP module), to count weights.
        example: (block) -> (tokens, args, kwargs) for a trial run.
        relative: the attention mask is a relative position bias, never padding.
        mask: (block, x, args, kwargs) -> the caller's mask among them, as masks.py describes it.
    """

    attend: Callable[..., Tensor]
    feed: Callable[[nn.Module, Tensor], Tensor]
    parts: Callable[[Any], tuple[nn.Module, nn.Module]]
    width: Callable[[Any], int]
    heads: Callable[[Any], int]
    keys: Callable[[Any], nn.Module] | None = None
    project: Callable[[Any, Tensor], Tensor] | None = None
    example: Callable[[Any], tuple[int, tuple, dict]] = plain_example
    relative: bool = False
    mask: Callable[..., Tensor | None] = given_mask


@dataclass(frozen=True)
class Site:
    """One encoder found in a model.

    Attributes:
        path, kind: where it is and what it is called, for people.
        blocks: the blocks in order; block: how they work.
        prefix: leading tokens that are not patches.
        patchify: the module that cuts the image into patches. Its output [B, C, h, w] tells the grid; a Linear (NaFlex)
            does not.
        naflex: the module that receives `spatial_shapes`, where images of a batch have grids of their own.
        resizable: modules that receive the pixels and may receive a smaller image, each with keyword arguments to add;
            or a sentence that says why not.
        shuffled: its embeddings reorder the patches, so that a grid means nothing.
        watched: objects with a `forward_intermediates` that returns every block's tokens.
        no_bias: why the attention takes no size bias, if it does not.
        rotary: makes a rotary table, (table [rows x columns, C], (rows, columns), tables side by side); or why there is
            none that merged tokens could carry several rows of.
    """

    path: str
    kind: str
    blocks: tuple[nn.Module, ...]
    block: Block
    prefix: int
    patchify: nn.Module
    macs: EncoderMACs
    naflex: nn.Module | None = None
    resizable: tuple[tuple[nn.Module, dict], ...] | str = ()
    shuffled: bool = False
    watched: tuple[nn.Module, ...] = ()
    no_bias: str = ""
    rotary: Callable[[], tuple[Tensor, tuple[int, int], int]] | str = NOT_ROTARY


@dataclass(frozen=True)
class Refusal:
    """An encoder, or something that looks like one, that cannot be reduced, and why."""

    path: str
    kind: str
    reason: str


def check_blocks(site: Site) -> str:
    """Run every block both ways on random tokens. Returns why not, or "" if both agree to the last bit."""
    for index, block in enumerate(site.blocks):
        weight = next((p for p in block.parameters() if p.is_floating_point()), None)
        if weight is None or weight.is_meta:
            return ""
        tokens, args, kwargs = site.block.example(block)
        width = site.block.parts(block)[0]
        channels = site_channels(block, width)
        noise = torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(index))
        x = noise.to(weight.device, weight.dtype)
        training = {module: module.training for module in block.modules()}
        block.eval()
        try:
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                own = block.forward(x, *args, **kwargs)
                ours = x + site.block.attend(block, x, None, args, kwargs)
                ours = ours + site.block.feed(block, ours)
        except Exception as error:  # whatever a foreign block may raise
            return f"block {index} ({type(block).__name__}) does not run as vtc knows it: {error}"
        finally:
            for module, mode in training.items():
                module.training = mode
        if not own.isfinite().all():
            return f"block {index} ({type(block).__name__}) gives NaN or infinity on a trial: check the model's weights"
        if not torch.equal(own, ours):
            return (
                f"block {index} ({type(block).__name__}) computes something vtc does not know "
                f"(difference {(own - ours).abs().max().item():.2g} on a trial); please report the model and versions"
            )
    return ""


def site_channels(block: nn.Module, attention: nn.Module) -> int:
    for module in attention.modules():
        if isinstance(module, nn.MultiheadAttention):
            return module.embed_dim
        if isinstance(module, nn.Linear):
            return module.in_features
    raise UnsupportedModelError(f"{type(block).__name__}: its attention holds no Linear layer")
