"""The honest limit of a compressed encoder: the same model, its tokens cut by plain slicing to the same counts at the
same place in each block. Nothing is decided or merged, and no map is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.encoders.find import find
from vtc.adapters.encoders.site import Block, EncoderSite
from vtc.adapters.encoders.state import CallState
from vtc.adapters.patch import Patch, forward_name
from vtc.handle import Handle
from vtc.token_map import TokenMap


class Slice(Patch):
    """A block that lets only the first `count` tokens behind its attention."""

    def __init__(self, module: nn.Module, block: Block, prefix: int, count: int) -> None:
        super().__init__(module, forward_name(module))
        self.block, self.prefix, self.count = block, prefix, count
        self.states: dict[tuple[int, int], CallState] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = None if args else next(iter(kwargs))
        x: Tensor = args[0] if name is None else kwargs.pop(name)
        x = x + self.block.attend(self.module, x, self.state(x), args[1:], kwargs)
        x = x[:, : self.count]
        x = x + self.block.feed(self.module, x)
        return (x,) if self.block.wrapped else x

    def state(self, x: Tensor) -> CallState:
        """Which places are left, for masks and positions; made once."""
        batch, tokens = x.shape[:2]
        if (batch, tokens) not in self.states:
            total = TokenMap.identity(batch, tokens, x.device)
            self.states[batch, tokens] = CallState(0, self.prefix, tokens, (), None, x.new_empty(batch, 0), total=total)
        return self.states[batch, tokens]


def counts_of(handle: Handle) -> tuple[int, ...] | None:
    """How many tokens of an image each block of its encoder left in the last call; None if that is not one number for
    all images of one encoder."""
    if len(handle.patches) != 1 or (stage := getattr(handle.patches[0], "stage", None)) is None:
        return None
    fed = tuple(after for _, after in stage.flow)
    return fed if all(isinstance(count, int) for count in fed) else None


def slice_blocks(model: nn.Module, counts: Sequence[int]) -> bool:
    """Cut the tokens of the model's only encoder, block by block, to `counts`. False, and nothing is changed, if it has
    several, or reads its tokens at full length between blocks."""
    sites = [site for _, site in find(model) if isinstance(site, EncoderSite)]
    if len(sites) != 1 or sites[0].between or sites[0].suffix or len(sites[0].blocks) != len(counts):
        return False
    for module, count in zip(sites[0].blocks, counts, strict=True):
        Slice(module, sites[0].block, sites[0].prefix, count).install()
    return True


def sliced(model: nn.Module, handle: Handle, run: Any) -> bool:
    """`slice_blocks` to the counts of the handle's last call, if the model then still runs: `run()`."""
    counts = counts_of(handle)
    if counts is None or not slice_blocks(model, counts):
        return False
    try:
        with torch.inference_mode():
            run()
    except (RuntimeError, ValueError, IndexError, AssertionError):  # what follows the blocks wants every token
        return False
    return True
