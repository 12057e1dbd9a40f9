"""Patches that leave an encoder in front of its first block, because of their pixels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vtc.adapters.encoders.patch import EncoderPatch
from vtc.adapters.encoders.site import EncoderSite
from vtc.adapters.encoders.state import CallState, Running
from vtc.adapters.hooks import Hook
from vtc.adapters.tracing import refuse_traced
from vtc.checks import check_finite
from vtc.errors import InputError, UnsupportedModelError
from vtc.methods import Method
from vtc.token_map import TokenMap


def refusal(site: EncoderSite, method: Method) -> str:
    """Why patches cannot be told by their pixels in this encoder."""
    cut: Any = site.patchify
    if not isinstance(cut, nn.Conv2d):
        why = "they come out of a network" if site.naflex is None else "the encoder is given patches"
        why = "they span several frames" if isinstance(cut, nn.Conv3d) else why
        return f"{method.name} compares the pixels of an image's patches, but {why}"
    if cut.in_channels not in (1, 3):
        return f"{method.name} compares pixels, and its patches are cut from {cut.in_channels} channels"
    if cut.kernel_size != cut.stride or cut.padding not in ("valid", (0, 0)) or cut.dilation != (1, 1):
        return f"{method.name} compares patches, and its patches overlap, or reach over the image's edges"
    if site.shuffled:
        return f"{method.name} needs the patches in their places, but this encoder's embeddings shuffle them"
    if site.no_bias:
        return (
            f"{site.no_bias} takes no mask, and the images of a batch keep different numbers of patches; load it with "
            'attn_implementation="sdpa"'
        )
    if method.tolerance and channel_scale(site, method) is None:  # type: ignore[attr-defined]
        return (
            f"tolerance={method.tolerance}: it is of pixels in [0, 1], and the model does not tell by what its "  # type: ignore[attr-defined]
            f"processor divides its {cut.in_channels} channels: give std=, its image_std"
        )
    return ""


def channel_scale(site: EncoderSite, method: Any) -> tuple[float, ...] | None:
    """What takes differences of pixels back to those of [0, 1], a number for each channel; None = unknown."""
    about = getattr(site.encoder, "pretrained_cfg", None) or {}
    told = method.std or getattr(site.encoder, "image_std", None) or about.get("std")
    return tuple(told) if told and len(told) == site.patchify.in_channels else None


class PixelPatch(EncoderPatch):
    """One patched encoder whose blocks all run on the patches that stay. In a batch where images keep different numbers
    of them, the others are masked, so an image gives what it would give alone. Behind the last block every patch that
    left has the row of the one whose pixels stand for its own."""

    early: ClassVar[bool] = True
    scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.idle = False  # its keep=1.0 is no budget
        self.scale = channel_scale(self.site, self.method)

    def saw_patches(self, hook: Hook, args: tuple, output: Tensor) -> None:
        super().saw_patches(hook, args, output)
        if torch.compiler.is_exporting():
            raise UnsupportedModelError(
                f"torch.export fixes how many patches stay, and for {self.method.name} the picture says that: use tome "
                "or pitome, or call vtc.remove(model) first"
            )
        refuse_traced(output)
        self.now.sources = self.look(args[0].detach(), tuple(output.shape[-2:]))

    @torch.compiler.disable
    def look(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, h*w]: the patch whose pixels stand for those of each patch."""
        check_finite(pixels, f"pixels of {self.where}")
        high, wide = self.site.patchify.stride  # type: ignore[misc]
        if self.method.tolerance:  # type: ignore[attr-defined]
            scale = torch.tensor(self.scale, device=pixels.device)
            pixels = pixels.float() * scale[:, None, None]
        pixels = pixels[:, :, : grid[0] * high, : grid[1] * wide]
        cells = rearrange(pixels, "b c (h y) (w x) -> b (h w) (c y x)", y=high, x=wide)
        with torch.no_grad():
            return self.method.sources(cells, grid)  # type: ignore[attr-defined]

    def plan(self, patches: int) -> tuple[int, ...]:
        return (0,) * len(self.site.blocks)

    def begin(self, now: Running, x: Tensor, args: tuple, kwargs: dict) -> CallState:
        stage = super().begin(now, x, args, kwargs)
        source, now.sources = now.sources, None
        if stage.mask is not None or stage.pairs is not None:
            raise InputError(f"{self.method.name}: an attention mask is of all patches, and some leave: pass none")
        if source is None or source.shape != (stage.batch, stage.entry - stage.prefix):
            what = "none" if source is None else f"{source.shape[0]} x {source.shape[1]}"
            raise InputError(
                f"{self.method.name} needs the pixels of all patches, but {what} of the {stage.batch} x "
                f"{stage.entry - stage.prefix} that reached {self.where} were cut from an image just before"
            )
        total = stands_for(source.to(x.device), stage.prefix)
        real = total.mask()
        ragged = {} if bool(real.all()) else {"mask": real, "size": real.float()}
        if total.slots == stage.entry and not ragged:
            return stage
        return stage.changed(total=total, maps=(total,), wide=True, **ragged)  # all of its tokens come in


@torch.compiler.disable
def stands_for(source: Tensor, prefix: int) -> TokenMap:
    """The map of tokens behind a `prefix` to those of `source` [B, N], which stand for them."""
    source = nn.functional.pad(source + prefix, (prefix, 0))
    own = torch.arange(source.shape[1], device=source.device)
    source[:, :prefix] = own[:prefix]
    kept = source == own
    leaves = torch.where(kept, -1, own), torch.where(kept, -1, source), torch.zeros(source.shape, device=source.device)
    return TokenMap.from_anchors(kept, leaves)
