"""timm: ViT, DeiT, DINOv2, SigLIP, CLIP towers (`Block`), EVA-02, DINOv3 (`EvaBlock`) and BEiT.

Blocks are told by their parts, never by class name, and tried on random tokens before anything is patched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.masks import broadcast_mask
from vtc.adapters.site import NOT_ROTARY, Block, Refusal, Site
from vtc.adapters.stage import Stage, relative_bias
from vtc.macs import EncoderMACs, linear_weights

name = "timm"
covers = "ViT, DeiT, DeiT-III, AugReg, MAE, DINOv2, DINOv3, EVA-02, SigLIP, SigLIP 2, CLIP, BEiT"


def _mask(stage: Stage | None, x: Tensor, kwargs: dict) -> Tensor | None:
    return kwargs.get("attn_mask") if stage is None else stage.bias(x)


# -- Block: LayerScale and stochastic depth are modules, no positions ---------------------------------------------


def _vit_attend(block: Any, x: Tensor, stage: Stage | None, args: tuple, kwargs: dict) -> Tensor:
    h = block.attn(block.norm1(x), attn_mask=_mask(stage, x, kwargs), is_causal=kwargs.get("is_causal", False))
    return block.drop_path1(block.ls1(h))


def _vit_feed(block: Any, x: Tensor) -> Tensor:
    return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


# -- EvaBlock: LayerScale as parameters, rotary table as argument -------------------------------------------------


def _eva_rope(stage: Stage | None, kwargs: dict) -> Tensor | None:
    rope = kwargs.get("rope")
    if rope is None or stage is None:
        return rope
    return stage.turned(rope)


def _eva_attention(block: Any, h: Tensor, x: Tensor, stage: Stage | None, kwargs: dict) -> Tensor:
    causal = kwargs.get("is_causal", False)
    return block.attn(h, rope=_eva_rope(stage, kwargs), attn_mask=_mask(stage, x, kwargs), is_causal=causal)


def _eva_attend(block: Any, x: Tensor, stage: Stage | None, args: tuple, kwargs: dict) -> Tensor:
    h = _eva_attention(block, block.norm1(x), x, stage, kwargs)
    return block.drop_path1(h if block.gamma_1 is None else block.gamma_1 * h)


def _eva_feed(block: Any, x: Tensor) -> Tensor:
    h = block.mlp(block.norm2(x))
    return block.drop_path2(h if block.gamma_2 is None else block.gamma_2 * h)


def _eva_post_attend(block: Any, x: Tensor, stage: Stage | None, args: tuple, kwargs: dict) -> Tensor:
    return block.drop_path1(block.norm1(_eva_attention(block, x, x, stage, kwargs)))


def _eva_post_feed(block: Any, x: Tensor) -> Tensor:
    return block.drop_path2(block.norm2(block.mlp(x)))


# -- BEiT: relative position bias inside the attention, computed for the full grid --------------------------------


def _beit_attend(block: Any, x: Tensor, stage: Stage | None, args: tuple, kwargs: dict) -> Tensor:
    attn, h = block.attn, block.norm1(x)
    shared = args[0] if args else kwargs.get("shared_rel_pos_bias")
    if stage is None:
        h = attn(h, shared_rel_pos_bias=shared)
    elif attn.relative_position_bias_table is None:
        h = attn(h, shared_rel_pos_bias=_at_anchors(shared, x, stage))
    else:
        own = attn._get_rel_pos_bias()
        bias = _at_anchors(own if shared is None else own + shared, x, stage)
        # The table is switched off for this call: what it says, taken at the anchors, is in `bias` already.
        table, attn._parameters["relative_position_bias_table"] = attn._parameters["relative_position_bias_table"], None
        try:
            h = attn(h, shared_rel_pos_bias=bias)
        finally:
            attn._parameters["relative_position_bias_table"] = table
    return block.drop_path1(h if block.gamma_1 is None else block.gamma_1 * h)


def _at_anchors(table: Tensor | None, x: Tensor, stage: Stage) -> Tensor | None:
    bias = stage.bias(x)
    if table is None:
        return bias
    table = relative_bias(table, stage)
    return table if bias is None else table.to(bias.dtype) + bias


def _beit_keys(block: Any, x: Tensor) -> Tensor:
    """BEiT projects with F.linear, past every hook; weights averaged over the heads give the mean key directly."""
    attn = block.attn
    rows = attn.qkv.weight.shape[0] // 3
    weight = attn.qkv.weight[rows : 2 * rows].detach().float().unflatten(0, (attn.num_heads, -1)).mean(0)
    return torch.nn.functional.linear(block.norm1(x.detach()).float(), weight)  # BEiT's keys have no bias


# -- parts --------------------------------------------------------------------------------------------------------


def _parts(block: Any) -> tuple[nn.Module, nn.Module]:
    return block.attn, block.mlp


def _width(block: Any) -> int:
    attn = block.attn
    return attn.q_proj.out_features if getattr(attn, "q_proj", None) is not None else attn.qkv.out_features // 3


def _heads(block: Any) -> int:
    return getattr(block.attn, "num_kv_heads", block.attn.num_heads)


def _k_norm(block: Any) -> nn.Module:
    return block.attn.k_norm  # an Identity where keys are not normalised; its output are the keys before rotation


def _beit_example(block: Any) -> tuple[int, tuple, dict]:
    index = block.attn.relative_position_index
    return (8 if index is None else index.shape[0]), (), {}


_common: dict[str, Any] = {"parts": _parts, "width": _width, "heads": _heads, "mask": broadcast_mask}
VIT = Block(_vit_attend, _vit_feed, keys=_k_norm, **_common)
EVA = Block(_eva_attend, _eva_feed, keys=_k_norm, **_common)
EVA_POST = Block(_eva_post_attend, _eva_post_feed, keys=_k_norm, **_common)
BEIT = Block(_beit_attend, _eva_feed, project=_beit_keys, example=_beit_example, relative=True, **_common)

_VIT_PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
_EVA_PARTS = ("norm1", "attn", "gamma_1", "drop_path1", "norm2", "mlp", "gamma_2", "drop_path2")


def _kind(block: nn.Module) -> Block | None:
    def has(*names: str) -> bool:
        return all(hasattr(block, name) for name in names)

    attn = getattr(block, "attn", None)
    if attn is None or not hasattr(attn, "num_heads") or not (hasattr(attn, "qkv") or hasattr(attn, "q_proj")):
        return None
    if has(*_EVA_PARTS) and hasattr(attn, "relative_position_bias_table"):
        return BEIT
    if not hasattr(attn, "k_norm"):
        return None
    if has(*_VIT_PARTS):
        return VIT
    if has(*_EVA_PARTS):
        return EVA
    if type(block).__name__ == "EvaBlockPostNorm":
        return EVA_POST
    return None


def find(model: nn.Module) -> Iterator[Site | Refusal]:
    """Every timm encoder inside `model`, or why it cannot be reduced."""
    for path, module in model.named_modules():
        if not any(cls.__module__.startswith("timm.models.") for cls in type(module).__mro__):
            continue
        if not hasattr(module, "forward_features"):
            continue
        yield _site(path, module)


def _site(path: str, model: Any) -> Site | Refusal:
    kind = type(model).__name__
    blocks = list(getattr(model, "blocks", None) or [])
    if not blocks or not hasattr(model, "num_prefix_tokens") or not hasattr(model, "patch_embed"):
        return Refusal(path, kind, _foreign(kind))
    kinds = [_kind(block) for block in blocks]
    for index, found in enumerate(kinds):
        if found is None or found is not kinds[0]:
            return Refusal(
                path,
                kind,
                f"block {index} is a {type(blocks[index]).__name__}, whose attention and MLP do not follow "
                "one another in a way vtc knows, so there is no place to make tokens fewer",
            )
    block = kinds[0]
    assert block is not None
    patchify = getattr(model.patch_embed, "proj", None)
    if not isinstance(patchify, nn.Conv2d):
        return Refusal(path, kind, "it does not cut images into patches with one convolution (NaFlex or hybrid stem)")
    resizable: Any = ((model.patch_embed, {}),)
    if not getattr(model, "dynamic_img_size", False):
        resizable = "its positions are fixed: create the model with dynamic_img_size=True"
    if block is BEIT:
        resizable = "its relative positions belong to one image size"
    return Site(
        path,
        kind,
        tuple(blocks),
        block,
        model.num_prefix_tokens,
        patchify,
        EncoderMACs(
            attention=tuple(linear_weights(b.attn) for b in blocks),
            width=tuple(_width(b) for b in blocks),
            mlp=tuple(linear_weights(b.mlp) for b in blocks),
            patch=patchify.weight.numel(),
            prefix=model.num_prefix_tokens,
            tail=_tail(model),
        ),
        resizable=resizable,
        watched=(model,) if hasattr(model, "forward_intermediates") else (),
        rotary=_rotary(model),
    )


def _rotary(model: Any) -> Any:
    rope = getattr(model, "rope", None)
    if rope is None:
        return NOT_ROTARY
    if getattr(model, "rope_mixed", False):
        return "every head turns by its own mix of row and column"

    def table() -> tuple[Tensor, tuple[int, int], int]:
        own = copy.deepcopy(rope).eval()  # in training some move the grid by random numbers, the caller's
        if any(buffer.is_meta for buffer in own.buffers()):
            own.to_empty(device="cpu").init_non_persistent_buffers()
        grid = getattr(own, "feat_shape", None) or (3, 4)
        return own.get_embed(shape=grid), tuple(grid), 2

    return table


def _tail(model: Any) -> tuple[int, int]:
    pool = getattr(model, "attn_pool", None)
    per_token = linear_weights(getattr(pool, "kv", None))
    once = (
        linear_weights(pool)
        - per_token
        + linear_weights(model.head)
        + linear_weights(getattr(model, "head_dist", None))
    )
    return per_token, once


def _foreign(kind: str) -> str:
    lower = kind.lower()
    if "swin" in lower or "window" in lower:
        return "its tokens live in windows of a fixed grid, which fewer tokens would not fill"
    if "hiera" in lower or "mvit" in lower or "pvt" in lower:
        return "its stages pool a fixed grid of tokens, which fewer tokens would not fill"
    return "it is not a plain stack of attention blocks over one set of tokens (a CNN or a pyramid)"
