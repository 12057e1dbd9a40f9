"""Whether a method can reduce an encoder, and why not."""

from __future__ import annotations

from torch import nn

from vtc.adapters.encoders import pixel_patch, rectangle
from vtc.adapters.encoders.block_patch import patch_on
from vtc.adapters.encoders.rotary import column_slots
from vtc.adapters.encoders.site import EncoderSite
from vtc.adapters.encoders.trial import check
from vtc.errors import OptionError
from vtc.methods import Method


def refusal(site: EncoderSite, method: Method | None) -> str:
    if site.rectangle:
        return rectangle.refusal(site, method)
    if method is not None and method.rectangle:
        return (
            f"{method.name} is for encoders that need a rectangle of tokens (SAM, ViTDet), and this one takes any "
            "number of them: use tome or pitome"
        )
    if method is not None:
        given = {"pooled=": method.pooled, "cascade=": method.cascade, "proportional=": method.proportional}
        given |= {"shares=": method.shares is not None, "before=": method.before is not None}
        given |= {"where=": method.where == "llm", method.name: not method.encoder}
        if any(given.values()):
            what = next(name for name, is_given in given.items() if is_given)
            return (
                f"{what} is for multimodal LLMs, where the decoder takes its image tokens; this is a vision encoder "
                "alone"
            )
    if method is not None and method.merges and site.no_bias:
        return f'{site.no_bias} takes no size bias, which merged tokens need; load it with attn_implementation="sdpa"'
    if not any(map(patch_on, site.blocks)):
        reason = check(site)  # a patched encoder has already been checked
        if reason:
            return reason
    if method is None or method.lacks("encoder"):
        return "" if method is None else method.lacks("encoder")
    if isinstance(method.r, tuple) and len(method.r) != len(site.blocks):
        return f"r= lists {len(method.r)} layers, but the encoder has {len(site.blocks)}"
    if isinstance(method.keep, float) and method.keep < 0.5 and not method.one_shot:
        return (
            f"keep={method.keep}: inside a ViT a fraction is per layer, and a layer keeps at least half; "
            "give the final number of tokens (an int), or flops="
        )
    if method.entrance is method:
        return pixel_patch.refusal(site, method)
    if "grid" in method.needs and isinstance(site.patchify, nn.Conv3d):
        return f"{method.name} needs rows and columns, and this encoder's patches have a third axis, time"
    if "grid" in method.needs and site.shuffled:
        return f"{method.name} needs the patches in their places, but this encoder's embeddings shuffle them"
    if method.ppe:
        if isinstance(site.rotary, str):
            return f'positions={method.positions!r}: {site.rotary}; positions="original" works'
        if method.resizes:
            return (
                f'positions={method.positions!r}: mode="resize" merges no tokens, so none has several; mode="pool" does'
            )
        try:
            column_slots(*site.rotary(), method.ppe)
        except OptionError as error:
            return str(error)
    if method.resizes and isinstance(resized := site.resized(), str):
        return f'mode="resize": {resized}; mode="pool" works'
    return ""


def reduced(site: EncoderSite, method: Method | None) -> str:
    if method is None:
        return ""
    if site.rectangle:
        return f"layer {getattr(method, 'layer', 0)}, in rows and columns before its attention"
    if method.resizes:
        return "the image, before the first layer"
    if method.entrance is method:
        return "the first layer's input, by the patches' pixels"
    where = "layer 0" if method.one_shot else f"layers 0-{len(site.blocks) - 1}, between attention and MLP"
    if method.ppe and not isinstance(site.rotary, str):
        where += (
            f"; a merged token carries the positions of up to {column_slots(*site.rotary(), method.ppe)[0]} members"
        )
    return where
