"""How the layers of Hugging Face's encoders work that are given positions: a `Block` for each kind, told by its
parts. All others are found out by running them (prenorm.py)."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.encoders.copies import altered
from vtc.adapters.encoders.site import Block
from vtc.adapters.encoders.state import CallState, relative_bias

_D2V = ("output_attentions", "relative_position_bias", "interpolate_pos_encoding", "resolution")


def _rest(kwargs: dict, *drop: str) -> dict:
    """The layer's other arguments, which go on to its attention as they are."""
    return {k: v for k, v in kwargs.items() if k not in ("attention_mask", *drop)}


def _mask(args: tuple, kwargs: dict) -> Tensor | None:
    return args[0] if args else kwargs.get("attention_mask")


# -- BEiT: relative position bias computed by the layer for the full grid ------------------------------------------


def _beit_attend(layer: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    mask = _mask(args, kwargs)
    if layer.relative_position_bias is not None:
        full = x.shape[1] if stage is None else stage.entry
        own = _grid_bias(layer.relative_position_bias, layer.patch_size, full, kwargs)
        mask = own if mask is None else own + mask
    if stage is not None:
        mask = _at_anchors(mask, x, stage)
    rest = _rest(kwargs, "interpolate_pos_encoding", "resolution")
    h = layer.dropout(layer.attention(layer.layernorm_before(x), attention_mask=mask, **rest)[0])
    return layer.drop_path(layer.lambda_1 * h)


def _grid_bias(table: Any, patch: int, full: int, given: dict) -> Tensor:
    """What a table gives for the grid of an image of the size that the layer is `given`."""
    height, width = given["resolution"]
    return table((height // patch, width // patch), given.get("interpolate_pos_encoding", False), dim_size=full)


def _at_anchors(table: Tensor | None, x: Tensor, stage: CallState) -> Tensor | None:
    bias = stage.bias(x)
    if table is None:
        return bias
    return relative_bias(table, stage) if bias is None else relative_bias(table, stage) + bias


def _beit_feed(layer: Any, x: Tensor) -> Tensor:
    return layer.drop_path(layer.lambda_2 * layer.dropout(layer.mlp(layer.layernorm_after(x))))


def _beit_example(layer: Any, prefix: int) -> tuple[int, tuple, dict]:
    return prefix + 6, (), {"resolution": (2 * layer.patch_size, 3 * layer.patch_size)}


# -- Data2Vec: the same, computed inside of its attention; what the layer is given is added to it ----------------------


def _d2v_attend(layer: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    given = {**dict(zip(_D2V, args, strict=False)), **kwargs}
    h = layer.layernorm_before(x)
    if stage is None:
        h = layer.attention(h, **given)[0]
    else:
        inner, shared = layer.attention.attention, given.get("relative_position_bias")
        if inner.has_relative_position_bias:
            own = _grid_bias(inner.relative_position_bias, inner.config.patch_size, stage.entry, given)
            shared = own if shared is None else own + shared
        given["relative_position_bias"] = _at_anchors(shared, x, stage)
        with (
            altered(inner, "has_relative_position_bias", False) as plain,
            altered(layer.attention, "attention", plain) as attention,
        ):
            h = attention(h, **given)[0]
    return layer.drop_path(h if layer.lambda_1 is None else layer.lambda_1 * h)


def _d2v_feed(layer: Any, x: Tensor) -> Tensor:
    h = layer.output(layer.intermediate(layer.layernorm_after(x)))
    return layer.drop_path(h if layer.lambda_2 is None else layer.lambda_2 * h)


def _d2v_parts(layer: Any) -> tuple[nn.Module, nn.Module]:
    return layer.attention, nn.ModuleList([layer.intermediate, layer.output])


def _d2v_width(layer: Any) -> int:
    return layer.attention.attention.all_head_size


def _d2v_heads(layer: Any) -> int:
    return layer.attention.attention.num_attention_heads


def _d2v_key(layer: Any) -> nn.Module:
    return layer.attention.attention.key


def _d2v_example(layer: Any, prefix: int) -> tuple[int, tuple, dict]:
    own, like = layer.attention.attention, next(layer.parameters())
    tokens, heads = prefix + 6, own.num_attention_heads
    shared = torch.linspace(-1, 1, heads * tokens * tokens).view(1, heads, tokens, tokens)
    size = own.config.patch_size
    resolution = (2 * size, 3 * size)
    return tokens, (), {"relative_position_bias": shared.to(like.device, like.dtype), "resolution": resolution}


# -- DINOv3: a rotary table as argument --------------------------------------------------------------------------------


def _dino_attend(layer: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
    rest, mask = _rest(kwargs), _mask(args, kwargs) if stage is None else stage.bias(x)
    if stage is not None and rest.get("position_embeddings") is not None:
        # one (cos, sin) row per patch: each token carries the row of the patch it stands for
        rest["position_embeddings"] = tuple(stage.turned(table) for table in rest["position_embeddings"])
    return layer.drop_path(layer.layer_scale1(layer.attention(layer.norm1(x), attention_mask=mask, **rest)[0]))


def _dino_feed(layer: Any, x: Tensor) -> Tensor:
    return layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(x))))


def _dino3_example(layer: Any, prefix: int) -> tuple[int, tuple, dict]:
    tables = rotary_tables(23, layer.attention.head_dim, next(layer.parameters()))
    return prefix + 23, (), {"position_embeddings": tables}


def rotary_tables(tokens: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles of which no two tokens have the same."""
    angle = torch.arange(float(tokens))[:, None] / (1 + torch.arange(width // 2)).repeat(2)
    return angle.cos().to(like.device, like.dtype), angle.sin().to(like.device, like.dtype)


# -- parts ----------------------------------------------------------------------------------------------------------


def _parts(layer: Any) -> tuple[nn.Module, nn.Module]:
    return layer.attention, layer.mlp


def _width(layer: Any) -> int:
    return layer.attention.q_proj.out_features


def _heads(layer: Any) -> int:
    return layer.attention.k_proj.out_features // layer.attention.head_dim


def _k_proj(layer: Any) -> nn.Module:
    return layer.attention.k_proj


_common: dict[str, Any] = {"parts": _parts, "width": _width, "heads": _heads, "keys": _k_proj}
BEIT = Block(_beit_attend, _beit_feed, example=_beit_example, relative=True, **_common)
D2V = Block(
    _d2v_attend,
    _d2v_feed,
    parts=_d2v_parts,
    width=_d2v_width,
    heads=_d2v_heads,
    keys=_d2v_key,
    example=_d2v_example,
    relative=True,
    wrapped=True,
)
DINO3 = Block(_dino_attend, _dino_feed, example=_dino3_example, **_common)


def kind_of(layer: nn.Module) -> Block | None:
    def has(*names: str) -> bool:
        return all(hasattr(layer, name) for name in names)

    attn: Any = getattr(layer, "attention", None)
    if has("lambda_1", "lambda_2") and hasattr(getattr(attn, "attention", None), "has_relative_position_bias"):
        return D2V
    if not has("mlp") or not all(hasattr(attn, name) for name in ("q_proj", "k_proj", "v_proj", "head_dim")):
        return None
    if has("layernorm_before", "layernorm_after", "dropout", "lambda_1", "lambda_2", "drop_path"):
        return BEIT
    dino = has("norm1", "norm2", "layer_scale1", "layer_scale2", "drop_path")
    return DINO3 if dino and "position_embeddings" in signature(type(attn).forward).parameters else None
