"""Any multimodal LLM of transformers that puts image features at placeholders in front of a decoder: read off the model
itself, and tried before it is patched (multimodal/trial.py, self_check.py). A family file is for what cannot be read
off."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.multimodal.families.base import Family, Modality, axes_of
from vtc.layout import Grid, Layout, Unit

_DECODERS = ("language_model", "text_model")
TOKENS = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index")}


# What is known not to fit, and why: a trial would say less, or nothing.
UNFIT = {
    "minimax_m3_vl": "takes positions for numbers of columns in its sparse attention, and tokens that stay leave gaps",
    "deepseek_vl_hybrid": "encodes every image at two sizes, given as two arguments",
    "fuyu": "puts patches into the prompt without an encoder",
    "inkling_mm_model": "counts distances by columns, and tokens that stay would move together",
    "inkling2": "counts distances by columns, and tokens that stay would move together",
    "inkling2_loop": "counts distances by columns, and tokens that stay would move together",
    "chameleon": "embeds, merges and decodes in one forward",
    "unlimited_ocr": "counts its window's reference from the prompt's ids, whatever stays of them",
}
# The model types whose tiny models pass the oracle (tests/test_mllm_classes.py).
PROVEN = frozenset(
    """
    apertus1p5 aria aya_vision cohere2_vision cohere_compass cosmos3_edge cosmos3_omni deepseek_ocr2 deepseek_vl
    dots3_note emu3 ernie4_5_vl_moe exaone4_5 fast_vlm gemma3n gemma4 gemma4_unified glm46v glm4v glm4v_moe
    glm5_next glm_ocr got_ocr2 granite_docling hunyuan_vl hy_v4_vl hyperclovax_vision_v2 idefics2 janus kimi_k25 lfm2_vl
    lfm3_vl lighton_ocr llava llava_next_video minicpm_ocr minicpmv4_6 minicpmv4_7 mistral3 mistral_large4 molmo2
    muse_glimmer muse_spark ovis2 paddleocr_vl perception_lm qianfan_ocr qwen2_5_omni_thinker qwen3_5 qwen3_5_moe
    qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp step3p7 video_llama_3 video_llava vipllava
    """.split()
)
# Those whose decoders read no positions: for their linear attention and their attention to all, order is all there is.
ORDERED = frozenset({"glm5_next"})
# Those whose tokens are an image's cells, row by row. Where a resampler's queries make them, they are no cells.
RASTER = frozenset(
    """
    apertus1p5 aya_vision cohere2_vision deepseek_vl fast_vlm gemma3n got_ocr2 janus lighton_ocr mistral3
    mistral_large4 ovis2 perception_lm qianfan_ocr video_llava vipllava
    """.split()
)
_NEWLINES = {"hunyuan_vl", "hy_v4_vl"}  # among the features of an image, whose `grid_thw` thus tells no rows of tokens
_IMAGES_ONLY = {"video_llama_3"}  # its forward drops features of videos behind the encoder
_SINCE = (5, 24)  # of transformers, on which they passed


class Unfit(Exception):
    """Why a model cannot be served by the generic family, behind its class's name."""


class Generic(Family):
    """One model: where its decoder is, what it sees, how its features lie, what positions it gives."""

    covers = "other multimodal LLMs of transformers (vtc list-models), by methods that read the tokens, and some by all"
    classes = ()
    evidence = frozenset()
    in_tower = "vtc does not know its tower"

    def __init__(self, inner: Any) -> None:
        self.name = getattr(inner.config, "model_type", type(inner).__name__)
        if self.name in UNFIT:
            raise Unfit(UNFIT[self.name])
        self.proven = self.name in PROVEN and _version() >= _SINCE
        self.decoder = next((n for n in _DECODERS if hasattr(getattr(inner, n, None), "layers")), "")
        if not self.decoder:
            raise Unfit(_elsewhere(inner))
        takes = inspect.signature(type(inner).forward).parameters
        told = self.name not in _NEWLINES and any(name.endswith("_grid_thw") for name in takes)
        self.gridded = self.name in RASTER or told
        found = []
        for name, encode in (("image", "get_image_features"), ("video", "get_video_features")):
            if not callable(getattr(inner, encode, None)):
                continue
            pixels = list(inspect.signature(getattr(inner, encode)).parameters)[0]
            token = next((n for n in TOKENS[name] if isinstance(getattr(inner.config, n, None), int)), "")
            if pixels in takes and token:
                found.append(Modality(name, pixels, token, encode))
        if not found or found[0].name != "image":
            raise Unfit("takes no images at a placeholder's id")
        self.modalities = tuple(found[:1] if self.name in _IMAGES_ONLY else found)

    # -- the prompt ---------------------------------------------------------------------------------------------

    def layout(self, inner: Any, modality: Modality, lengths: list[int], call: dict[str, Any]) -> Layout:
        """A unit for every item, or for every frame where `grid_thw` tells frames."""
        units, start = [], 0
        several = self.several(modality, lengths, call)
        frames = self.frames(modality, lengths, call) or [(1, grid) for grid in self.sizes(modality, lengths, call)]
        for item, length in enumerate(lengths):
            if not length:  # a prompt without images, where an item is all that a prompt holds
                continue
            count, grid = (several[item], None) if several else frames[item]
            each = length // count
            for _ in range(count):
                units.append(Unit(torch.arange(start, start + each), item, grid))
                start += each
        return Layout(tuple(units))

    def frames(
        self, modality: Modality, lengths: list[int], call: dict[str, Any]
    ) -> list[tuple[int, Grid | None]] | None:
        """(frames, rows and columns of each) of every item, by `grid_thw`; None = not told."""
        told = call.get(f"{modality.name}_grid_thw")
        if told is None or len(told) != len(lengths):
            return None
        out: list[tuple[int, Grid | None]] = []
        for (time, rows, columns), length in zip(torch.as_tensor(told).tolist(), lengths, strict=True):
            edge = math.isqrt(time * rows * columns // length) if length else 0  # patches along a token's side
            grid = (rows // edge, columns // edge) if edge else (0, 0)
            fits = time > 0 and time * grid[0] * grid[1] == length
            out.append((time, grid) if fits else (1, None))
        return out

    def several(self, modality: Modality, lengths: list[int], call: dict[str, Any]) -> list[int]:
        """How many images every item holds, where one is all that a prompt holds: those that are not all zeros, as the
        models count them. [] = an item is an image."""
        pixels = call.get(modality.pixels)
        if not isinstance(pixels, Tensor) or pixels.ndim != 5 or len(pixels) != len(lengths):
            return []
        there = (pixels != 0).flatten(2).any(-1).sum(1).tolist()
        fits = all(length == 0 if not n else length % n == 0 for n, length in zip(there, lengths, strict=True))
        return there if fits else []

    def token(self, inner: Any, modality: Modality, ids: Tensor | None) -> int:
        """GLM writes the frames of videos with the placeholder of images."""
        token = super().token(inner, modality, ids)
        if modality.name == "video" and ids is not None and not bool((ids == token).any()):
            return super().token(inner, self.modalities[0], ids)
        return token

    def sizes(self, modality: Modality, lengths: list[int], call: dict[str, Any]) -> list[Grid | None]:
        """Rows and columns of every item by the image's own size: where some size of a token makes as many."""
        told, pixels = call.get("image_sizes"), call.get(modality.pixels)
        if self.name not in RASTER:
            return [None] * len(lengths)
        if told is not None and len(told) == len(lengths):
            sides = [tuple(int(n) for n in size[:2]) for size in torch.as_tensor(told).tolist()]
        elif isinstance(pixels, Tensor) and pixels.ndim >= 4 and pixels.shape[:-3].numel() == len(lengths):
            sides = [(pixels.shape[-2], pixels.shape[-1])] * len(lengths)
        else:
            return [None] * len(lengths)
        return [_grid(high, wide, length) for (high, wide), length in zip(sides, lengths, strict=True)]

    def positions(self, inner: Any, call: dict[str, Any], past: int, embeds: Tensor) -> Tensor:
        counted = super().positions(inner, call, past, embeds)
        if not hasattr(inner, "compute_3d_position_ids"):
            return counted
        found = axes_of(inner, call, embeds)
        return counted.expand(self.axes(inner), -1, -1) if found is None else found

    # -- the tower ----------------------------------------------------------------------------------------------

    def watched(self, inner: Any) -> nn.Module:
        return self.tower(inner)

    def tower(self, inner: Any) -> nn.Module:
        """The largest of the model's parts beside its language model, its tower: it runs when images are encoded."""
        words = inner.get_input_embeddings()
        parts = [m for n, m in inner.named_children() if n != self.decoder and words not in set(m.modules())]
        if not parts:
            raise Unfit("holds no vision tower")
        return max(parts, key=lambda part: sum(p.numel() for p in part.parameters()))


def _elsewhere(inner: Any) -> str:
    """Where a model has its decoder, if not as a stack of layers."""
    words = next((found for name in _DECODERS if (found := getattr(inner, name, None)) is not None), None)
    if hasattr(words, "lm_head"):
        return "holds its decoder in another model with a head of its own"
    if hasattr(words, "encoder") and hasattr(words, "decoder"):
        return "has an encoder of words in front of its decoder"
    return "has no decoder of layers as language_model or text_model"


def _version() -> tuple[int, int]:
    import transformers

    major, minor, *_ = transformers.__version__.split(".")
    return int(major), int(minor)


def _grid(high: int, wide: int, tokens: int) -> Grid | None:
    """Rows and columns of so many tokens in an image: those of the largest square token that makes as many."""
    for side in range(min(high, wide), 0, -1):
        if (high // side) * (wide // side) == tokens:
            return (high // side, wide // side)
    return None
