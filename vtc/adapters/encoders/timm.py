"""timm: ViT, DeiT, DINOv2, SigLIP, CLIP towers (`Block`), EVA-02, DINOv3 (`EvaBlock`) and BEiT.

Blocks are recognised by their parts, never by class name, and tested on random tokens before anything is patched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.encoders import reasons, timm_patches
from vtc.adapters.encoders.copies import altered
from vtc.adapters.encoders.masks import broadcast_mask
from vtc.adapters.encoders.site import NOT_ROTARY, Block, EncoderSite, Refusal, examined, projected_keys
from vtc.adapters.encoders.state import CallState, relative_bias
from vtc.macs import EncoderMACs, linear_weights

name = "timm"
_MASKS = ("attn_mask",)
covers = (
    "ViT, DeiT, DeiT-III, AugReg, MAE, DINOv2, DINOv3, EVA-02, SigLIP, SigLIP 2, CLIP, BEiT, relative positions, "
    "NaFlexViT, hybrids (MobileCLIP-B, ViTamin)"
)


def _mask(stage: CallState | None, x: Tensor, kwargs: dict) -> Tensor | None:
    return kwargs.get("attn_mask") if stage is None else stage.bias(x)


# -- Block: LayerScale and stochastic depth are modules, no positions ---------------------------------------------


def _vit_attend(block: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    h = block.attn(block.norm1(x), attn_mask=_mask(stage, x, kwargs), is_causal=kwargs.get("is_causal", False))
    return block.drop_path1(block.ls1(h))


def _vit_feed(block: Any, x: Tensor) -> Tensor:
    return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _vit_post_attend(block: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    h = block.attn(x, attn_mask=_mask(stage, x, kwargs), is_causal=kwargs.get("is_causal", False))
    return block.drop_path1(block.norm1(h))


# -- EvaBlock, and others with a rotary table as argument: LayerScale as parameters -------------------------


def _eva_rope(stage: CallState | None, kwargs: dict) -> Tensor | None:
    rope = kwargs.get("rope")
    if rope is None or stage is None:
        return rope
    return stage.turned(rope)


def _eva_attention(block: Any, h: Tensor, x: Tensor, stage: CallState | None, kwargs: dict) -> Tensor:
    causal = kwargs.get("is_causal", False)
    return block.attn(h, rope=_eva_rope(stage, kwargs), attn_mask=_mask(stage, x, kwargs), is_causal=causal)


def _eva_attend(block: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    return block.drop_path1(_scaled(block, "gamma_1", _eva_attention(block, block.norm1(x), x, stage, kwargs)))


def _eva_feed(block: Any, x: Tensor) -> Tensor:
    return block.drop_path2(_scaled(block, "gamma_2", block.mlp(block.norm2(x))))


def _scaled(block: Any, name: str, h: Tensor) -> Tensor:
    gamma = getattr(block, name, None)
    return h if gamma is None else gamma * h


def _eva_example(block: Any, prefix: int) -> tuple[int, tuple, dict]:
    """With a rotary table that is not the identity: sines and cosines for the patches behind the prefix, in
    neighbouring pairs or in halves."""
    like = next(block.parameters())
    tokens, width = prefix + 23, _width(block) // block.attn.num_heads
    angle = torch.arange(23.0)[:, None] / (1 + torch.arange(width // 2))
    half = getattr(block.attn, "rotate_half", False)
    angle = angle.repeat(1, 2) if half else angle.repeat_interleave(2, -1)
    return tokens, (), {"rope": torch.cat([angle.sin(), angle.cos()], -1).to(like.device, like.dtype)}


def _eva_post_attend(block: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    return block.drop_path1(block.norm1(_eva_attention(block, x, x, stage, kwargs)))


def _eva_post_feed(block: Any, x: Tensor) -> Tensor:
    return block.drop_path2(block.norm2(block.mlp(x)))


# -- BEiT: relative position bias inside the attention, computed for the full grid --------------------------------


def _beit_attend(block: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    attn, h = block.attn, block.norm1(x)
    shared = args[0] if args else kwargs.get("shared_rel_pos_bias")
    if stage is None:
        h = attn(h, shared_rel_pos_bias=shared)
    elif attn.relative_position_bias_table is None:
        h = attn(h, shared_rel_pos_bias=_at_anchors(shared, x, stage))
    else:
        own = attn._get_rel_pos_bias()
        bias = _at_anchors(own if shared is None else own + shared, x, stage)
        with altered(attn, "relative_position_bias_table", None) as given:  # its values at the anchors are in `bias`
            h = given(h, shared_rel_pos_bias=bias)
    return block.drop_path1(h if block.gamma_1 is None else block.gamma_1 * h)


def _at_anchors(table: Tensor | None, x: Tensor, stage: CallState) -> Tensor | None:
    bias = stage.bias(x)
    if table is None:
        return bias
    table = relative_bias(table, stage)
    return table if bias is None else table.to(bias.dtype) + bias


def _beit_keys(block: Any, x: Tensor) -> Tensor:
    """BEiT projects with F.linear, where no hook can read the keys."""
    return projected_keys(block.norm1(x.detach()), block.attn.qkv.weight, None, block.attn.num_heads)  # without a bias


# -- relative position bias of a module in the attention, or given by the model ------------------------------------


def _relpos_attention(block: Any, h: Tensor, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    attn, shared = block.attn, args[0] if args else kwargs.get("shared_rel_pos")
    if stage is None:
        return attn(h, shared_rel_pos=shared)
    if attn.rel_pos is not None:  # it goes before a shared one
        shared = attn.rel_pos.get_bias()
    with altered(attn, "rel_pos", None) as given:
        return given(h, shared_rel_pos=_at_anchors(shared, x, stage))


def _relpos_attend(block: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    return block.drop_path1(block.ls1(_relpos_attention(block, block.norm1(x), x, stage, args, kwargs)))


def _relpos_post_attend(block: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    return block.drop_path1(block.norm1(_relpos_attention(block, x, x, stage, args, kwargs)))


def _relpos_example(block: Any, prefix: int) -> tuple[int, tuple, dict]:
    own = block.attn.rel_pos
    if own is not None:
        return own.window_area + prefix, (), {}
    return _shared_example(block, prefix, "shared_rel_pos")


# -- parts --------------------------------------------------------------------------------------------------------


def patches(block: Any) -> tuple[nn.Module, nn.Module]:
    return block.attn, block.mlp


def _width(block: Any) -> int:
    attn = block.attn
    return attn.q_proj.out_features if getattr(attn, "q_proj", None) is not None else attn.qkv.out_features // 3


def _attention_weights(block: Any) -> int:
    """Those that multiply a token: a network that makes the relative position bias does not."""
    return linear_weights(block.attn) - linear_weights(getattr(block.attn, "rel_pos", None))


def _heads(block: Any) -> int:
    """Number of key heads. Differential attention has two for each of its heads."""
    attn = block.attn
    if not hasattr(attn, "head_dim"):
        return attn.num_heads
    separate = getattr(attn, "k_proj", None)
    return (attn.qkv.out_features // 3 if separate is None else separate.out_features) // attn.head_dim


def _k_norm(block: Any) -> nn.Module:
    return block.attn.k_norm  # an Identity if keys are not normalised; its output is the keys before rotation


def _beit_example(block: Any, prefix: int) -> tuple[int, tuple, dict]:
    """As many tokens as the block's own table has; without one, with the table that the blocks share."""
    attn = block.attn
    if attn.relative_position_index is not None:
        return attn.relative_position_index.shape[0], (), {}
    return _shared_example(block, prefix, "shared_rel_pos_bias")


def _shared_example(block: Any, prefix: int, name: str) -> tuple[int, tuple, dict]:
    like, tokens, heads = block.attn.proj.weight, prefix + 23, block.attn.num_heads
    shared = torch.linspace(-1, 1, heads * tokens * tokens).view(heads, tokens, tokens)
    return tokens, (), {name: shared.to(like.device, like.dtype)}


_common: dict[str, Any] = {"parts": patches, "width": _width, "heads": _heads, "mask": broadcast_mask}
VIT = Block(_vit_attend, _vit_feed, keys=_k_norm, **_common)
VIT_POST = Block(_vit_post_attend, _eva_post_feed, keys=_k_norm, **_common)
EVA = Block(_eva_attend, _eva_feed, keys=_k_norm, example=_eva_example, **_common)
EVA_POST = Block(_eva_post_attend, _eva_post_feed, keys=_k_norm, example=_eva_example, **_common)
BEIT = Block(_beit_attend, _eva_feed, project=_beit_keys, example=_beit_example, relative=True, **_common)
RELPOS = Block(_relpos_attend, _vit_feed, keys=_k_norm, example=_relpos_example, relative=True, **_common)
RELPOS_POST = replace(RELPOS, attend=_relpos_post_attend, feed=_eva_post_feed)

_PARTS = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")


def _kind(block: nn.Module) -> Block | None:
    attn = getattr(block, "attn", None)
    if attn is None or not hasattr(attn, "num_heads") or not (hasattr(attn, "qkv") or hasattr(attn, "q_proj")):
        return None
    if not all(hasattr(block, name) for name in _PARTS):
        return None
    if hasattr(attn, "relative_position_bias_table"):
        return BEIT
    if hasattr(attn, "rel_pos") and "shared_rel_pos" in signature(type(attn).forward).parameters:
        return RELPOS if hasattr(block, "ls1") else RELPOS_POST
    if not hasattr(attn, "k_norm") or "attn_mask" not in signature(type(attn).forward).parameters:
        return None
    rotary = "rope" in signature(type(attn).forward).parameters
    if rotary:
        return EVA_POST if type(block).__name__ == "EvaBlockPostNorm" else EVA
    return VIT if hasattr(block, "ls1") else VIT_POST  # ResPostBlock: its norms are its scales


def find(model: nn.Module) -> Iterator[EncoderSite | Refusal]:
    """Every timm encoder inside `model`, or why it cannot be reduced. A model inside another (the network that cuts a
    hybrid's patches) is judged as part of it; a head around an encoder (Qwen3VitClassifier) is not an encoder
    itself."""
    judged: list[str] = []
    for path, module in model.named_modules():
        if not encodes(module) or any(path.startswith(above) for above in judged):
            continue
        if not hasattr(module, "blocks") and any(map(encodes, module.children())):
            continue
        judged.append(f"{path}." if path else "")
        yield examined(path, module, _site)


def encodes(module: nn.Module) -> bool:
    mine = any(cls.__module__.startswith("timm.models.") for cls in type(module).__mro__)
    return mine and hasattr(module, "forward_features")


def _site(path: str, model: Any) -> EncoderSite | Refusal:
    type_name = type(model).__name__
    blocks = getattr(model, "blocks", None)
    blocks = list(blocks) if isinstance(blocks, (nn.ModuleList, nn.Sequential)) else []
    if not blocks or not hasattr(model, "num_prefix_tokens"):
        return Refusal(path, type_name, reasons.why_not(model, blocks, _MASKS))
    kinds = [_kind(block) for block in blocks]
    block = kinds[0]
    if block is None or any(found is not block for found in kinds):
        return Refusal(path, type_name, reasons.why_not(model, blocks, _MASKS))
    cut = timm_patches.look(model)
    if isinstance(cut, str):
        return Refusal(path, type_name, cut)
    resizable: Any = cut.fixed or (lambda: ((model.patch_embed, {}),))
    if block.relative:
        resizable = "its relative positions belong to one image size"
    return EncoderSite(
        path,
        type_name,
        tuple(blocks),
        block,
        model.num_prefix_tokens,
        cut.module,
        EncoderMACs(
            attention=tuple(_attention_weights(b) for b in blocks),
            width=tuple(_width(b) for b in blocks),
            mlp=tuple(linear_weights(b.mlp) for b in blocks),
            patch=cut.weights,
            prefix=model.num_prefix_tokens,
            tail=_tail(model),
        ),
        naflex=cut.naflex,
        grids=timm_patches.naflex_grids,
        resizable=resizable,
        watched=(model,) if hasattr(model, "forward_intermediates") else (),
        rotary=_rotary(model),
        encoder=model,
        probe=lambda net: net.forward_features(cut.image),
    )


def _rotary(model: Any) -> Any:
    rope = getattr(model, "rope", None)
    if rope is None:
        return NOT_ROTARY
    if getattr(model, "rope_mixed", False) or getattr(model, "rope_is_mixed", False):
        return "every head turns by its own mix of row and column"

    def table() -> tuple[Tensor, tuple[int, int], int]:
        own = copy.deepcopy(rope).eval()  # in training some shift the grid with the caller's random generator
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
        + linear_weights(getattr(model, "head", None))
        + linear_weights(getattr(model, "head_dist", None))
    )
    return per_token, once
