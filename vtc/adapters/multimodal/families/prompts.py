"""A typical prompt for a multimodal model, from its configuration alone: pixels of an image, placeholders, text."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIDE = 672  # side of the typical image, if a model takes images of any size
TEXT = 32  # number of words in the typical prompt


@dataclass(frozen=True)
class Picture:
    """What a model receives for one image: its tokens in the prompt, and the shapes of the accompanying tensors."""

    tokens: int
    size: tuple[int, int]  # of the image, in pixels
    shapes: dict[str, tuple[int, ...]]  # shapes of random tensors
    given: dict[str, list[list[int]]]  # tensors with given values

    def inputs(self, model: Any, text: int = TEXT, seed: int = 0) -> dict[str, Tensor]:
        """The keyword arguments of `model(...)`: a begin token, the image, `text` random words."""
        generator, config = torch.Generator().manual_seed(seed), model.config
        image = config.image_token_id
        words = torch.randint(3, 1000, (1, text), generator=generator) % min(1000, _first_special(config))
        ids = torch.cat([words[:, :1], torch.full((1, self.tokens), image), words], dim=1)
        out = beside(model, ids, image)
        out |= {name: torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}
        return out | {name: torch.tensor(rows) for name, rows in self.given.items()}


def beside(model: Any, ids: Tensor, image: int) -> dict[str, Tensor]:
    """Word ids [B, L], and what else of them the model's forward reads: the mask, and which are an image's."""
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inner = getattr(model, "model", model)  # the outer forward may hand on what it does not name
    takes = {name for each in (model, inner) for name in inspect.signature(type(each).forward).parameters}
    seen = (ids == image).long()
    if model.config.model_type == "paligemma":  # there it says which words are to be learned: none
        seen = torch.zeros_like(ids)
    return out | {name: seen for name in ("mm_token_type_ids", "token_type_ids") if name in takes}


def picture(config: Any, side: int = SIDE) -> Picture | None:
    """A typical image for the model of `config`: of the model's own size, or `side` x `side` pixels if it takes any
    size. None = a family whose tokens cannot be counted here."""
    make = _FAMILIES.get(config.model_type)
    return None if make is None else make(config, side)


def _square(config: Any) -> tuple[int, int]:
    """Side of the tower's images, and number of patches along it."""
    vision = config.vision_config
    side, patch = vision.image_size, vision.patch_size
    side, patch = (x[0] if isinstance(x, (list, tuple)) else x for x in (side, patch))
    return side, side // patch


def _one(tokens: Callable[[Any, int], int]) -> Callable[[Any, int], Picture]:
    """For families that scale every image to one square."""

    def make(config: Any, side: int) -> Picture:
        own, patches = _square(config)
        return Picture(tokens(config, patches), (own, own), {"pixel_values": (1, 3, own, own)}, {})

    return make


def _llava(config: Any, patches: int) -> int:
    full = config.vision_feature_select_strategy == "full" and "siglip" not in config.vision_config.model_type
    return patches**2 + full


def _tiles(config: Any, side: int) -> Picture:
    own, patches = _square(config)
    tokens = (patches // config.scale_factor) ** 2
    return Picture(tokens, (own, own), {"pixel_values": (1, 1, 3, own, own)}, {})


def _anyres(config: Any, side: int) -> Picture:
    """A crop with the whole image, and the crops of a grid with a newline token after each row."""
    from transformers.image_processing_utils import select_best_resolution

    own, patches = _square(config)
    high, wide = select_best_resolution((side, side), config.image_grid_pinpoints)
    rows, columns = patches * high // own, patches * wide // own
    rows, columns = min(rows, columns), min(rows, columns)  # a square image: the model removes the padding beside it
    limit = int(str(getattr(config, "vision_aspect_ratio", "")).rpartition("_")[2] or 0)
    ratio = math.sqrt(rows * columns / (limit * patches**2)) if limit else 0.0
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    shapes: dict[str, tuple[int, ...]] = {"pixel_values": (1, 1 + high * wide // own**2, 3, own, own)}
    tokens = patches**2 + rows * (columns + 1)
    return Picture(tokens, (side, side), shapes, {"image_sizes": [[side, side]]})


def _qwen(config: Any, side: int) -> Picture:
    vision = config.vision_config
    edge = vision.spatial_merge_size
    cells = max(1, round(side / (vision.patch_size * edge)))
    patches, side = cells * edge, cells * edge * vision.patch_size
    values = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    given = {"image_grid_thw": [[1, patches, patches]]}
    return Picture(cells**2, (side, side), {"pixel_values": (patches**2, values)}, given)


def _internvl(config: Any, patches: int) -> int:
    return int(patches**2 * config.downsample_ratio**2)


def _first_special(config: Any) -> int:
    text = config.get_text_config()
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    known = [getattr(config, name, None) for name in names]
    return min([text.vocab_size, *(token for token in known if token)])


_LIKE_QWEN = """
    cohere_compass cosmos3_omni exaone4_5 glm46v glm4v glm4v_moe glm5_next glm_ocr hyperclovax_vision_v2 lfm3_vl
    qwen2_5_omni_thinker qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe
    qwen4_exp
""".split()
_FAMILIES: dict[str, Callable[[Any, int], Picture]] = {
    "llava": _one(_llava),
    "llava_next": _anyres,
    "llava_onevision": _anyres,
    **dict.fromkeys(_LIKE_QWEN, _qwen),
    "internvl": _one(_internvl),
    "idefics3": _tiles,
    "smolvlm": _tiles,
    "gemma3": _one(lambda config, patches: config.mm_tokens_per_image),
    "paligemma": _one(lambda config, patches: patches**2),
}
