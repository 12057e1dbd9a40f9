"""Hugging Face encoders: those of `covers`, and any other whose blocks can be found out (prenorm.py).

Works on the model itself and on a model inside another (AutoModel, pipelines, CLIPModel, task heads). Layers are
recognised by their parts and tested on random tokens before anything is patched.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.encoders import prenorm, reasons
from vtc.adapters.encoders.copies import bare_copy, on_meta
from vtc.adapters.encoders.site import NOT_ROTARY, Block, EncoderSite, Refusal, examined
from vtc.adapters.encoders.timm import encodes as in_timm
from vtc.adapters.encoders.transformers_blocks import kind_of
from vtc.macs import EncoderMACs, linear_weights

name = "huggingface"
_MASKS = ("attention_mask", "mask")
_INLINE = "its rotary table is made in the middle of its forward, where vtc cannot have another one made"
covers = (
    "ViT, DeiT, ViT-MAE, DINOv2 (with registers), DINOv3, CLIP, SigLIP, SigLIP 2, BEiT, Data2Vec, YOLOS, MLCD, Pixio, "
    "InternViT, AIMv2, ViViT, VideoMAE, ViTPose, DPT, BLIP-2, the towers of Idefics3 and SmolVLM, and others with "
    "pre-norm blocks"
)


def find(model: nn.Module) -> Iterator[EncoderSite | Refusal]:
    """Every vision encoder of transformers inside `model`, or why it cannot be reduced."""
    taken: set[int] = set()
    for path, module in model.named_modules():
        if not _of_library(module):
            continue
        if not _encodes(module):
            if path == "" and _sees(module) and not any(map(_covered, model.modules())):
                yield Refusal(path, type(module).__name__, _why_not(module))
            continue
        layers = _layers(module)
        if id(layers) in taken:
            continue
        taken.add(id(layers))
        yield examined(path, module, _site)


def _why_not(module: Any) -> str:
    layers = _layers(module) or getattr(getattr(module, "transformer", None), "layers", ())
    if layers and _packs(module, layers):
        return "it packs the images of a batch into one row of tokens, where vtc reduces each image by itself"
    return reasons.why_not(module, _layers(module) or (), _MASKS)


def _packs(module: Any, layers: Any) -> bool:
    """Whether two images reach the first layer as one row: a copy is called with them on the meta device."""
    rows: list[int] = []

    def reached(layer: Any, args: tuple, kwargs: dict) -> None:
        rows.extend(value.shape[0] for value in (*args, *kwargs.values())[:1])
        raise StopIteration

    known: dict[int, Any] = {}
    try:
        copied = bare_copy(module, on_meta, known)
        known[id(layers[0])].register_forward_pre_hook(reached, with_kwargs=True)
        cuts = next(part for part in module.modules() if isinstance(part, nn.Conv2d))
        with torch.no_grad():
            _probe(module, cuts, images=2)(copied)
    except Exception:  # a foreign encoder may want more than images
        pass
    return rows == [1]


def _of_library(module: Any) -> bool:
    return any(cls.__module__.startswith("transformers.") for cls in type(module).__mro__)


def _inputs(module: Any) -> tuple[str, ...]:  # a part that is not a complete model has none
    named = getattr(module, "main_input_name", ())
    return (named,) if isinstance(named, str) else tuple(named)


def _sees(module: Any) -> bool:
    named = [*_inputs(module), *signature(type(module).forward).parameters]
    return any(name.startswith(("pixel_values", "flattened_patches")) for name in named)


def _encodes(module: Any) -> bool:
    """True for image embeddings followed by layers: a complete model, or a part of one (OWL-ViT)."""
    if not isinstance(getattr(module, "embeddings", None), nn.Module):
        return False
    if any(name.startswith("pixel_values") for name in _inputs(module)):
        # without layers, it may be a model around an encoder, with text embeddings
        return _layers(module) is not None or not any(_covered(m) for m in module.modules() if m is not module)
    cuts = any(isinstance(part, nn.Conv2d) for part in module.embeddings.modules())
    return cuts and _layers(module) is not None and _sees(module)


def _covered(module: Any) -> bool:
    """True for an encoder that this adapter judges separately, or that the timm adapter judges (TimmWrapperModel)."""
    return (_of_library(module) and _encodes(module)) or in_timm(module)


def _layers(module: Any) -> Any:
    for place in ("layers", "layer", "encoder.layers", "encoder.layer", "model.layers", "model.layer", "blocks"):
        found = module
        for step in place.split("."):
            found = getattr(found, step, None)
        if isinstance(found, nn.ModuleList):
            return found
    return None


def _site(path: str, model: Any) -> EncoderSite | Refusal:
    layers, type_name = _layers(model), type(model).__name__
    block = _block(model, layers or ())
    if isinstance(block, str):
        return Refusal(path, type_name, block)
    embeddings = model.embeddings
    patchify = next((m for m in embeddings.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    naflex = None
    if patchify is None:
        naflex, patchify = embeddings, getattr(embeddings, "patch_embedding", None)
        if not isinstance(patchify, nn.Linear):
            return Refusal(path, type_name, "it does not cut images into patches with one projection")
    prefix, suffix = _prefix(embeddings), _count(embeddings, "detection_tokens")
    between = getattr(getattr(model, "encoder", None), "interpolation", None) is not None  # YOLOS' positions
    inline = "position_embeddings" in block.example(layers[0], 0)[2] and not hasattr(model, "rope_embeddings")
    fixed = ""
    if naflex is not None:
        fixed = "its images are cut into patches by the processor: give that a smaller max_num_patches"
    elif suffix:
        fixed = "vtc does not resize where tokens stand behind the patches"
    elif block.relative:
        fixed = "its relative positions belong to one image size"
    elif isinstance(patchify, nn.Conv3d):
        fixed = "it takes clips of one size"
    elif inline:
        fixed = _INLINE
    attention = getattr(model.config, "_attn_implementation", None) or "eager"
    return EncoderSite(
        path,
        type_name,
        tuple(layers),
        block,
        prefix + suffix,
        patchify,
        EncoderMACs(
            attention=tuple(linear_weights(block.parts(layer)[0]) for layer in layers),
            width=tuple(block.width(layer) for layer in layers),
            mlp=tuple(linear_weights(block.parts(layer)[1]) for layer in layers),
            patch=patchify.weight.numel(),
            prefix=prefix + suffix,
            tail=_tail(model),
        ),
        suffix=suffix,
        between=between,
        naflex=naflex,
        resizable=fixed or partial(_resizable, model, patchify),
        shuffled=hasattr(embeddings, "random_masking"),
        no_bias="" if attention in ("eager", "sdpa") else f'attn_implementation="{attention}"',
        rotary=_INLINE if inline else _rotary(model, getattr(patchify, "stride", None)),
        encoder=model,
        probe=_probe(model, patchify),
    )


def _block(model: Any, layers: Any) -> Block | str:
    """How all of the layers work, or why they do not work alike."""
    special = [kind_of(layer) for layer in layers]
    if layers and special[0] is not None and all(kind is special[0] for kind in special):
        return special[0]
    try:
        found = [prenorm.found(layer) for layer in layers]
        if found and all(each == found[0] for each in found):
            return found[0].block()
        why = ""
    except prenorm.Unknown as error:
        why = str(error)
    reason = reasons.why_not(model, layers, _MASKS)
    if why and any(vague in reason for vague in ("no account of", "takes no mask")):
        return f"its blocks ({', '.join(dict.fromkeys(type(layer).__name__ for layer in layers))}) {why}"
    return reason


def _resizable(model: Any, patchify: Any) -> tuple[tuple[nn.Module, dict], ...] | str:
    """The embeddings, and what makes them take another image size; or that a copy of them takes none."""
    embeddings = model.embeddings
    if hasattr(model, "rope_embeddings"):
        return (embeddings, {}), (model.rope_embeddings, {})
    more, copied = _interpolation(embeddings), bare_copy(embeddings, on_meta)
    for sides in ((2, 3), (3, 2)):
        size = [side * step for side, step in zip(sides, patchify.stride, strict=True)]
        pixels = torch.empty(1, patchify.in_channels, *size, dtype=patchify.weight.dtype, device="meta")
        try:
            with torch.no_grad():
                copied(pixels, **more)
        except Exception:  # whatever foreign embeddings may raise
            return f"its embeddings ({type(embeddings).__name__}) take one image size"
    return ((embeddings, more),)


def _probe(model: Any, patchify: Any, images: int = 1) -> Any:
    """A function that calls the encoder with images of the size it was made for."""
    like: dict[str, Any] = {"dtype": patchify.weight.dtype, "device": "meta"}
    if isinstance(patchify, nn.Linear):  # patches without padding, and their rows and columns
        inputs = {
            "pixel_values": torch.empty(1, 12, patchify.in_features, **like),
            "pixel_attention_mask": None,
            "spatial_shapes": torch.tensor([[3, 4]]),
        }
        return lambda net: net.forward(**inputs)
    size = getattr(model.config, "image_size", None) or tuple(4 * step for step in patchify.stride[-2:])
    size = (size, size) if isinstance(size, int) else tuple(size)
    shape = (images, patchify.in_channels, *size)
    if isinstance(patchify, nn.Conv3d):
        shape = (images, model.config.num_frames, *shape[1:])

    def call(net: Any) -> Any:
        device = next((p.device for p in net.parameters()), torch.device("meta"))  # a copy on the CPU, else on meta
        return net.forward(torch.zeros(shape, dtype=like["dtype"], device=device))

    return call


def _rotary(model: Any, patch: Any) -> Any:
    rope = getattr(model, "rope_embeddings", None)
    if rope is None:
        return NOT_ROTARY

    def table() -> tuple[Tensor, tuple[int, int], int]:
        # a separate module: with values where the model has none (meta), without hooks, never in training mode
        with torch.device("cpu" if rope.inv_freq.is_meta else rope.inv_freq.device):
            _, sine = type(rope)(rope.config).eval()(torch.zeros(1, 3, 3 * patch[0], 4 * patch[1]))
        return sine, (3, 4), 1

    return table


def _prefix(embeddings: Any) -> int:
    """Number of tokens in front of the patches, by the shapes of the embeddings put there: [C], [1, C] or [1, tokens,
    C]."""
    names = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
    return sum(_count(embeddings, name) for name in names)


def _count(embeddings: Any, name: str) -> int:
    token = getattr(embeddings, name, None)
    return 0 if token is None else token.shape[1] if token.ndim == 3 else 1


def _interpolation(embeddings: Any) -> dict:
    """The keyword that makes the embeddings accept another image size, if they need one."""
    return (
        {"interpolate_pos_encoding": True}
        if "interpolate_pos_encoding" in signature(type(embeddings).forward).parameters
        else {}
    )


def _tail(model: Any) -> tuple[int, int]:
    """Numbers of weights of a pooling head: (applied to every token, applied once)."""
    head = getattr(model, "head", None)
    attention = getattr(head, "attention", None)
    if isinstance(head, nn.Module) and isinstance(attention, nn.MultiheadAttention):
        fused = attention.in_proj_weight.numel()
        return fused * 2 // 3, linear_weights(head) - fused * 2 // 3
    pooler = getattr(model, "pooler", None)
    return 0, linear_weights(pooler if isinstance(pooler, nn.Module) else None)
