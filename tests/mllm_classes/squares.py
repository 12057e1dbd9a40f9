"""Images of one size, or cut into crops of one size, all of them alike to the tower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mllm_zoo as zoo
import torch
from mllm_zoo import END, FAKE, IMAGE, START, VIDEO, Item, Spec
from torch import Tensor

from .core import Class

# A spec is (rows, columns) of crops; more than one come with the whole image, before or behind them.
_TILES: list[Spec] = [(1, 2), (1, 1), (2, 2)]
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def number(spec: Spec) -> int:
    return spec[0] * spec[1] + (spec[0] * spec[1] > 1)


def tiles(side: int) -> Callable[[str, Spec, torch.Generator], Tensor]:
    return lambda kind, spec, generator: torch.randn(number(spec), 3, side, side, generator=generator)


def _one(side: int, tokens: int, wrapped: bool = False) -> dict[str, Any]:
    ids = zoo._wrapped(tokens) if wrapped else zoo._count(tokens)
    return {"images": [()], "ids": ids, "pixels": zoo._square(side), "pack": zoo._stacked}


def _tiled(side: int, ids: Callable[[str, Spec, torch.Generator], list[int]]) -> dict[str, Any]:
    return {"images": _TILES, "ids": ids, "pixels": tiles(side), "pack": zoo._concatenated}


def _aya_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    crops = [token for i in range(1, number(spec)) for token in [FAKE, 5 + i, *[IMAGE] * 9]]
    return [START, *crops, 115, *[IMAGE] * 9, END]


def _cohere_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    return [START, *[*[IMAGE] * 9, FAKE] * number(spec), END]


def _ovis_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    """The whole, then line by line: each mark is a learned row too, which the model puts in."""
    line = ([*[IMAGE] * 9, 114] * spec[1])[:-1]
    crops = ([*line, 115] * spec[0])[:-1] if spec[0] * spec[1] > 1 else []
    return [112, *[IMAGE] * 9, 113, *crops, 116]


def _run(each: int) -> Callable[[str, Spec, torch.Generator], list[int]]:
    return lambda kind, spec, generator: [START, *[IMAGE] * (each * number(spec)), END]


# -- videos of frames of one size -------------------------------------------------------------------------------------


def _frames_pack(crops: bool = False) -> Callable[[list[Item], int], dict[str, Tensor]]:
    """Videos [videos, frames, 3, H, W]; images likewise where they are cut into crops."""

    def pack(items: list[Item], rows: int) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if images := zoo._of(items, "image"):
            out["pixel_values"] = torch.stack([item.pixels for item in images])
        if videos := zoo._of(items, "video"):
            out["pixel_values_videos"] = torch.stack([item.pixels for item in videos])
        return out

    return pack


def _framed(image: int, frame: int) -> Callable[[str, Spec, torch.Generator], list[int]]:
    return lambda kind, spec, generator: [VIDEO] * (frame * spec[0]) if kind == "video" else [IMAGE] * image


def _video_llava_pixels(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    return torch.randn(*spec[:1], 3, 40, 40, generator=generator)


def _perception_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    return [VIDEO] * (4 * spec[0]) if kind == "video" else [IMAGE] * (4 * number(spec))


def _perception_pixels(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    return torch.randn(spec[0] if kind == "video" else number(spec), 3, 32, 32, generator=generator)


def _next_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    return [VIDEO] * (4 * spec[0]) if kind == "video" else zoo._anyres(None)(kind, spec, generator)


def _next_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    out = zoo._anyres_pack(items, rows)
    if videos := zoo._of(items, "video"):
        out["pixel_values_videos"] = torch.stack([item.pixels for item in videos])
    return out


# -- two towers: the same image twice ---------------------------------------------------------------------------------


def _twice(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    return torch.randn(3 * 40**2 + 3 * 64**2, generator=generator)


def _twice_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    if not items:
        return {}
    low, high = torch.stack([item.pixels for item in items]).split([3 * 40**2, 3 * 64**2], dim=1)
    return {"pixel_values": low.view(-1, 3, 40, 40), "high_res_pixel_values": high.view(-1, 3, 64, 64)}


_SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 4,
    "window_size": 5,
    "global_attn_indexes": [1],
    "mlp_dim": 64,
}

# -- Idefics 2: a few rows of features for each image, whatever its size ----------------------------------------------


def _idefics2_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    if not items:
        return {}
    most = max(sum(item.row == row for item in items) for row in range(rows))
    pixels = torch.zeros(rows, most, 3, 64, 64)
    mask = torch.zeros(rows, most, 64, 64, dtype=torch.long)
    for row in range(rows):
        for place, item in enumerate(item for item in items if item.row == row):
            high, wide = item.spec
            pixels[row, place, :, :high, :wide], mask[row, place, :high, :wide] = item.pixels, 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


CLASSES: dict[str, Class] = {
    "aya_vision": Class(
        zoo._config(
            "AyaVisionConfig",
            text_config={"model_type": "cohere2", **zoo._TEXT, **_SLIDING, "logit_scale": 1.0},
            vision_config=zoo._siglip(48),
            image_token_index=IMAGE,
        ),
        **_tiled(48, _aya_ids),
    ),
    "cohere2_vision": Class(
        zoo._config(
            "Cohere2VisionConfig",
            text_config={"model_type": "cohere2", **zoo._TEXT, **_SLIDING, "logit_scale": 1.0},
            vision_config=zoo._siglip(48),
            image_token_id=IMAGE,
            alignment_intermediate_size=96,
        ),
        **_tiled(48, _cohere_ids),
    ),
    "ovis2": Class(
        zoo._config(
            "Ovis2Config",
            text_config={"model_type": "qwen2", **zoo._TEXT},
            vision_config={
                **zoo._TOWER,
                "image_size": 48,
                "patch_size": 8,
                "hidden_stride": 2,
                "vocab_size": 32,
            },
            image_token_id=IMAGE,
            visual_indicator_token_ids=[112, 113, 114, 115, 116],
            vocab_size=zoo.VOCAB,
            hidden_size=64,
        ),
        **_tiled(48, _ovis_ids),
    ),
    "qianfan_ocr": Class(
        zoo._config(
            "QianfanOCRConfig",
            text_config={"model_type": "qwen3", **zoo._TEXT, "head_dim": 16},
            vision_config={**zoo._TOWER, "image_size": 48, "patch_size": 8, "use_qk_norm": True},
            image_token_id=IMAGE,
            image_seq_length=9,
        ),
        **_tiled(48, _run(9)),
    ),
    "got_ocr2": Class(
        zoo._config(
            "GotOcr2Config",
            text_config={"model_type": "qwen2", **zoo._TEXT},
            vision_config=_SAM,
            image_token_index=IMAGE,
            image_seq_length=16,
        ),
        **_tiled(64, _run(16)),
        sdpa=False,
    ),
    "deepseek_vl": Class(
        zoo._config(
            "DeepseekVLConfig",
            text_config={"model_type": "llama", **zoo._TEXT},
            vision_config=zoo._siglip(40),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        ),
        **_one(40, 25),
    ),
    "deepseek_vl_hybrid": Class(
        zoo._config(
            "DeepseekVLHybridConfig",
            text_config={"model_type": "llama", **zoo._TEXT},
            vision_config=zoo._siglip(40),
            high_res_vision_config={"model_type": "sam_vision_model", **_SAM, "global_attn_indexes": [0]},
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        ),
        images=[()],
        ids=zoo._count(25),
        pixels=_twice,
        pack=_twice_pack,
    ),
    "janus": Class(
        zoo._config(
            "JanusConfig",
            text_config={"model_type": "llama", **zoo._TEXT},
            vision_config={
                **zoo._TOWER,
                "image_size": 40,
                "patch_size": 8,
                "projection_dim": 64,
                "num_image_tokens": 25,
            },
            vq_config={
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": 64,
                "image_token_embed_dim": 64,
            },
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        ),
        **_one(40, 25, wrapped=True),
    ),
    "vipllava": Class(
        zoo._config(
            "VipLlavaConfig",
            text_config={"model_type": "llama", **zoo._TEXT},
            vision_config=zoo._clip(40),
            image_token_index=IMAGE,
            vision_feature_layer=[-2, -3, 1],
            image_seq_length=25,
        ),
        **_one(40, 25),
    ),
    "fast_vlm": Class(
        zoo._config(
            "FastVlmConfig",
            text_config={"model_type": "qwen2", **zoo._TEXT},
            vision_config={
                "model_type": "timm_wrapper",
                "architecture": "fastvit_mci3",
                "do_pooling": True,
                "global_pool": "avg",
                "hidden_size": 128,
                "model_args": {
                    "inference_mode": True,
                    "layers": [1, 1, 1, 1, 1],
                    "embed_dims": [32, 32, 32, 64, 64],
                },
            },
            image_token_index=IMAGE,
            image_seq_length=16,
        ),
        **_one(256, 16),
    ),
    "video_llava": Class(
        zoo._config(
            "VideoLlavaConfig",
            text_config={"model_type": "llama", **zoo._TEXT},
            vision_config=zoo._clip(40),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_seq_length=25,
            video_seq_length=78,
        ),
        images=[()],
        ids=_framed(25, 26),  # a frame keeps its class token
        pixels=_video_llava_pixels,
        pack=_frames_pack(),
        video=(3,),
    ),
    "llava_next_video": Class(
        zoo._config(
            "LlavaNextVideoConfig",
            text_config={"model_type": "llama", **zoo._TEXT},
            vision_config=zoo._clip(32),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=zoo._PINPOINTS,
            spatial_pool_stride=2,
            image_seq_length=16,
        ),
        images=[(30, 60), (60, 15), (48, 31)],
        ids=_next_ids,
        pixels=zoo._crops,
        pack=_next_pack,
        video=(4, 32, 32),
    ),
    "perception_lm": Class(
        zoo._config(
            "PerceptionLMConfig",
            text_config={"model_type": "llama", **zoo._TEXT},
            vision_config={
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_core_tiny_patch16_384",
                "model_args": {
                    "embed_dim": 48,
                    "depth": 3,
                    "num_heads": 4,
                    "img_size": [32, 32],
                    "patch_size": 8,
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1,
                    "ref_feat_shape": [4, 4],
                },
            },
            projector_pooling_ratio=2,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        images=[(1, 2), (2, 1)],  # images of one call have equally many crops
        ids=_perception_ids,
        pixels=_perception_pixels,
        pack=_frames_pack(),
        video=(3,),
    ),
    "idefics2": Class(
        zoo._config(
            "Idefics2Config",
            text_config={"model_type": "mistral", **zoo._TEXT, "head_dim": 16, "sliding_window": None},
            vision_config={**zoo._TOWER, "image_size": 64, "patch_size": 8},
            perceiver_config={
                "hidden_size": 64,
                "resampler_n_latents": 8,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            image_token_id=IMAGE,
        ),
        images=[(48, 64), (64, 32), (56, 56)],
        ids=lambda kind, spec, generator: [FAKE, *[IMAGE] * 8, FAKE],
        pixels=lambda kind, spec, generator: torch.randn(3, *spec, generator=generator),
        pack=_idefics2_pack,
    ),
}
