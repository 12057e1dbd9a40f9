"""How the layers of Hugging Face's encoders work: a `Block` for each kind, recognised by its parts."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.encoders.site import Block
from vtc.adapters.encoders.state import CallState, relative_bias


def _rest(kwargs: dict, *drop: str) -> dict:
    """The layer's other arguments, which are passed on to its attention unchanged."""
    return {k: v for k, v in kwargs.items() if k not in ("attention_mask", *drop)}


def _mask(args: tuple, kwargs: dict) -> Tensor | None:
    return args[0] if args else kwargs.get("attention_mask")


def _biased(mask: Tensor | None, x: Tensor, stage: CallState | None) -> Tensor | None:
    """The mask for the attention: the layer's own, or its version for fewer tokens."""
    return mask if stage is None else stage.bias(x)


def _relative(mask: Tensor | None, x: Tensor, stage: CallState | None) -> Tensor | None:
    """The same for a mask that is a relative position bias: taken at the anchors."""
    bias = _biased(mask, x, stage)
    if mask is None or stage is None:
        return bias
    mask = relative_bias(mask, stage)
    return mask if bias is None else mask + bias


# -- ViT, DeiT, ViT-MAE, Pixio -----------------------------------------------------------------------------------


def _vit_attend(layer: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    mask = _biased(_mask(args, kwargs), x, stage)
    return _dropped(layer, layer.attention(layer.layernorm_before(x), mask, **_rest(kwargs))[0])


def _vit_feed(layer: Any, x: Tensor) -> Tensor:
    return _dropped(layer, layer.mlp(layer.layernorm_after(x)))


def _dropped(layer: Any, h: Tensor) -> Tensor:
    """Dropout, and stochastic depth where the layer has it (Pixio)."""
    h = layer.dropout(h)
    return layer.drop_path(h) if hasattr(layer, "drop_path") else h


# -- InternViT: a LayerScale of parameters ---------------------------------------------------------------------------


def _intern_attend(layer: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    bias = None if stage is None else stage.bias(x)
    return layer.lambda_1 * layer.attention(layer.layernorm_before(x), bias)[0]


def _intern_feed(layer: Any, x: Tensor) -> Tensor:
    return layer.lambda_2 * layer.dropout(layer.mlp(layer.layernorm_after(x)))


def _k_norm(layer: Any) -> nn.Module:
    return layer.attention.k_norm  # for all heads at once; an Identity if keys are not normalised


# -- BEiT: relative position bias computed by the layer for the full grid ------------------------------------------


def _beit_attend(layer: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    mask = _mask(args, kwargs)
    if layer.relative_position_bias is not None:
        height, width = kwargs["resolution"]
        window = (height // layer.patch_size, width // layer.patch_size)
        full = x.shape[1] if stage is None else stage.entry
        own = layer.relative_position_bias(window, kwargs.get("interpolate_pos_encoding", False), dim_size=full)
        mask = own if mask is None else own + mask
    mask = _relative(mask, x, stage)
    rest = _rest(kwargs, "interpolate_pos_encoding", "resolution")
    h = layer.dropout(layer.attention(layer.layernorm_before(x), attention_mask=mask, **rest)[0])
    return layer.drop_path(layer.lambda_1 * h)


def _beit_feed(layer: Any, x: Tensor) -> Tensor:
    return layer.drop_path(layer.lambda_2 * layer.dropout(layer.mlp(layer.layernorm_after(x))))


def _beit_example(layer: Any, prefix: int) -> tuple[int, tuple, dict]:
    return prefix + 6, (), {"resolution": (2 * layer.patch_size, 3 * layer.patch_size)}


# -- DINOv2, DINOv3 -------------------------------------------------------------------------------------------------


def _dino_attend(layer: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    rest = _rest(kwargs)
    if stage is not None and rest.get("position_embeddings") is not None:
        # one (cos, sin) row per patch: each token carries the row of the patch it stands for
        rest["position_embeddings"] = tuple(stage.turned(table) for table in rest["position_embeddings"])
    mask = _biased(_mask(args, kwargs), x, stage)
    return layer.drop_path(layer.layer_scale1(layer.attention(layer.norm1(x), attention_mask=mask, **rest)[0]))


def _dino_feed(layer: Any, x: Tensor) -> Tensor:
    return layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(x))))


def _dino3_example(layer: Any, prefix: int) -> tuple[int, tuple, dict]:
    like, width = next(layer.parameters()), layer.attention.head_dim
    angle = torch.arange(23.0)[:, None] / (1 + torch.arange(width // 2)).repeat(2)
    tables = (angle.cos().to(like.device, like.dtype), angle.sin().to(like.device, like.dtype))
    return prefix + 23, (), {"position_embeddings": tables}


# -- DINOv2 of transformers 5.17: separate query, key, value; its attention takes no mask ---------------------------


def _dino517_attend(layer: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    h = layer.norm1(x)
    if stage is None:
        return layer.drop_path(layer.layer_scale1(layer.attention(h, **kwargs)))
    attn = layer.attention.attention
    query, key, value = (
        project(h).unflatten(-1, (attn.num_attention_heads, -1)).transpose(1, 2)
        for project in (attn.query, attn.key, attn.value)
    )
    dropout = attn.dropout_prob if attn.training else 0.0
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=stage.bias(x), dropout_p=dropout, scale=attn.scaling
    )
    return layer.drop_path(layer.layer_scale1(layer.attention.output(out.transpose(1, 2).flatten(2), h)))


# -- CLIP, SigLIP, SigLIP 2 -----------------------------------------------------------------------------------------


def _clip_attend(layer: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    mask = _biased(_mask(args, kwargs), x, stage)
    h = layer.self_attn(hidden_states=layer.layer_norm1(x), attention_mask=mask, **_rest(kwargs))
    return h[0]


def _clip_feed(layer: Any, x: Tensor) -> Tensor:
    return layer.mlp(layer.layer_norm2(x))


def _clip_example(layer: Any, prefix: int) -> tuple[int, tuple, dict]:
    return prefix + 23, (), {"attention_mask": None}


# -- parts ----------------------------------------------------------------------------------------------------------


def attention_of(layer: Any) -> Any:
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


def patches(layer: Any) -> tuple[nn.Module, nn.Module]:
    return attention_of(layer), layer.mlp


def _width(layer: Any) -> int:
    return attention_of(layer).q_proj.out_features


def _heads(layer: Any) -> int:
    attn = attention_of(layer)
    return attn.k_proj.out_features // attn.head_dim


def _k_proj(layer: Any) -> nn.Module:
    return attention_of(layer).k_proj


def _width517(layer: Any) -> int:
    return layer.attention.attention.all_head_size


def _heads517(layer: Any) -> int:
    return layer.attention.attention.num_attention_heads


def _key517(layer: Any) -> nn.Module:
    return layer.attention.attention.key


_common: dict[str, Any] = {"parts": patches, "width": _width, "heads": _heads, "keys": _k_proj}
VIT = Block(_vit_attend, _vit_feed, **_common)
INTERN = Block(_intern_attend, _intern_feed, **{**_common, "keys": _k_norm})
BEIT = Block(_beit_attend, _beit_feed, example=_beit_example, relative=True, **_common)
DINO2 = Block(_dino_attend, _dino_feed, **_common)
DINO3 = Block(_dino_attend, _dino_feed, example=_dino3_example, **_common)
DINO2_517 = Block(_dino517_attend, _dino_feed, parts=patches, width=_width517, heads=_heads517, keys=_key517)
CLIP = Block(_clip_attend, _clip_feed, example=_clip_example, **_common)


def kind_of(layer: nn.Module) -> Block | None:
    def has(*names: str) -> bool:
        return all(hasattr(layer, name) for name in names)

    if not hasattr(layer, "mlp") or not (has("attention") or has("self_attn")):
        return None
    attn = attention_of(layer)
    dino = has("norm1", "norm2", "layer_scale1", "layer_scale2", "drop_path")
    if dino and all(
        hasattr(getattr(attn, "attention", None), part) for part in ("query", "key", "value", "all_head_size")
    ):
        return DINO2_517
    if not all(hasattr(attn, name) for name in ("q_proj", "k_proj", "v_proj", "head_dim")):
        return None
    if has("layernorm_before", "layernorm_after", "dropout", "lambda_1", "lambda_2", "drop_path"):
        return BEIT
    if has("layernorm_before", "layernorm_after", "dropout", "lambda_1", "lambda_2") and hasattr(attn, "k_norm"):
        return INTERN
    if has("layernorm_before", "layernorm_after", "dropout"):
        return VIT
    if dino:
        return DINO3 if "position_embeddings" in signature(type(attn).forward).parameters else DINO2
    if has("layer_norm1", "layer_norm2", "self_attn"):
        return CLIP
    return None
