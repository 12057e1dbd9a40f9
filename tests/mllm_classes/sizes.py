"""Images of any size padded to the largest: pixels with a table of sizes, or patches with a table of places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mllm_zoo as zoo
import torch
from mllm_zoo import END, FAKE, IMAGE, START, TEXT_IDS, VIDEO, VOCAB, Item, Spec
from torch import Tensor

from .core import Class

# -- Pixtral: pixels, padded ------------------------------------------------------------------------------------------

_PIXTRAL = {"model_type": "pixtral", **zoo._TOWER, "image_size": 128, "patch_size": 8}


def _lines(unit: int, breaks: bool = True) -> Callable[[str, Spec, torch.Generator], list[int]]:
    """Line by line, with a token at the end of each, another at the end of the last."""

    def ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
        rows, columns = spec[0] // unit, spec[1] // unit
        if not breaks:
            return [IMAGE] * (rows * columns)
        return [*([IMAGE] * columns + [FAKE]) * rows][:-1] + [END]

    return ids


def _native(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    return torch.randn(3, *spec, generator=generator)


def _native_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    if not items:
        return {}
    sizes = torch.tensor([item.spec for item in items])
    pixels = torch.zeros(len(items), 3, *sizes.amax(0).tolist())
    for image, item in zip(pixels, items, strict=True):
        image[:, : item.spec[0], : item.spec[1]] = item.pixels
    return {"pixel_values": pixels, "image_sizes": sizes}


_NATIVE = {"images": [(80, 64), (48, 96), (64, 64)], "pixels": _native, "pack": _native_pack}


def _mistral3(text: dict[str, Any]) -> Class:
    config = zoo._config(
        "Mistral3Config",
        image_token_index=IMAGE,
        text_config={**zoo._TEXT, "head_dim": 16, **text},
        vision_config=_PIXTRAL,
        tie_word_embeddings=False,
    )
    return Class(config, ids=_lines(16), **_NATIVE)


_YARN = {  # the temperature rises from the eighth position on
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}

# -- Gemma 4: patches and their places, -1 where there is none -------------------------------------------------------


def _gemma4_ids(unit: int) -> Callable[[str, Spec, torch.Generator], list[int]]:
    def ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
        frames, tokens = spec[:-2], spec[-2] * spec[-1] // unit
        if kind == "image":
            return [START, *[IMAGE] * tokens, END]
        stamp = torch.randint(*TEXT_IDS, (frames[0], 3), generator=generator).tolist()
        return [token for i in range(frames[0]) for token in [*stamp[i], START, *[VIDEO] * tokens, END]]

    return ids


def _gemma4_patches(size: int) -> Callable[[str, Spec, torch.Generator], Tensor]:
    return lambda kind, spec, generator: torch.rand(*spec[:-2], spec[-2] * spec[-1], size, generator=generator)


def _gemma4_pack(most: int) -> Callable[[list[Item], int], dict[str, Tensor]]:
    def padded(patches: Tensor, high: int, wide: int) -> tuple[Tensor, Tensor]:
        places = torch.stack([torch.arange(high * wide) % wide, torch.arange(high * wide) // wide], dim=-1)
        fill = most - high * wide
        pad = torch.nn.functional.pad
        return pad(patches, (0, 0, 0, fill)), pad(places, (0, 0, 0, fill), value=-1)

    def pack(items: list[Item], rows: int) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if images := zoo._of(items, "image"):
            pairs = [padded(item.pixels, *item.spec) for item in images]
            out["pixel_values"], out["image_position_ids"] = (torch.stack(part) for part in zip(*pairs, strict=True))
        if videos := zoo._of(items, "video"):
            pairs = [padded(frame, *item.spec[1:]) for item in videos for frame in item.pixels]
            out["pixel_values_videos"], out["video_position_ids"] = (torch.stack(p) for p in zip(*pairs, strict=True))
            out["num_frames_per_video"] = torch.tensor([item.spec[0] for item in videos])
        return out

    return pack


_GEMMA4_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "boi_token_id": START,
    "eoi_token_id": END,
    "audio_token_id": 115,
    "boa_token_id": 116,
    "eoa_token_index": 117,
}
_GEMMA4_TEXT = {
    **zoo._TEXT,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 30.0,
}


def _gemma4(text: dict[str, Any], **vision: Any) -> Class:
    return Class(
        zoo._config(
            "Gemma4Config",
            text_config={
                **_GEMMA4_TEXT,
                "vocab_size_per_layer_input": VOCAB,
                "hidden_size_per_layer_input": 0,
                **text,
            },
            vision_config={
                **zoo._TOWER,
                "num_key_value_heads": 4,
                "head_dim": 12,
                "patch_size": 8,
                "pooling_kernel_size": 3,
                "position_embedding_size": 16,
                **vision,
            },
            **_GEMMA4_IDS,
        ),
        images=[(9, 12), (12, 6), (6, 9)],
        ids=_gemma4_ids(9),
        pixels=_gemma4_patches(192),
        pack=_gemma4_pack(108),
        types="mm_token_type_ids",
        video=(3, 6, 9),
    )


# -- LFM2-VL: patches with a mask; a large image is tiles and a thumbnail --------------------------------------------


def _shapes(spec: Spec) -> list[tuple[int, int]]:
    return list(zip(spec[::2], spec[1::2], strict=True))


def _lfm2_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    shapes = _shapes(spec)
    marks = [[]] if len(shapes) == 1 else [*([115 + i] for i in range(len(shapes) - 1)), [118]]
    parts = [[*mark, *[IMAGE] * (h * w // 4)] for mark, (h, w) in zip(marks, shapes, strict=True)]
    return [START, *(token for part in parts for token in part), END]


def _lfm2_pixels(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    return torch.randn(sum(h * w for h, w in _shapes(spec)), 192, generator=generator)


def _lfm2_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    if not items:
        return {}
    shapes = [shape for item in items for shape in _shapes(item.spec)]
    parts = torch.cat([item.pixels for item in items]).split([h * w for h, w in shapes])
    return {
        "pixel_values": zoo._padded(list(parts)),
        "pixel_attention_mask": zoo._padded([torch.ones(len(part), dtype=torch.int32) for part in parts]),
        "spatial_shapes": torch.tensor(shapes),
    }


# -- MiniCPM-V: all patches in one line; an overview, then slices; (rows, columns of slices, h, w of both) -----------

_SLICED: list[Spec] = [(0, 0, 12, 16), (1, 2, 8, 12, 12, 8), (2, 2, 8, 8, 8, 8)]
_SLICED_4: list[Spec] = [(0, 0, 6, 8), (1, 2, 4, 6, 6, 4), (2, 2, 4, 4, 4, 4)]
SLICE, SLICE_END, NEWLINE, NUMBER, NUMBER_END = 115, 116, 117, 118, 119


def _minicpm_shapes(kind: str, spec: Spec) -> list[tuple[int, int]]:
    if kind == "video":
        return [spec[1:]] * spec[0]
    rows, columns, high, wide, *slices = spec
    return [(high, wide)] + [tuple(slices)] * (rows * columns)


def _minicpm_ids(merge: int) -> Callable[[str, Spec, torch.Generator], list[int]]:
    def ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
        if kind == "video":
            return [START, *[VIDEO] * (spec[1] * spec[2] // merge), END] * spec[0]
        rows, columns, high, wide, *slices = spec
        out = [NUMBER, 5, NUMBER_END, START, *[IMAGE] * (high * wide // merge), END]
        for row in range(rows):
            out += [NEWLINE] * (row > 0) + [SLICE, *[IMAGE] * (slices[0] * slices[1] // merge), SLICE_END] * columns
        return out

    return ids


def _minicpm_pixels(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    return torch.randn(3, 8, 8 * sum(h * w for h, w in _minicpm_shapes(kind, spec)), generator=generator)


def _minicpm_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for kind, end in (("image", ""), ("video", "_videos")):
        if chosen := zoo._of(items, kind):
            out[f"pixel_values{end}"] = torch.cat([item.pixels for item in chosen], dim=-1)[None]
            shapes = [shape for item in chosen for shape in _minicpm_shapes(kind, item.spec)]
            out[f"target_sizes{end}"] = torch.tensor(shapes, dtype=torch.int32)
    return out


def _minicpm(kind: str, types: str | None, rope: dict[str, Any], merge: int = 16, **more: Any) -> Class:
    return Class(
        zoo._config(
            kind,
            text_config={
                "model_type": "qwen3_5_text",
                **zoo._TEXT,
                "head_dim": 32,
                "linear_conv_kernel_dim": 4,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                "rope_parameters": rope,
            },
            vision_config={**zoo._TOWER, "image_size": 128, "patch_size": 8},
            insert_layer_id=1,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **more,
        ),
        images=_SLICED if merge == 16 else _SLICED_4,
        ids=_minicpm_ids(merge),
        pixels=_minicpm_pixels,
        pack=_minicpm_pack,
        types=types,
        video=(3, 8, 12),
    )


# -- Molmo 2: an overview and crops, and for each token the patches that it pools ------------------------------------

LOW_START, COLUMN, FRAME_START, FRAME_END = 114, 115, 116, 117


def _molmo_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    if kind == "video":
        stamp = torch.randint(*TEXT_IDS, (spec[0], 3), generator=generator).tolist()
        return [token for i in range(spec[0]) for token in [*stamp[i], FRAME_START, *[IMAGE] * 4, FRAME_END]]
    high, wide = 2 * spec[0], 2 * spec[1]
    return [LOW_START, *[IMAGE] * 4, END, START, *[*[IMAGE] * wide, COLUMN] * high, END]


def _molmo_crops(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    return torch.randn(spec[0] if kind == "video" else 1 + spec[0] * spec[1], 16, 192, generator=generator)


def _molmo_pool(places: Tensor) -> Tensor:
    """[H, W] patches -> [tokens, 4], two by two, -1 where there is no patch."""
    high, wide = places.shape
    places = torch.nn.functional.pad(places, (0, wide % 2, 0, high % 2), value=-1)
    return places.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)


def _molmo_types(ids: Tensor, mask: Tensor, types: Tensor) -> dict[str, Tensor]:
    """1 on all that belongs to an image or a frame, marks too: these see each other both ways."""
    return {"mm_token_type_ids": ((ids >= IMAGE) & (ids <= FRAME_END)).long()}


def _molmo_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    if images := zoo._of(items, "image"):
        pools, start = [], 0
        for item in images:
            low, crops = start + torch.arange(16).view(4, 4), start + 16 + torch.arange(16 * (len(item.pixels) - 1))
            whole = crops.view(item.spec[0], item.spec[1], 4, 4).transpose(1, 2).flatten(2).flatten(0, 1)
            # Crops overlap: the last line and column of the whole are another's.
            pools += [_molmo_pool(low), _molmo_pool(whole[:-1, :-1])]
            start += 16 * len(item.pixels)
        out["pixel_values"] = torch.cat([item.pixels for item in images])
        out["image_token_pooling"] = torch.cat(pools).int()
        out["image_grids"] = torch.tensor([[2, 2, 2 * item.spec[0], 2 * item.spec[1]] for item in images])
        out["image_num_crops"] = torch.tensor([len(item.pixels) for item in images])
    if videos := zoo._of(items, "video"):
        out["pixel_values_videos"] = torch.cat([item.pixels for item in videos])
        frames = torch.arange(16 * len(out["pixel_values_videos"])).view(-1, 4, 4)
        out["video_token_pooling"] = torch.cat([_molmo_pool(frame) for frame in frames]).int()
        out["video_grids"] = torch.tensor([[item.spec[0], 2, 2] for item in videos])
    return out


# -- Aria: padded to one size, with a mask, and as many queries as that size is due -----------------------------------


def _aria_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    if not items:
        return {}
    pixels, mask = torch.zeros(len(items), 3, 64, 64), torch.zeros(len(items), 64, 64, dtype=torch.bool)
    for place, item in enumerate(items):
        high, wide = item.spec
        pixels[place, :, :high, :wide], mask[place, :high, :wide] = item.pixels, True
    return {"pixel_values": pixels, "pixel_mask": mask}


CLASSES: dict[str, Class] = {
    "gemma4": _gemma4(
        {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    ),
    "gemma4_moe": _gemma4(
        {
            "use_bidirectional_attention": "vision",
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        standardize=True,
    ),
    "gemma4_unified": Class(
        zoo._config(
            "Gemma4UnifiedConfig",
            text_config=_GEMMA4_TEXT,
            vision_config={
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 48,
                "mm_posemb_size": 16,
                "output_proj_dims": 48,
            },
            **_GEMMA4_IDS,
        ),
        images=[(5, 4), (3, 6), (4, 4)],
        ids=_gemma4_ids(1),
        pixels=_gemma4_patches(192),
        pack=_gemma4_pack(24),
        types="mm_token_type_ids",
        video=(3, 2, 3),
    ),
    "mistral3": _mistral3({"model_type": "mistral", "sliding_window": None}),
    "mistral3_ministral3": _mistral3({"model_type": "ministral3", "rope_parameters": _YARN}),
    "mistral3_mistral4": _mistral3(
        {
            "model_type": "mistral4",
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "rope_parameters": _YARN,
        }
    ),
    "llava_pixtral": Class(
        zoo._config(
            "LlavaConfig",
            image_token_index=IMAGE,
            text_config={"model_type": "mistral", **zoo._TEXT, "head_dim": 16, "sliding_window": None},
            vision_config=_PIXTRAL,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        ids=_lines(8),
        **{**_NATIVE, "images": [(40, 32), (24, 48), (32, 32)]},
    ),
    "lighton_ocr": Class(
        zoo._config(
            "LightOnOcrConfig",
            image_token_id=IMAGE,
            text_config={"model_type": "qwen3", **zoo._TEXT, "head_dim": 16},
            vision_config=_PIXTRAL,
            tie_word_embeddings=False,
        ),
        ids=_lines(16, breaks=False),
        **_NATIVE,
    ),
    "lfm2_vl": Class(
        zoo._config(
            "Lfm2VlConfig",
            image_token_id=IMAGE,
            text_config={
                "model_type": "lfm2",
                **zoo._TEXT,
                "layer_types": ["conv", "full_attention", "conv"],
                "block_auto_adjust_ff_dim": False,
            },
            vision_config={
                "model_type": "siglip2_vision_model",
                **zoo._TOWER,
                "patch_size": 8,
                "num_patches": 64,
                "vision_use_head": False,
            },
            projector_hidden_size=64,
        ),
        images=[(10, 8), (4, 4, 4, 4, 6, 8), (8, 8)],
        ids=_lfm2_ids,
        pixels=_lfm2_pixels,
        pack=_lfm2_pack,
    ),
    "minicpmv4_6": _minicpm(
        "MiniCPMV4_6Config", None, zoo._rope(4, 2, 2, mrope_interleaved=True, partial_rotary_factor=0.5)
    ),
    "minicpmv4_7": _minicpm(
        "MiniCPMV4_7Config",
        "mm_token_type_ids",
        zoo._rope(4, 2, 2, mrope_interleaved=True, partial_rotary_factor=0.5),
        image_start_id=START,
        image_end_id=END,
        slice_start_id=SLICE,
        slice_end_id=SLICE_END,
        newline_id=NEWLINE,
    ),
    "molmo2": Class(
        zoo._config(
            "Molmo2Config",
            text_config={**zoo._TEXT, "vocab_size": 100, "additional_vocab_size": 20, "head_dim": 16},
            vision_config={
                **zoo._TOWER,
                "num_key_value_heads": 4,
                "head_dim": 12,
                "image_size": [32, 32],
                "patch_size": 8,
            },
            adapter_config={
                "vision_feature_layer": [3, 1],
                "hidden_size": 48,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 12,
                "intermediate_size": 64,
                "text_hidden_size": 64,
            },
            image_patch_id=IMAGE,
            image_start_token_id=START,
            low_res_image_start_token_id=LOW_START,
            image_end_token_id=END,
            frame_start_token_id=FRAME_START,
            frame_end_token_id=FRAME_END,
        ),
        images=[(1, 2), (2, 1), (1, 1)],
        ids=_molmo_ids,
        pixels=_molmo_crops,
        pack=_molmo_pack,
        more=_molmo_types,
        video=(3, 4, 4),
        lacks=("image_video",),  # refused by the class
    ),
    "minicpm_ocr": _minicpm(
        "MiniCPMOcrConfig", None, zoo._rope(4, 2, 2, mrope_interleaved=True, partial_rotary_factor=0.5), merge=4
    ),
    "mistral_large4": Class(
        zoo._config(
            "MistralLarge4Config",
            image_token_index=IMAGE,
            text_config={
                **zoo._TEXT,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 32,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 16,
                "v_head_dim": 16,
                "index_topk": 8,
                "index_head_dim": 16,
                "index_n_heads": 8,
                "no_rope_layers": [1, 0, 1],
                "rope_parameters": {**_YARN, "attention_factor": 1.0},
            },
            vision_config=_PIXTRAL,
        ),
        ids=_lines(16),
        **_NATIVE,
    ),
    "aria": Class(
        zoo._config(
            "AriaConfig",
            text_config={
                **zoo._TEXT,
                "intermediate_size": 32,
                "moe_num_experts": 4,
                "moe_topk": 2,
                "moe_num_shared_experts": 1,
            },
            vision_config={"model_type": "idefics3_vision", **zoo._TOWER, "image_size": 64, "patch_size": 8},
            projector_patch_to_query_dict={64: 8},
            image_token_index=IMAGE,
        ),
        images=[(48, 64), (64, 32), (56, 56)],
        ids=zoo._count(8),
        pixels=_native,
        pack=_aria_pack,
    ),
}
