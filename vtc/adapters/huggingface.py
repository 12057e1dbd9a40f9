"""Hugging Face encoders: ViT, DeiT, ViT-MAE, DINOv2 (with registers), DINOv3, CLIP, SigLIP, SigLIP 2, BEiT.

Works on the model itself and wherever it sits inside another (AutoModel, pipelines, CLIPModel, task heads). Layers are
told by their parts and tried on random tokens before anything is patched.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters import reasons
from vtc.adapters.site import NOT_ROTARY, Block, Refusal, Site, examined
from vtc.adapters.stage import Stage, relative_bias
from vtc.adapters.timm import encodes as in_timm
from vtc.macs import EncoderMACs, linear_weights

name = "huggingface"
_MASKS = ("attention_mask", "mask")
covers = "ViT, DeiT, ViT-MAE, DINOv2 (with registers), DINOv3, CLIP, SigLIP, SigLIP 2, BEiT"


def _rest(kwargs: dict, *drop: str) -> dict:
    """The layer's other arguments, which go on to its attention as they are."""
    return {k: v for k, v in kwargs.items() if k not in ("attention_mask", *drop)}


def _mask(args: tuple, kwargs: dict) -> Tensor | None:
    return args[0] if args else kwargs.get("attention_mask")


def _biased(mask: Tensor | None, x: Tensor, stage: Stage | None) -> Tensor | None:
    """The mask for the attention: the layer's own, or what it becomes for fewer tokens."""
    return mask if stage is None else stage.bias(x)


def _relative(mask: Tensor | None, x: Tensor, stage: Stage | None) -> Tensor | None:
    """The same for a mask that is a relative position bias: taken at the anchors."""
    bias = _biased(mask, x, stage)
    if mask is None or stage is None:
        return bias
    mask = relative_bias(mask, stage)
    return mask if bias is None else mask + bias


# -- ViT, DeiT, ViT-MAE, Pixio -----------------------------------------------------------------------------------


def _vit_attend(layer: Any, x: Tensor, stage: Stage | None, args: tuple, kwargs: dict) -> Tensor:
    mask = _biased(_mask(args, kwargs), x, stage)
    return _dropped(layer, layer.attention(layer.layernorm_before(x), mask, **_rest(kwargs))[0])


def _vit_feed(layer: Any, x: Tensor) -> Tensor:
    return _dropped(layer, layer.mlp(layer.layernorm_after(x)))


def _dropped(layer: Any, h: Tensor) -> Tensor:
    """Dropout, and stochastic depth where the layer has it (Pixio)."""
    h = layer.dropout(h)
    return layer.drop_path(h) if hasattr(layer, "drop_path") else h


# -- InternViT: a LayerScale of parameters ---------------------------------------------------------------------------


def _intern_attend(layer: Any, x: Tensor, stage: Stage | None, args: tuple, kwargs: dict) -> Tensor:
    bias = None if stage is None else stage.bias(x)
    return layer.lambda_1 * layer.attention(layer.layernorm_before(x), bias)[0]


def _intern_feed(layer: Any, x: Tensor) -> Tensor:
    return layer.lambda_2 * layer.dropout(layer.mlp(layer.layernorm_after(x)))


def _k_norm(layer: Any) -> nn.Module:
    return layer.attention.k_norm  # of all heads at once; an Identity where keys are not normalised


# -- BEiT: relative position bias computed by the layer for the full grid ------------------------------------------


def _beit_attend(layer: Any, x: Tensor, stage: Stage | None, args: tuple, kwargs: dict) -> Tensor:
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


def _dino_attend(layer: Any, x: Tensor, stage: Stage | None, args: tuple, kwargs: dict) -> Tensor:
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


def _dino517_attend(layer: Any, x: Tensor, stage: Stage | None, args: tuple, kwargs: dict) -> Tensor:
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


def _clip_attend(layer: Any, x: Tensor, stage: Stage | None, args: tuple, kwargs: dict) -> Tensor:
    mask = _biased(_mask(args, kwargs), x, stage)
    h = layer.self_attn(hidden_states=layer.layer_norm1(x), attention_mask=mask, **_rest(kwargs))
    return h[0]


def _clip_feed(layer: Any, x: Tensor) -> Tensor:
    return layer.mlp(layer.layer_norm2(x))


def _clip_example(layer: Any, prefix: int) -> tuple[int, tuple, dict]:
    return prefix + 23, (), {"attention_mask": None}


# -- parts ----------------------------------------------------------------------------------------------------------


def _attention(layer: Any) -> Any:
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


def _parts(layer: Any) -> tuple[nn.Module, nn.Module]:
    return _attention(layer), layer.mlp


def _width(layer: Any) -> int:
    return _attention(layer).q_proj.out_features


def _heads(layer: Any) -> int:
    attn = _attention(layer)
    return attn.k_proj.out_features // attn.head_dim


def _k_proj(layer: Any) -> nn.Module:
    return _attention(layer).k_proj


def _width517(layer: Any) -> int:
    return layer.attention.attention.all_head_size


def _heads517(layer: Any) -> int:
    return layer.attention.attention.num_attention_heads


def _key517(layer: Any) -> nn.Module:
    return layer.attention.attention.key


_common: dict[str, Any] = {"parts": _parts, "width": _width, "heads": _heads, "keys": _k_proj}
VIT = Block(_vit_attend, _vit_feed, **_common)
INTERN = Block(_intern_attend, _intern_feed, **{**_common, "keys": _k_norm})
BEIT = Block(_beit_attend, _beit_feed, example=_beit_example, relative=True, **_common)
DINO2 = Block(_dino_attend, _dino_feed, **_common)
DINO3 = Block(_dino_attend, _dino_feed, example=_dino3_example, **_common)
DINO2_517 = Block(_dino517_attend, _dino_feed, parts=_parts, width=_width517, heads=_heads517, keys=_key517)
CLIP = Block(_clip_attend, _clip_feed, example=_clip_example, **_common)


def _kind(layer: nn.Module) -> Block | None:
    def has(*names: str) -> bool:
        return all(hasattr(layer, name) for name in names)

    if not hasattr(layer, "mlp") or not (has("attention") or has("self_attn")):
        return None
    attn = _attention(layer)
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


def find(model: nn.Module) -> Iterator[Site | Refusal]:
    """Every vision encoder of transformers inside `model`, or why it cannot be reduced."""
    taken: set[int] = set()
    for path, module in model.named_modules():
        if not _of_library(module):
            continue
        if not _encodes(module):
            if path == "" and _sees(module) and not any(map(_covered, model.modules())):
                yield Refusal(path, type(module).__name__, reasons.why_not(module, _layers(module) or (), _MASKS))
            continue
        layers = _layers(module)
        if id(layers) in taken:
            continue
        taken.add(id(layers))
        yield examined(path, module, _site)


def _of_library(module: Any) -> bool:
    return any(cls.__module__.startswith("transformers.") for cls in type(module).__mro__)


def _inputs(module: Any) -> tuple[str, ...]:  # a part that is no model of its own has none
    named = getattr(module, "main_input_name", ())
    return (named,) if isinstance(named, str) else tuple(named)


def _sees(module: Any) -> bool:
    named = [*_inputs(module), *signature(type(module).forward).parameters]
    return any(name.startswith(("pixel_values", "flattened_patches")) for name in named)


def _encodes(module: Any) -> bool:
    """True for embeddings of images and layers behind them: a model of its own, or a part of one (OWL-ViT)."""
    if not isinstance(getattr(module, "embeddings", None), nn.Module):
        return False
    if any(name.startswith("pixel_values") for name in _inputs(module)):
        # without layers, it may be a model around an encoder, whose embeddings are a text's
        return _layers(module) is not None or not any(_covered(m) for m in module.modules() if m is not module)
    cuts = any(isinstance(part, nn.Conv2d) for part in module.embeddings.modules())
    return cuts and _layers(module) is not None and _sees(module)


def _covered(module: Any) -> bool:
    """True for an encoder that this adapter judges for itself, or that the timm adapter does (TimmWrapperModel)."""
    return (_of_library(module) and _encodes(module)) or in_timm(module)


def _layers(module: Any) -> Any:
    for place in ("layers", "layer", "encoder.layers", "encoder.layer", "model.layers", "model.layer", "blocks"):
        found = module
        for step in place.split("."):
            found = getattr(found, step, None)
        if isinstance(found, nn.ModuleList):
            return found
    return None


def _site(path: str, model: Any) -> Site | Refusal:
    layers, kind = _layers(model), type(model).__name__
    kinds = [_kind(layer) for layer in layers or ()]
    if not kinds or any(found is None or found is not kinds[0] for found in kinds):
        return Refusal(path, kind, reasons.why_not(model, layers or (), _MASKS))
    block = kinds[0]
    assert block is not None
    embeddings = model.embeddings
    patchify = next((m for m in embeddings.modules() if isinstance(m, nn.Conv2d)), None)
    naflex = None
    if patchify is None:
        naflex, patchify = embeddings, getattr(embeddings, "patch_embedding", None)
        if not isinstance(patchify, nn.Linear):
            return Refusal(path, kind, "it does not cut images into patches with one projection")
    prefix = _prefix(embeddings)
    resizable: Any = ((embeddings, _interpolation(embeddings)),)
    if hasattr(model, "rope_embeddings"):
        resizable = ((embeddings, {}), (model.rope_embeddings, {}))
    if block is BEIT:
        resizable = "its relative positions belong to one image size"
    if naflex is not None:
        resizable = "its images are cut into patches by the processor: give that a smaller max_num_patches"
    attention = getattr(model.config, "_attn_implementation", None) or "eager"
    return Site(
        path,
        kind,
        tuple(layers),
        block,
        prefix,
        patchify,
        EncoderMACs(
            attention=tuple(linear_weights(_attention(layer)) for layer in layers),
            width=tuple(block.width(layer) for layer in layers),
            mlp=tuple(linear_weights(layer.mlp) for layer in layers),
            patch=patchify.weight.numel(),
            prefix=prefix,
            tail=_tail(model),
        ),
        naflex=naflex,
        resizable=resizable,
        shuffled=hasattr(embeddings, "random_masking"),
        no_bias="" if attention in ("eager", "sdpa") else f'attn_implementation="{attention}"',
        rotary=_rotary(model, getattr(patchify, "stride", None)),
        encoder=model,
        probe=_probe(model, patchify),
    )


def _probe(model: Any, patchify: Any) -> Any:
    """Calls the encoder with an image of the size it was made for."""
    like: dict[str, Any] = {"dtype": patchify.weight.dtype, "device": "meta"}
    if isinstance(patchify, nn.Linear):  # patches, none of them padding, and their rows and columns
        inputs = {
            "pixel_values": torch.empty(1, 12, patchify.in_features, **like),
            "pixel_attention_mask": None,
            "spatial_shapes": torch.tensor([[3, 4]]),
        }
        return lambda net: net.forward(**inputs)
    size = getattr(model.config, "image_size", None) or tuple(4 * step for step in patchify.stride)
    size = (size, size) if isinstance(size, int) else tuple(size)
    image = torch.empty(1, patchify.in_channels, *size, **like)
    return lambda net: net.forward(image)


def _rotary(model: Any, patch: Any) -> Any:
    rope = getattr(model, "rope_embeddings", None)
    if rope is None:
        return NOT_ROTARY

    def table() -> tuple[Tensor, tuple[int, int], int]:
        # a module of its own: with numbers where the model has none (meta), without hooks, never in training
        with torch.device("cpu" if rope.inv_freq.is_meta else rope.inv_freq.device):
            _, sine = type(rope)(rope.config).eval()(torch.zeros(1, 3, 3 * patch[0], 4 * patch[1]))
        return sine, (3, 4), 1

    return table


def _prefix(embeddings: Any) -> int:
    """Tokens in front of the patches, by the shapes of what is put there: [C], [1, C] or [1, tokens, C]."""
    count = 0
    for attribute in ("cls_token", "class_embedding", "distillation_token", "register_tokens"):
        token = getattr(embeddings, attribute, None)
        if token is not None:
            count += token.shape[1] if token.ndim == 3 else 1
    return count


def _interpolation(embeddings: Any) -> dict:
    """The keyword that makes the embeddings accept another image size, where they do not do so by themselves."""
    return (
        {"interpolate_pos_encoding": True}
        if "interpolate_pos_encoding" in signature(type(embeddings).forward).parameters
        else {}
    )


def _tail(model: Any) -> tuple[int, int]:
    """Weights of a pooling head: applied to every token, applied once."""
    head = getattr(model, "head", None)
    attention = getattr(head, "attention", None)
    if isinstance(head, nn.Module) and isinstance(attention, nn.MultiheadAttention):
        fused = attention.in_proj_weight.numel()
        return fused * 2 // 3, linear_weights(head) - fused * 2 // 3
    pooler = getattr(model, "pooler", None)
    return 0, linear_weights(pooler if isinstance(pooler, nn.Module) else None)
