"""open_clip's own vision towers (CLIP, CoCa). Towers with a timm trunk are found by the timm adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.encoders import reasons
from vtc.adapters.encoders.site import Block, EncoderSite, Refusal, examined, projected_keys
from vtc.adapters.encoders.state import CallState
from vtc.macs import EncoderMACs, linear_weights

name = "open_clip"
covers = "CLIP and CoCa vision towers (towers with a timm trunk: see timm)"


def _mha_attend(block: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    h = block.ln_1(x)
    if stage is None:
        return block.ls_1(block.attention(q_x=h, attn_mask=kwargs.get("attn_mask")))
    bias = stage.bias(h)
    if bias is not None and stage.pairs is not None:  # this bias has a row for every query
        pairs = bias.expand(h.shape[0], block.attn.num_heads, h.shape[1], -1).flatten(0, 1)
        return block.ls_1(block.attn(h, h, h, need_weights=False, attn_mask=pairs.to(h.dtype))[0])
    # As a key padding mask [B, M] the bias is broadcast over heads and queries, never expanded to M x M.
    mask = None if bias is None else bias[:, 0, 0].to(h.dtype)
    return block.ls_1(block.attn(h, h, h, need_weights=False, key_padding_mask=mask)[0])


def _custom_attend(block: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    mask = kwargs.get("attn_mask") if stage is None else stage.bias(x)
    return block.ls_1(block.ln_attn(block.attn(block.ln_1(x), attn_mask=mask)))


def _feed(block: Any, x: Tensor) -> Tensor:
    return block.ls_2(block.mlp(block.ln_2(x)))


def _mha_mask(block: Any, x: Tensor, args: tuple, kwargs: dict) -> Tensor | None:
    """The caller's mask [N, N] or [B x H, N, N], always added to the logits, even if it is bool."""
    mask = kwargs.get("attn_mask")
    if mask is None:
        return None
    mask = mask.to(x.dtype)
    return mask[None, None] if mask.ndim == 2 else mask.unflatten(0, (x.shape[0], -1))


def _custom_mask(block: Any, x: Tensor, args: tuple, kwargs: dict) -> Tensor | None:
    """The same, but in a bool mask True means hidden."""
    mask = kwargs.get("attn_mask")
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, float("-inf"))
    return _mha_mask(block, x, args, {"attn_mask": mask}) if mask.ndim < 4 else mask.to(x.dtype)


def _mha_keys(block: Any, x: Tensor) -> Tensor:
    """Keys from the fused projection of nn.MultiheadAttention."""
    attn = block.attn
    return projected_keys(block.ln_1(x.detach()), attn.in_proj_weight, attn.in_proj_bias, attn.num_heads)


def _ln_k(block: Any) -> nn.Module:
    return block.attn.ln_k


def patches(block: Any) -> tuple[nn.Module, nn.Module]:
    return block.attn, block.mlp


def _mha_width(block: Any) -> int:
    return block.attn.embed_dim


def _custom_width(block: Any) -> int:
    return block.attn.num_heads * block.attn.head_dim


def _heads(block: Any) -> int:
    return block.attn.num_heads


MHA = Block(_mha_attend, _feed, parts=patches, width=_mha_width, heads=_heads, project=_mha_keys, mask=_mha_mask)
CUSTOM = Block(_custom_attend, _feed, parts=patches, width=_custom_width, heads=_heads, keys=_ln_k, mask=_custom_mask)


def _kind(block: nn.Module) -> Block | None:
    if not all(hasattr(block, part) for part in ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2")):
        return None
    if isinstance(block.attn, nn.MultiheadAttention):
        plain = block.attn.batch_first and block.attn.in_proj_weight is not None and not hasattr(block, "ln_1_kv")
        return MHA if plain else None
    return CUSTOM if hasattr(block.attn, "ln_k") and hasattr(block, "ln_attn") else None


def find(model: nn.Module) -> Iterator[EncoderSite | Refusal]:
    """Every vision tower of open_clip's own inside `model`, or why it cannot be reduced."""
    for path, module in model.named_modules():
        mine = any(cls.__module__ == "open_clip.transformer" for cls in type(module).__mro__)
        if mine and hasattr(module, "conv1") and hasattr(module, "transformer"):
            yield examined(path, module, _site)
        elif any(cls.__module__ == "open_clip.modified_resnet" for cls in type(module).__mro__) and path.endswith(
            "visual"
        ):
            yield Refusal(path, type(module).__name__, "it is a convolutional network: there are no tokens to reduce")


def _site(path: str, model: Any) -> EncoderSite | Refusal:
    blocks = tuple(model.transformer.resblocks)
    type_name = f"open_clip {type(model).__name__}"
    kinds = [_kind(block) for block in blocks]
    block = kinds[0] if kinds else None
    if block is None or any(found is not block for found in kinds):
        return Refusal(path, type_name, _why_not(model, blocks))
    pool = linear_weights(getattr(model, "attn_pool", None))
    return EncoderSite(
        path,
        type_name,
        blocks,
        block,
        1,
        model.conv1,
        EncoderMACs(
            attention=tuple(linear_weights(b.attn) + _in_proj(b.attn) for b in blocks),
            width=tuple(block.width(b) for b in blocks),
            mlp=tuple(linear_weights(b.mlp) for b in blocks),
            patch=model.conv1.weight.numel(),
            prefix=1,
            tail=(pool, model.proj.numel() if model.proj is not None else 0),
        ),
        resizable="open_clip's towers take one image size",
        watched=(model, model.transformer) if hasattr(model, "forward_intermediates") else (),
        encoder=model,
        probe=_probe(model),
    )


def _probe(model: Any) -> Any:
    image = torch.empty(1, model.conv1.in_channels, *model.image_size, dtype=model.conv1.weight.dtype, device="meta")
    return lambda net: net.forward(image)


def _why_not(model: Any, blocks: tuple) -> str:
    if any(isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks):
        attn = blocks[0].attn
        if not attn.batch_first:
            return "its blocks take tokens as [N, B, C]: create the model with batch_first=True"
        if hasattr(blocks[0], "ln_1_kv"):
            return f"its blocks ({type(blocks[0]).__name__}) attend to something else than the image's tokens"
    return reasons.why_not(model, blocks, ("attn_mask",))


def _in_proj(attn: Any) -> int:
    return 0 if isinstance(attn, nn.MultiheadAttention) else attn.in_proj_weight.numel()
